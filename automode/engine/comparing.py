"""Two sets of cards side by side: what a session recorded, and what another policy would have proposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from automode.planner.approval import PLANNER
from automode.planner.cards import PlanCard, Reason, difference
from automode.planner.policy import Policy

SCANNED: Final[frozenset[Reason]] = frozenset({"residual_cluster", "high_loss_tail", "label_noise"})
"""Reasons whose rules read scans of the sample ledger."""

_ASIDE: Final = ("id", "session", "step", "base", "because", "diagnostics", "cost")
"""Fields that differ wherever two cards were made at different moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A recorded card and the one that would have been proposed in its place; one of them may be missing.

    Attributes:
        recorded: The session's card.
        proposed: The other policy's.
        difference: What they ask for differently, by dotted name: (recorded, proposed). Moment, reasons in words and price
            are left out.
        on_scans: Whether it rests on scans that the other policy would have taken otherwise, or not at all.
    """

    recorded: PlanCard | None
    proposed: PlanCard | None
    difference: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    on_scans: bool = False

    @property
    def step(self) -> int:
        """Step of the earlier one."""
        return min(card.step for card in (self.recorded, self.proposed) if card is not None)

    @property
    def later(self) -> int | None:
        """Steps by which the other policy would have proposed it later (below 0: sooner); None where one is missing."""
        if self.recorded is None or self.proposed is None:
            return None
        return self.proposed.step - self.recorded.step


def pairs_of(
    recorded: Sequence[PlanCard], proposed: Sequence[PlanCard], *, on_scans: frozenset[Reason] = frozenset()
) -> tuple[Pair, ...]:
    """Match cards of one reason, the nearest in steps first; people's own cards stand alone.

    Args:
        recorded: Cards of the session.
        proposed: Cards of the other policy.
        on_scans: Reasons that rest on scans which the other policy would have taken otherwise.

    Returns:
        The pairs by step.
    """
    near = sorted(
        (abs(a.step - b.step), a.step, i, j)
        for i, a in enumerate(recorded)
        for j, b in enumerate(proposed)
        if a.reason == b.reason and a.created_by == PLANNER
    )
    taken: dict[int, int] = {}
    for _, _, i, j in near:
        if i not in taken and j not in taken.values():
            taken[i] = j
    pairs = [
        _pair(card, proposed[taken[i]] if i in taken else None, on_scans) for i, card in enumerate(recorded)
    ]
    pairs += [_pair(None, card, on_scans) for j, card in enumerate(proposed) if j not in taken.values()]
    return tuple(sorted(pairs, key=lambda pair: (pair.step, pair.recorded is None)))


def _pair(recorded: PlanCard | None, proposed: PlanCard | None, on_scans: frozenset[Reason]) -> Pair:
    changed: dict[str, tuple[Any, Any]] = {}
    if recorded is not None and proposed is not None:
        changed = {
            k: v for k, v in difference(recorded, proposed).items() if k.partition(".")[0] not in _ASIDE
        }
    rests = proposed is not None and proposed.reason in on_scans
    return Pair(recorded=recorded, proposed=proposed, difference=changed, on_scans=rests)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanLimits:
    """What a what-if cannot say because scans were taken as the recorded policy asked for them.

    Attributes:
        reasons: Reasons of the other policy that rest on those scans.
        why: A sentence; empty where there are no such reasons.
    """

    reasons: frozenset[Reason] = frozenset()
    why: str = ""


def scan_limits(
    recorded: Policy, other: Policy, *, total_steps: int, scans: int, clusterings: int
) -> ScanLimits:
    """Say which of a policy's reasons would have read other scans than the session holds.

    Args:
        recorded: The session's policy.
        other: The policy that is tried.
        total_steps: Length of the run.
        scans: Scans that the session holds.
        clusterings: How many of them clustered the samples too.
    """
    wanted = SCANNED & set(other.reasons)
    if not wanted:
        return ScanLimits()
    if not scans:
        return ScanLimits(
            reasons=wanted,
            why=f"the session holds no scan, so that nothing can be said of {', '.join(sorted(wanted))}",
        )
    before, after = _asked(recorded, total_steps), _asked(other, total_steps)
    changed = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    if changed:
        return ScanLimits(
            reasons=wanted,
            why=(
                f"scans were taken as the recorded policy asked for them, and this one asks otherwise ({', '.join(changed)}): "
                f"cards of {', '.join(sorted(wanted))} rest on the scans that there are"
            ),
        )
    if "residual_cluster" in wanted and not clusterings:
        return ScanLimits(
            reasons=frozenset({"residual_cluster"}),
            why="the session's scans clustered nothing, so that nothing can be said of residual_cluster",
        )
    return ScanLimits()


def _asked(policy: Policy, total_steps: int) -> dict[str, float | None]:
    """The parts of a policy that decide when a scan is taken and what it reads."""
    every = policy.scan.every or max(1, policy.planning_budget(total_steps) // 2)
    return {
        "scan.every": every,
        "scan.share": policy.scan.share,
        "scan.probe": policy.scan.probe,
        "scan.tail_from": policy.scan.tail_from,
    }
