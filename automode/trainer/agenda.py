"""Commands between the log and their turn: at the next boundary, at an exact step, or when the trunk has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from automode.planner.events import Envelope, Merge, Snapshot

LONGEST_STRIDE = 128
"""Batches between two boundaries at the most. What is done there costs little more for many rows than for a few."""

ACTING_STRIDE, SHORT_STRIDE = 32, 16
"""The same where automode acts on what it sees; and about what whole looks are to make there where they are shorter."""

TICK_SECONDS = 0.2
"""Longest time that people wait for their turn, the length of one step apart."""

ROWS_SECONDS = 0.5
"""Longest time that rows wait to be handed over. Sooner would be for nobody: that is how often they are written to the disk."""


def stride_of(look_every: int, *, acts: bool) -> int:
    """Give the batches between two boundaries: whole looks of the fold, so that a look falls on a boundary.

    Args:
        look_every: Steps from one look to the next.
        acts: Whether automode may act by itself: then a look waits for the next boundary for no longer than it must.
    """
    if acts:
        return min(ACTING_STRIDE, look_every * max(1, SHORT_STRIDE // look_every))
    return min(LONGEST_STRIDE, look_every * max(1, LONGEST_STRIDE // look_every))


class Agenda:
    """What is durable and not carried out yet.

    Attributes:
        scheduled: Commands for an exact step to come.
        at_end: Commands for the end of the run.
    """

    def __init__(self) -> None:
        self._next: deque[Envelope] = deque()
        self.scheduled: list[Envelope] = []
        self.at_end: list[Envelope] = []

    def add(self, commands: Iterable[Envelope]) -> None:
        """Take commands that are durable, for the next boundary."""
        self._next.extend(commands)

    def pop(self) -> Envelope | None:
        """Give the next command of this boundary."""
        return self._next.popleft() if self._next else None

    def ids(self) -> list[str]:
        """Give the ids of what waits for the next boundary."""
        return [command.command_id for command in self._next if command.command_id is not None]

    def put_aside(self, command: Envelope, step: int, *, ended: bool) -> bool:
        """Keep a command whose time has not come; tell whether it was kept.

        Args:
            command: The command.
            step: The trunk's step.
            ended: Whether the trunk has taken its last one.
        """
        match command.body:
            case Snapshot(at_step=int(at)) if at > step:
                self.scheduled.append(command)
            case Merge(at_end=True) if not ended:
                self.at_end.append(command)
            case _:
                return False
        return True

    def due(self, step: int) -> list[Envelope]:
        """Give the commands whose exact step has come."""
        if not self.scheduled:
            return []
        due = [c for c in self.scheduled if c.body.at_step <= step]
        self.scheduled = [c for c in self.scheduled if c.body.at_step > step]
        return due

    def end(self) -> list[Envelope]:
        """Drop what waited for a step that does not come; give what waited for the end."""
        self.scheduled.clear()
        ending, self.at_end = self.at_end, []
        return ending
