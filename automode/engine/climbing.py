"""How far a card's ladder has come, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass

from automode.engine.state import Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class RungProgress:
    """One rung: ``done`` of the ``due`` trials that are to be trained to ``resource`` resource steps."""

    resource: int
    done: int
    due: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """A running card's ladder.

    Attributes:
        card: Id of the card.
        done: Resource steps of the segments that have reported.
        total: Resource steps of the whole ladder as far as it can be foreseen; at least ``done``.
        rungs: Lowest first.
        best: (trial, resource, value) of the best trial of the highest rung; None before there is one.
    """

    card: str
    done: int
    total: int
    rungs: tuple[RungProgress, ...]
    best: tuple[int, int, float] | None

    @property
    def text(self) -> str:
        """One line: trials at each rung, and who leads."""
        rungs = ", ".join(f"{rung.done}/{rung.due} at {rung.resource}" for rung in self.rungs)
        if self.best is None:
            return rungs
        trial, resource, value = self.best
        return f"{rungs}; trial {trial} leads with {value:.4f} at {resource}"


def climb_of(execution: Execution) -> Climb | None:
    """Read the ladder of a running card; None where it has none, or none yet.

    A rung is due as many trials as the rule can promote from the rung below: floor(n / eta), and one at the least.
    """
    asha = execution.asha
    if asha is None:
        return None
    levels, eta = asha.ladder.levels, asha.ladder.reduction_factor
    lower = dict(zip(levels, (0, *levels[:-1]), strict=True))
    due, rungs, done, total = len(execution.variants), [], 0, 0
    for level in levels:
        reported = sum(resource == level for _, resource in execution.reports)
        due = max(due, reported)
        rungs.append(RungProgress(resource=level, done=reported, due=due))
        done += reported * (level - lower[level])
        total += due * (level - lower[level])
        due = max(1, due // eta)
    best = asha.best()
    return Climb(
        card=execution.card,
        done=done,
        total=total,
        rungs=tuple(rungs),
        best=None if best is None else (best.trial, best.resource, best.value),
    )
