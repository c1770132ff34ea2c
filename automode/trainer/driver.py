"""The driver: the thin shell between the training loop and the fold.

Observations and answers go in as events, commands come out, and each result is an event again. Everything happens in the training
thread at step boundaries; a command is carried out only after the log that holds it is durable. Nothing here decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from automode.backends.base import Backend
from automode.engine import State, handle
from automode.errors import SessionError
from automode.planner.events import (
    BudgetReleased,
    Checkpointed,
    Decided,
    Envelope,
    Input,
    Mode,
    Resumed,
    Rows,
    RunEnded,
    Safeguarded,
    TrunkEnded,
)
from automode.session import SessionStore
from automode.session.logs import SessionLog
from automode.trainer.agenda import stride_of
from automode.trainer.card_callbacks import CardCallback, CardCallbacks
from automode.trainer.clock import Clock, ShiftedClock, SystemClock
from automode.trainer.earlier import Earlier, is_usable
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.executor import Executor
from automode.trainer.narrator import Narrator
from automode.trainer.observation_block import Block
from automode.trainer.performer import Performer
from automode.trainer.recorder import Recorder
from automode.trainer.requests_desk import RequestsDesk
from automode.trainer.spending import Spending
from automode.trainer.steps import OVERFLOWED

TRUNK = "trunk"


class Driver:
    """Carries events to the machine and its commands to the world.

    Args:
        state: The fold's state, not started yet.
        store: The session's single writer.
        log: The session's log file, closed with it.
        performer: Carries out commands that touch models and data.
        backend: Runs trials; None where forks are refused.
        narrator: Tells people what happens.
        total_steps: Steps that the user asked for.
        guard: Whether non-finite steps are skipped in act mode.
        within: Whether automode's spending shortens the trunk.
        clock: For tests.
        on_card: The user's own functions that hear of every card.

    Attributes:
        limit: Step that the trunk may train up to; shrinks as automode spends.
        stop_requested: Why training should end at the next boundary, or None.
    """

    def __init__(
        self,
        *,
        state: State,
        store: SessionStore,
        log: SessionLog,
        performer: Performer,
        backend: Backend | None,
        narrator: Narrator,
        total_steps: int,
        guard: bool,
        within: bool,
        clock: Clock | None = None,
        on_card: Sequence[CardCallback] = (),
    ) -> None:
        self.state = state
        self.limit = total_steps
        self.stop_requested: str | None = None
        self._guard = guard
        self._spending = Spending(state, total_steps, within=within)
        self._store = store
        self._session_log = log
        self._log = log.logger
        self._performer = performer
        self._narrator = narrator
        self._clock: Clock = clock or SystemClock()
        self._recorder = Recorder(store, log.logger)
        self._requests = RequestsDesk(store.path, log.logger)
        self._callbacks = CardCallbacks(on_card, state, store.path, log.logger)
        self._executor = Executor(
            performer=performer,
            backend=backend,
            narrator=narrator,
            session=store.path,
            log=log.logger,
            clock=self._clock,
        )
        self._agenda, self._trials = self._executor.agenda, self._executor.trials
        self._pumped_at = 0
        self._first_row = 0
        self._shift = 0.0
        self._skipped = 0
        self._resumable = False
        self._closed = False

    # What the loop reads.

    @property
    def guard(self) -> bool:
        """Whether a non-finite loss or gradient norm must not reach the optimizer."""
        return self._guard and self.state.mode == "act"

    @property
    def busy(self) -> bool:
        """Whether something needs every step boundary: trials in time slices, or a snapshot at an exact step."""
        return bool(self._agenda.scheduled) or self._trials.busy

    @property
    def stride(self) -> int:
        """Batches from one boundary to the next while nothing is busy."""
        return stride_of(self.state.look_every)

    @property
    def mode(self) -> Mode:
        """The mode in force."""
        return self.state.mode

    @property
    def compute(self) -> dict[str, int]:
        """Sample passes by account: the trunk's, automode's in all, and each part of that."""
        return self._spending.accounts

    @property
    def charged_steps(self) -> float:
        """Trunk steps' worth of compute that automode has spent."""
        return self._spending.steps

    # What the loop tells.

    def start(self, body: Input) -> None:
        """Begin the log."""
        self._feed(body)
        self._settle(0)
        self._performer.keep(self.state, 0)

    def block(self, block: Block) -> None:
        """Record a block of rows, and let the machine see it; what it asks for is carried out at the next boundary."""
        values = block.rows
        if self._shift:
            values = values.copy()
            values[:, block.names.index("time")] += self._shift
        self._store.add_rows(TRUNK, self.state.attempt, block.names, values)
        rows = Rows(first=self.state.rows, names=block.names, values=values)
        _, facts, commands = handle(self.state, [rows])
        if facts or commands:
            self._take(facts, commands)

    def tick(self, step: int) -> bool:
        """Write what is due, and look into the inbox; tell whether somebody asks for something."""
        now = self._clock.mono()
        if self._requests.poll(now, self._rows):
            return True
        self._write()
        self._recorder.flush_if_due(now)
        return False

    def boundary(self, step: int) -> None:
        """Do everything that may happen between two steps."""
        now = self._clock.mono()
        self._trials.catch_up()
        since = step - self._pumped_at if self._trials.busy else 1
        if self._requests.poll(now, self._rows):
            for decided in self._requests.take(self._rows):
                self._feed(decided)
        self._settle(step)
        for command in self._agenda.due(step):
            if command.body.card in self.state.executions:
                self._perform(command, step)
        for answer, command_id in self._trials.pump(max(1, since), step, self.state.cards):
            self._feed(answer, command_id, effective_at=step)
        self._pumped_at = step
        self._settle(step)
        for decided in self._callbacks.decided(self.state):
            self._feed(decided)
            self._settle(step)
        self._performer.keep(self.state, step)
        self._recorder.flush_if_due(now)

    @property
    def _rows(self) -> int:
        """Rows since the run was begun or taken up."""
        return self.state.rows - self._first_row

    # A run that is cut, and taken up again.

    def state_for_checkpoint(self) -> dict[str, Any]:
        """Say what :meth:`resume` needs beside the log; rows must have been handed over. Plain data and tensors."""
        return {
            "limit": self.limit,
            "skipped": self._skipped,
            "pumped_at": self._pumped_at,
            "requests": [[rows, body.model_dump_json()] for rows, body in self._requests.to_come(self._rows)],
            "executor": self._executor.state(),
        }

    def checkpointed(self, digest: str, step: int, why: str) -> None:
        """Record that a checkpoint is durable: from this record on the run can be taken up from it."""
        self._resumable = True
        self._feed(Checkpointed(checkpoint=digest, step=step, why=why), effective_at=step)
        self._write()

    def not_stored(self, why: str) -> None:
        """Tell that the run's state could not be stored; training goes on."""
        self._log.warning("checkpoint_not_stored", why=why, then="training goes on; tried again next time")

    def resume(
        self,
        body: Resumed,
        commands: Sequence[Envelope],
        *,
        kept: Mapping[str, Any],
        earlier: Earlier,
        verify: Callable[[str], object],
    ) -> None:
        """Go on from a checkpoint, up to which the state has been folded.

        What stands behind it in the log is put out of the story by the very transaction that says so.

        Args:
            body: What is told.
            commands: Those without an answer at the checkpoint, in order.
            kept: What :meth:`state_for_checkpoint` gave.
            earlier: What came behind the checkpoint.
            verify: Raises where a checkpoint is not there, or damaged.

        Raises:
            SessionError: The log cannot be written.
        """
        clock = ShiftedClock(self._clock, max(self.state.t_mono, self.state.row_time))
        self._clock, self._shift = clock, clock.shift
        self._resumable = True
        self._recorder.supersede(body.at_seq)
        envelope = self._enveloped(body, None, body.step)
        rows = self._store.rows(TRUNK)
        self._handle(replace(envelope, seq=self._store.next_seq, frame_cursor=rows, attempt=body.attempt))
        self._write()
        if self._recorder.waiting:
            raise SessionError(
                f"the session {self._store.path} cannot be written, so that it cannot be resumed"
            )
        self._first_row = self.state.rows
        self.limit, self._skipped, self._pumped_at = kept["limit"], kept["skipped"], kept["pumped_at"]
        later = [(rows, Decided.model_validate_json(text)) for rows, text in kept["requests"]]
        self._requests.again(self._callbacks.again([*later, *earlier.requests]))
        self._trials.know(earlier, partial(is_usable, verify=verify, exact=body.exact))
        for answer, _ in self._executor.take_up(commands, self.state, body.step, kept["executor"], earlier):
            self._feed(answer)

    def let_go(self) -> None:
        """Close everything without another word in the log: the session could not be taken up."""
        self._closed = True
        self._trials.close()
        self._session_log.close()
        self._store.abandon()

    def skipped(self, step: int, why: str) -> None:
        """The guard kept a non-finite step from the optimizer."""
        self._skipped += 1
        self._feed(Safeguarded(step=step, what="overflowed" if why == OVERFLOWED else "skipped", why=why))
        if mended := self._performer.mend():
            told = f"the batch left out had spoilt {mended} of the layers with running statistics"
            self._feed(Safeguarded(step=step, what="statistics_restored", why=told))
        if self._skipped >= self.state.policy.safeguards.stop_after_nonfinite:
            self.stop_requested = f"{self._skipped} steps in a row were not finite ({why})"
            self._feed(Safeguarded(step=step, what="stopped", why=self.stop_requested))

    def stepped(self) -> None:
        """An optimizer step was applied: the row of skipped ones is broken."""
        self._skipped = 0

    def validated(self, step: int, scores: PerSampleScores) -> None:
        """The user's validation came to this; val-A of it is for the signals, val-B is not looked at."""
        body = self._performer.validated(step, scores)
        if body is not None:
            self._feed(body)
            self._settle(step)

    def finish(self, step: int, why: str) -> None:
        """The trunk took its last step: end what is pending, finish merges, close the log.

        Raises:
            SessionError: The end of the log could not be written; the model is complete all the same.
        """
        self._feed(TrunkEnded(step=step, why=why))
        ending = self._agenda.end()
        self._settle(step)
        for command in ending:
            if command.body.card in self.state.executions:
                self._perform(command, step)
                self._settle(step)
        self._trials.close()
        weights = self._performer.save_final(step)
        self._feed(RunEnded(step=step, why=why, weights=weights))
        self._settle(step)
        self._closed = True
        try:
            self._recorder.close()
        finally:
            self._session_log.close()

    def abort(self, step: int, error: BaseException) -> None:
        """Close the log after an error, without ever hiding it."""
        if self._closed:
            return
        self._agenda.end()
        try:
            self._trials.close()
            how = "stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
            why = f"{how}: {type(error).__name__}: {str(error)[:500]}"
            (self._log.info if how == "stopped" else self._log.error)(f"run_{how}", step=step, why=why)
            if not self.state.trunk_ended:
                self._feed(TrunkEnded(step=step, why=why))
            if not self.state.ended:
                self._feed(RunEnded(step=step, why=why))
            self._recorder.write()
            if not self._recorder.waiting:
                self._requests.clear()
            self._recorder.close()
        except Exception as second:
            self._log.error("session_not_closed", error=f"{type(second).__name__}: {second}")
        finally:
            self._session_log.close()

    # Events in, commands out.

    def _feed(self, body: Input, command_id: str | None = None, effective_at: int | None = None) -> None:
        self._handle(self._enveloped(body, command_id, effective_at))

    def _enveloped(self, body: Input, command_id: str | None, effective_at: int | None) -> Envelope:
        return Envelope(
            seq=self.state.next_seq,
            role="input",
            body=body,
            command_id=command_id,
            frame_cursor=self.state.rows,
            effective_at=effective_at,
            t_wall=self._clock.wall(),
            t_mono=self._clock.mono(),
            attempt=self.state.attempt,
        )

    def _handle(self, envelope: Envelope) -> None:
        _, facts, commands = handle(self.state, [envelope])
        self._take([envelope, *facts], commands)

    def _take(self, told: list[Envelope], commands: list[Envelope]) -> None:
        envelopes = sorted((*told, *commands), key=lambda e: e.seq)
        self._recorder.add(self.state, envelopes)
        for envelope in envelopes:
            self._narrator.tell(envelope, self.state)
            if isinstance(envelope.body, BudgetReleased):
                self._executor.ended(envelope.body.card)

    def _write(self) -> None:
        """Make what was decided durable; the commands in it wait for the next boundary."""
        self._agenda.add(self._recorder.write())
        if not self._recorder.waiting:
            self._requests.clear()

    def _settle(self, step: int) -> None:
        """Write, perform, and go on until nothing is left to do."""
        while True:
            self._write()
            command = self._agenda.pop()
            if command is None:
                break
            self._perform(command, step)
        # A run that was stopped and can be taken up goes on with the cards that its end has cut short.
        if not (self._recorder.waiting or (self.state.trunk_ended and self._resumable)):
            self._executor.tidy(self.state)
        if self._spending.shortens:
            self.limit = self._spending.limit

    def _perform(self, command: Envelope, step: int) -> None:
        """Carry out one command; its answers are events."""
        for answer, command_id in self._executor.perform(command, self.state, step):
            self._feed(answer, command_id, effective_at=step)
        self.stop_requested = self.stop_requested or self._executor.stop
