"""What a scheduler is told once, validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from automode.errors import UsageError
from automode.scheduler.ladder import Ladder, whole

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of :class:`~automode.scheduler.asha.ASHA`, which documents them.

    Raises:
        UsageError: An argument cannot be taken.
    """

    ladder: Ladder
    mode: Mode
    candidates: int | None
    seed: int
    quota: bool
    brackets: int
    max_attempts: int
    budget: int | None

    def __post_init__(self) -> None:
        """Validate, and turn numpy integers into plain ones."""
        if self.mode not in ("min", "max"):
            raise UsageError(f"mode is {self.mode!r}, but must be 'min' or 'max'")
        if not isinstance(self.quota, bool):
            raise UsageError(f"quota is {self.quota!r}, but must be True or False")
        for name, least in (
            ("candidates", 1),
            ("seed", 0),
            ("brackets", 1),
            ("max_attempts", 1),
            ("budget", 1),
        ):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole(name, value, least=least))
            elif name not in ("candidates", "budget"):
                raise UsageError(f"{name} is None, but must be a whole number >= {least}")
        rungs = len(self.ladder.levels)
        if self.brackets > rungs:
            raise UsageError(
                f"brackets is {self.brackets}, but the ladder {list(self.ladder.levels)} has {rungs} rungs, and every"
                " bracket starts at a rung of its own: lower brackets"
            )
        if self.budget is not None and self.budget < self.ladder.max_resource:
            raise UsageError(
                f"budget is {self.budget} resource steps, but training one trial fully takes"
                f" {self.ladder.max_resource}: raise budget or lower max_resource"
            )
