"""What the safeguards remember of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from automode.planner.divergence import WIDTH, LevelWatch, patience_of
from automode.planner.policy import Policy


@dataclass(slots=True, kw_only=True)
class Guards:
    """What the safeguards remember.

    Attributes:
        level: Follows the loss's level.
        rewinds: Times that the run went back, or could not.
        in_a_row: Of these, the last ones, each within B steps of the one before.
        rewound_at: Step of the last time.
        rewound_to: Step of the state that it went back to.
        clips: Caps that were asked for.
        cap: The cap in force, or None.
        skipped_at: Applied steps at the last step that was left out.
        skipped: Steps left out in a row at that step, since the run last went back.
        left_out: Steps left out in a row at that step in all; the loop stops the run at ``stop_after_nonfinite``.
        stopped: Whether the run was asked to stop.
    """

    level: LevelWatch = field(default_factory=lambda: LevelWatch(above=3.0, patience=WIDTH))
    rewinds: int = 0
    in_a_row: int = 0
    rewound_at: int | None = None
    rewound_to: int | None = None
    clips: int = 0
    cap: float | None = None
    skipped_at: int = -1
    skipped: int = 0
    left_out: int = 0
    stopped: bool = False

    @classmethod
    def of(cls, policy: Policy, budget: int) -> Guards:
        """The safeguards of a policy; ``budget`` is B in steps."""
        guards = policy.safeguards
        return cls(level=LevelWatch(above=guards.rewind_above, patience=patience_of(guards, budget)))
