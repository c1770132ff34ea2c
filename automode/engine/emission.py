"""Numbering what the machine says: every fact and command gets its place in the log and its cause."""

from __future__ import annotations

from automode.engine.state import State
from automode.planner.events import Command, Envelope, Fact


class Emission:
    """Collects the facts and commands of one call of the machine.

    Facts and commands inherit the clock of the event that led to them, so that the fold reads no clock of its own.

    Args:
        state: The fold's state, whose ``next_seq`` is advanced.
    """

    __slots__ = ("cause", "commands", "facts", "state", "t_mono", "t_wall")

    def __init__(self, state: State) -> None:
        self.state = state
        self.facts: list[Envelope] = []
        self.commands: list[Envelope] = []
        self.cause: int | None = None
        self.t_wall = 0.0
        self.t_mono = 0.0

    def at(self, cause: int | None, t_wall: float, t_mono: float) -> None:
        """Set what the next facts follow from: an event's ``seq`` (None: a trunk row) and its clock."""
        self.cause = cause
        self.t_wall = t_wall
        self.t_mono = t_mono

    def fact(self, body: Fact, cause: int | None = None) -> int:
        """Record a decision; returns its ``seq``, to be named as the cause of what follows from it."""
        envelope = self._envelope(body, "fact", cause, None)
        self.facts.append(envelope)
        return envelope.seq

    def command(self, body: Command, cause: int | None = None) -> str:
        """Ask the world to act; returns the command's id."""
        command_id = f"c{self.state.next_seq}"
        envelope = self._envelope(body, "command", cause, command_id)
        self.commands.append(envelope)
        self.state.pending[command_id] = body
        return command_id

    def _envelope(
        self, body: Fact | Command, role: str, cause: int | None, command_id: str | None
    ) -> Envelope:
        seq = self.state.next_seq
        self.state.next_seq = seq + 1
        return Envelope(
            seq=seq,
            role="fact" if role == "fact" else "command",
            body=body,
            cause=self.cause if cause is None else cause,
            command_id=command_id,
            frame_cursor=self.state.rows,
            t_wall=self.t_wall,
            t_mono=self.t_mono,
            attempt=self.state.attempt,
        )
