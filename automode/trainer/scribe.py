"""What is told to the fold, numbered and timed; what it says to that, on its way to the disk and to people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from automode.engine import State, handle
from automode.planner.events import BudgetReleased, Envelope, Input, Rows
from automode.session import SessionStore
from automode.trainer.agenda import Agenda
from automode.trainer.clock import Clock, ShiftedClock
from automode.trainer.narrator import Narrator
from automode.trainer.observation_block import Block
from automode.trainer.recorder import Recorder
from automode.trainer.requests_desk import RequestsDesk

TRUNK = "trunk"


class Scribe:
    """Feeds the fold, and makes durable what comes of it.

    Args:
        state: The fold's.
        store: The session's single writer.
        recorder: Writes envelopes.
        narrator: Tells people what happens.
        requests: Whose files go when their answers are on disk.
        agenda: Gets the commands that are durable.
        clock: Where times come from.
        released: Called with each card whose budget has been given back.

    Attributes:
        clock: Times of the run: those that it was away do not count.
    """

    def __init__(
        self,
        state: State,
        store: SessionStore,
        *,
        recorder: Recorder,
        narrator: Narrator,
        requests: RequestsDesk,
        agenda: Agenda,
        clock: Clock,
        released: Callable[[str], None],
    ) -> None:
        self.clock = clock
        self._state = state
        self._store = store
        self._recorder = recorder
        self._narrator = narrator
        self._requests = requests
        self._agenda = agenda
        self._given_clock = clock
        self._released = released
        self._shift = 0.0

    def go_on_at(self, now: float) -> None:
        """Let the clock show this time now; rows are timed alike.

        Args:
            now: Seconds.
        """
        clock = ShiftedClock(self._given_clock, now)
        self.clock, self._shift = clock, clock.shift

    def away(self, seconds: float) -> None:
        """Take a time off the clock in which the run did not train, so that nothing is decided on it.

        Args:
            seconds: How long.
        """
        self.go_on_at(self.clock.mono() - seconds)

    def rows(self, block: Block) -> None:
        """Record a block of the trunk's rows, and let the fold see it."""
        values = block.rows
        if self._shift:
            values = values.copy()
            values[:, block.names.index("time")] += self._shift
        self._store.add_rows(TRUNK, self._state.attempt, block.names, values)
        _, facts, commands = handle(
            self._state, [Rows(first=self._state.rows, names=block.names, values=values)]
        )
        if facts or commands:
            self._take(facts, commands)

    def feed(
        self, body: Input, command_id: str | None = None, effective_at: int | None = None
    ) -> list[Envelope]:
        """Tell the fold something that happened; returns the facts that it decides on it."""
        return self._handle(self._enveloped(body, command_id, effective_at))

    def resumed(self, body: Input, *, step: int, attempt: int) -> None:
        """Tell the fold that it goes on in a new attempt: numbers of records and rows go on behind those of the old ones."""
        envelope = self._enveloped(body, None, step)
        rows = self._store.rows(TRUNK)
        self._handle(replace(envelope, seq=self._store.next_seq, frame_cursor=rows, attempt=attempt))

    def write(self) -> None:
        """Make what was decided durable; the commands in it wait for the next boundary."""
        self._agenda.add(self._recorder.write())
        if not self._recorder.waiting:
            self._requests.clear()

    def _enveloped(self, body: Input, command_id: str | None, effective_at: int | None) -> Envelope:
        return Envelope(
            seq=self._state.next_seq,
            role="input",
            body=body,
            command_id=command_id,
            frame_cursor=self._state.rows,
            effective_at=effective_at,
            t_wall=self.clock.wall(),
            t_mono=self.clock.mono(),
            attempt=self._state.attempt,
        )

    def _handle(self, envelope: Envelope) -> list[Envelope]:
        _, facts, commands = handle(self._state, [envelope])
        self._take([envelope, *facts], commands)
        return facts

    def _take(self, told: list[Envelope], commands: list[Envelope]) -> None:
        envelopes = sorted((*told, *commands), key=lambda e: e.seq)
        self._recorder.add(self._state, envelopes)
        for envelope in envelopes:
            self._narrator.tell(envelope, self._state)
            if isinstance(envelope.body, BudgetReleased):
                self._released(envelope.body.card)
