"""The driver: the thin shell between the training loop and the fold.

Observations and answers go in as events, commands come out, and each result is an event again. Everything happens in the training
thread at step boundaries; a command is carried out only after the log that holds it is durable. Nothing here decides.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from automode.backends.base import Backend
from automode.engine import State
from automode.errors import SessionError
from automode.planner.events import (
    Checkpointed,
    Decided,
    Envelope,
    Input,
    Mode,
    Resumed,
    RunEnded,
    Safeguarded,
    TrunkEnded,
)
from automode.session import SessionStore
from automode.session.logs import SessionLog
from automode.trainer.agenda import stride_of
from automode.trainer.card_callbacks import CardCallback, CardCallbacks
from automode.trainer.clock import Clock, SystemClock
from automode.trainer.earlier import Earlier, is_usable
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.executor import Executor
from automode.trainer.narrator import Narrator
from automode.trainer.observation_block import Block
from automode.trainer.performer import Performer
from automode.trainer.recorder import Recorder
from automode.trainer.requests_desk import REQUEST, RequestsDesk
from automode.trainer.scribe import Scribe
from automode.trainer.spending import Spending
from automode.trainer.steps import OVERFLOWED


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
        guard: Whether steps that are not finite, or leaps, are skipped in act mode.
        within: Whether automode's spending shortens the trunk.
        clock: For tests.
        on_card: The user's own functions that hear of every card.

    Attributes:
        limit: Step that the trunk may train up to; shrinks as automode spends.
        stop_requested: Why training should end at the next boundary, or None.
        stopped_by: The person who asked for that, or None.
        performer: As given.
        requests: Requests from other processes, and those of earlier attempts.
        scribe: Tells the fold what happens, and writes it.
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
        self.stopped_by: str | None = None
        self._guard = guard
        self._spending = Spending(state, total_steps, within=within)
        self._store = store
        self._session_log = log
        self._log = log.logger
        self.performer = performer
        self._narrator = narrator
        self._clock = clock = clock or SystemClock()
        self._recorder = Recorder(store, log.logger)
        self.requests = RequestsDesk(store.path, log.logger)
        self._callbacks = CardCallbacks(on_card, state, store.path, log.logger)
        self._executor = Executor(
            performer=performer,
            backend=backend,
            narrator=narrator,
            session=store.path,
            log=log.logger,
            clock=clock,
        )
        self._agenda, self._trials = self._executor.agenda, self._executor.trials
        self.scribe = Scribe(
            state,
            store,
            recorder=self._recorder,
            narrator=narrator,
            requests=self.requests,
            agenda=self._agenda,
            clock=clock,
            released=self._executor.ended,
        )
        self._pumped_at = 0
        self._first_row = 0
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
        mode = self.state.mode  # where off, nothing is decided, and no look has to fall on a boundary
        return stride_of(1 if mode == "off" else self.state.look_every, acts=mode == "act")

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
        self.scribe.feed(body)
        self._settle(0)
        self.performer.keep(self.state, 0)

    def block(self, block: Block) -> None:
        """Record a block of rows, and let the machine see it; what it asks for is carried out at the next boundary."""
        self.scribe.rows(block)

    def tick(self, step: int) -> bool:
        """Write what is due, and look into the inbox; tell whether somebody asks for something."""
        now = self._clock.mono()
        if self.requests.poll(now, self.rows):
            return True
        self.scribe.write()
        self._recorder.flush_if_due(now)
        return False

    def boundary(self, step: int) -> None:
        """Do everything that may happen between two steps."""
        now = self._clock.mono()
        self._trials.catch_up()
        since = step - self._pumped_at if self._trials.busy else 1
        if self.requests.poll(now, self.rows):
            for decided in self.requests.take(self.rows):
                self.scribe.feed(decided)
        self._settle(step)
        for command in self._agenda.due(step):
            if command.body.card in self.state.executions:
                self._perform(command, step)
        for answer, command_id in self._trials.pump(max(1, since), step, self.state.cards):
            self.scribe.feed(answer, command_id, effective_at=step)
        self._pumped_at = step
        self._settle(step)
        for decided in self._callbacks.decided(self.state):
            self.scribe.feed(decided)
            self._settle(step)
        self.performer.keep(self.state, step)
        self._recorder.flush_if_due(now)

    @property
    def rows(self) -> int:
        """Rows since the run was begun or taken up."""
        return self.state.rows - self._first_row

    # A run that is cut, and taken up again.

    def state_for_checkpoint(self) -> dict[str, Any]:
        """Say what :meth:`resume` needs beside the log; rows must have been handed over. Plain data and tensors."""
        return {
            "limit": self.limit,
            "skipped": self._skipped,
            "pumped_at": self._pumped_at,
            "requests": [[rows, body.model_dump_json()] for rows, body in self.requests.to_come(self.rows)],
            "executor": self._executor.state(),
        }

    def checkpointed(self, digest: str, step: int, why: str) -> None:
        """Record that a checkpoint is durable: from this record on the run can be taken up from it."""
        self._resumable = True
        self.scribe.feed(Checkpointed(checkpoint=digest, step=step, why=why), effective_at=step)
        self.scribe.write()

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
        self.scribe.go_on_at(max(self.state.t_mono, self.state.row_time))
        self._resumable = True
        self._recorder.supersede(body.at_seq)
        self.scribe.resumed(body, step=body.step, attempt=body.attempt)
        self.scribe.write()
        if self._recorder.waiting:
            raise SessionError(
                f"the session {self._store.path} cannot be written, so that it cannot be resumed"
            )
        self._first_row = self.state.rows
        self.limit, self._skipped, self._pumped_at = kept["limit"], kept["skipped"], kept["pumped_at"]
        if (
            body.actor is None
        ):  # else what was asked behind that state belongs to a story that somebody has left
            later = [(rows, REQUEST.validate_json(text)) for rows, text in kept["requests"]]
            self.requests.again(self._callbacks.again([*later, *earlier.requests]))
        self._trials.know(earlier, partial(is_usable, verify=verify, exact=body.exact))
        for answer, _ in self._executor.take_up(commands, self.state, body.step, kept["executor"], earlier):
            self.scribe.feed(answer)
        self.stop_requested = self._executor.stop

    # What a person asks of a run, carried out by the commander.

    def decide(self, request: Decided, step: int) -> list[Envelope]:
        """Follow a person's request about cards at once; returns the facts that are decided on it."""
        facts = self.scribe.feed(request)
        self._settle(step)
        return facts

    def set_length(self, total: int | None) -> None:
        """Let the trunk train up to another step; None: the end is not known beforehand."""
        self.limit += self._spending.set_total(sys.maxsize if total is None else total)
        if self._spending.shortens:
            self.limit = self._spending.limit

    def detach(self) -> None:
        """Close the session where it stands, to take it up again from an earlier state.

        Raises:
            SessionError: The log could not be written.
        """
        self._closed = True
        self._agenda.end()
        self._trials.close()
        try:
            self._recorder.close()
        finally:
            self._session_log.close()

    def let_go(self) -> None:
        """Close everything without another word in the log: the session could not be taken up."""
        self._closed = True
        self._trials.close()
        self._session_log.close()
        self._store.abandon()

    def skipped(self, step: int, why: str) -> None:
        """The guard kept a step from the optimizer."""
        self._skipped += 1
        self.scribe.feed(
            Safeguarded(step=step, what="overflowed" if why == OVERFLOWED else "skipped", why=why)
        )
        if mended := self.performer.mend():
            told = f"the batch left out had spoilt {mended} of the layers with running statistics"
            self.scribe.feed(Safeguarded(step=step, what="statistics_restored", why=told))
        if self._skipped >= self.state.policy.safeguards.stop_after_nonfinite:
            self.stop_requested = f"{self._skipped} steps in a row were not finite ({why})"
            self.scribe.feed(Safeguarded(step=step, what="stopped", why=self.stop_requested))

    def stepped(self) -> None:
        """An optimizer step was applied: the row of skipped ones is broken."""
        self._skipped = 0

    def validated(self, step: int, scores: PerSampleScores) -> None:
        """The user's validation came to this; val-A of it is for the signals, val-B is not looked at."""
        body = self.performer.validated(step, scores)
        if body is not None:
            self.scribe.feed(body)
            self._settle(step)

    def finish(self, step: int, why: str, *, early: bool = False) -> None:
        """The trunk took its last step: end what is pending, finish merges (``early``: also one that was not due yet), close the log.

        Raises:
            SessionError: The end of the log could not be written; the model is complete all the same.
        """
        self.scribe.feed(TrunkEnded(step=step, why=why, early=early and step < self.limit))
        ending = self._agenda.end()
        self._settle(step)
        for command in ending:
            if command.body.card in self.state.executions:
                self._perform(command, step)
                self._settle(step)
        self._trials.close()
        weights = self.performer.save_final(step)
        early = self.stopped_by is not None and self._resumable
        self.scribe.feed(RunEnded(step=step, why=why, weights=weights, early=early))
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
                self.scribe.feed(TrunkEnded(step=step, why=why))
            if not self.state.ended:
                self.scribe.feed(RunEnded(step=step, why=why))
            self._recorder.write()
            if not self._recorder.waiting:
                self.requests.clear()
            self._recorder.close()
        except Exception as second:
            self._log.error("session_not_closed", error=f"{type(second).__name__}: {second}")
        finally:
            self._session_log.close()

    # Events in, commands out.

    def _settle(self, step: int) -> None:
        """Write, perform, and go on until nothing is left to do."""
        while True:
            self.scribe.write()
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
            self.scribe.feed(answer, command_id, effective_at=step)
        self.stop_requested = self.stop_requested or self._executor.stop
