"""One trial's standing: where it is on the ladder, which attempt counts, which checkpoints it holds."""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """What a trial is doing; the values are stable and stand in saved states."""

    RUNNING = "running"
    QUEUED = "queued"  # its segment failed and waits to be issued again
    PAUSED = "paused"
    FINISHED = "finished"
    DIVERGED = "diverged"
    LOST = "lost"
    STOPPED = "stopped"


IN_FLIGHT = (Status.RUNNING, Status.QUEUED)
WITHDRAWN = (Status.LOST, Status.STOPPED)


class Trial:
    """A trial that was started.

    Attributes:
        bracket: Its bracket.
        status: What it is doing.
        rung: Index (of the whole ladder) of the last rung that it reported at; -1 before the first.
        target: Index of the rung that its latest segment leads to.
        origin: Resource that its latest segment starts from; 0 when it starts from the parent.
        attempt: The latest attempt of that segment; while queued, the one that comes next.
        held: Bit ``k`` is set while the checkpoint written at rung ``k`` exists.
    """

    __slots__ = ("attempt", "bracket", "held", "origin", "rung", "status", "target")

    def __init__(
        self,
        *,
        bracket: int,
        status: Status,
        rung: int,
        target: int,
        origin: int,
        attempt: int,
        held: int = 0,
    ) -> None:
        self.bracket = bracket
        self.status = status
        self.rung = rung
        self.target = target
        self.origin = origin
        self.attempt = attempt
        self.held = held

    def holds(self, rung: int) -> bool:
        """Tell whether the checkpoint written at this rung still exists."""
        return bool(self.held >> rung & 1)
