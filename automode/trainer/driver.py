"""The driver: the thin shell between the training loop and the fold.

Observations and answers go in as events, commands come out, and each result is an event again. Everything happens in the training
thread at step boundaries; a command is carried out only after the log that holds it is durable. Nothing here decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from automode.backends.base import Backend
from automode.engine import State, handle
from automode.engine.lifecycle import due_at_end
from automode.errors import AutomodeError, SessionError
from automode.planner.events import (
    Acknowledged,
    AskApproval,
    BudgetReleased,
    CommandFailed,
    Diagnose,
    Diagnosed,
    Envelope,
    Input,
    Mode,
    Rows,
    RunEnded,
    Safeguarded,
    Scan,
    Scanned,
    StartTrial,
    StopRun,
    StopTrial,
    TrunkEnded,
)
from automode.session import SessionStore
from automode.session.logs import SessionLog
from automode.trainer.agenda import Agenda
from automode.trainer.clock import Clock, SystemClock
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.narrator import Narrator
from automode.trainer.observation_block import Block
from automode.trainer.performer import Performer
from automode.trainer.random_state import forked_rng
from automode.trainer.recorder import Recorder
from automode.trainer.requests_desk import RequestsDesk
from automode.trainer.steps import OVERFLOWED
from automode.trainer.trial_desk import TrialDesk

TRUNK = "trunk"

LONGEST_STRIDE, SHORT_STRIDE = 32, 16
"""Batches between two boundaries: whole looks of the fold, about so many of them as make the shorter, never above the longer."""


def stride_of(look_every: int) -> int:
    """Give the batches between two boundaries: where the fold looks every so many steps, a look falls on a boundary."""
    return min(LONGEST_STRIDE, look_every * max(1, SHORT_STRIDE // look_every))


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
    ) -> None:
        self.state = state
        self.limit = total_steps
        self.stop_requested: str | None = None
        self._guard = guard
        self._within = within
        self._total = total_steps
        self._store = store
        self._session_log = log
        self._log = log.logger
        self._performer = performer
        self._trials = TrialDesk(backend)
        self._narrator = narrator
        self._clock: Clock = clock or SystemClock()
        self._recorder = Recorder(store, log.logger)
        self._requests = RequestsDesk(store.path, log.logger)
        self._agenda = Agenda()
        self._pumped_at = 0
        self._first_row = 0
        self._skipped = 0
        self._done_with: list[str] = []
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
        ledger = self.state.ledger
        found = {"trunk": ledger.trunk, "automode": ledger.automode}
        for account, amount in ledger.accounts().items():
            owner = "outside cards" if account.card is None else f"card {account.card}"
            name = f"  {owner}: {account.purpose}"
            if account.trial is not None:
                name += f" {account.trial}"
            found[name] = amount
        return found

    @property
    def charged_steps(self) -> float:
        """Trunk steps' worth of compute that automode has spent."""
        if not self._spends:
            return 0.0
        return self.state.ledger.automode / self.state.passes_per_step

    @property
    def _spends(self) -> bool:
        return self._within and self.state.mode in ("propose", "act")

    # What the loop tells.

    def start(self, body: Input) -> None:
        """Begin the log."""
        self._feed(body)
        self._settle(0)
        self._performer.keep(self.state, 0)

    def block(self, block: Block) -> None:
        """Record a block of rows, and let the machine see it; what it asks for is carried out at the next boundary."""
        self._store.add_rows(TRUNK, self.state.attempt, block.names, block.rows)
        rows = Rows(first=self.state.rows, names=block.names, values=block.rows)
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
        since = step - self._pumped_at if self._trials.busy else 1
        if self._requests.poll(now, self._rows):
            for decided in self._requests.take(self._rows):
                self._feed(decided)
        self._settle(step)
        for command in self._agenda.due(step):
            if command.body.card in self.state.executions:
                self._perform(command, step)
        for answer, command_id in self._trials.pump(max(1, since)):
            self._feed(answer, command_id, effective_at=step)
        for card, text in self._trials.notes():
            self._narrator.note(card, text, step)
        self._pumped_at = step
        self._settle(step)
        self._performer.keep(self.state, step)
        self._recorder.flush_if_due(now)

    @property
    def _rows(self) -> int:
        """Rows since the run was begun or taken up."""
        return self.state.rows - self._first_row

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
            self._log.error("run_failed", step=step, error=f"{type(error).__name__}: {error}")
            why = f"failed: {type(error).__name__}: {str(error)[:500]}"
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
        envelope = Envelope(
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
        _, facts, commands = handle(self.state, [envelope])
        self._take([envelope, *facts], commands)

    def _take(self, told: list[Envelope], commands: list[Envelope]) -> None:
        envelopes = sorted((*told, *commands), key=lambda e: e.seq)
        self._recorder.add(self.state, envelopes)
        for envelope in envelopes:
            self._narrator.tell(envelope, self.state)
            if isinstance(envelope.body, BudgetReleased):
                self._done_with.append(envelope.body.card)

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
        if not self._recorder.waiting:
            self._tidy()
        if self._spends:
            taken = self.state.ledger.automode + due_at_end(self.state)
            self.limit = max(0, self._total - ceil(taken / self.state.passes_per_step))

    def _tidy(self) -> None:
        """Delete checkpoints of trials that nothing can go on from, now that what made them so is on disk."""
        gone: set[str] = set()
        for card, execution in self.state.executions.items():
            gone |= self._trials.dropped(card, execution.dropped)
        for card in self._done_with:
            gone |= self._trials.lower_rungs(card)
            self._performer.forget(card)
        self._done_with.clear()
        if gone:
            try:
                self._performer.delete(gone)
            except SessionError as error:
                self._log.warning("checkpoints_kept", why=str(error))

    def _perform(self, command: Envelope, step: int) -> None:
        """Carry out one command; an error is an answer too, and never the run's end."""
        body = command.body
        try:
            with forked_rng():
                answers = self._carry_out(command, step)
        except Exception as error:
            self._log.warning("command_failed", command=body.kind, error=f"{type(error).__name__}: {error}")
            card = getattr(body, "card", None)
            answers = [(CommandFailed(command=body.kind, card=card, error=_told(error)), True)]
        for answer, last in answers:
            self._feed(answer, command.command_id if last else None, effective_at=step)

    def _carry_out(self, command: Envelope, step: int) -> list[tuple[Input, bool]]:
        """Return the answers, the last one marked; none where the answer comes later."""
        body = command.body
        match body:
            case AskApproval():
                path = self._narrator.ask(self.state.cards[body.card].card, self._store.path)
                return [(Acknowledged(command=body.kind, card=body.card, note=path), True)]
            case StopRun():
                self.stop_requested = body.why
                return [(Acknowledged(command=body.kind), True)]
            case StopTrial():
                return [(self._trials.stop(body), True)]
            case StartTrial():
                self._trials.start(body, command.command_id or "")
                return []
            case Scan() | Diagnose():
                return self._look_at(body, step)
            case _ if self._agenda.put_aside(command, step, ended=self.state.trunk_ended):
                return []
            case _:
                return _last_marked(self._performer.carry_out(body, self.state, step))

    def _look_at(self, body: Scan | Diagnose, step: int) -> list[tuple[Input, bool]]:
        """Look at the trunk, and say for how long not to look again, so that it takes no more of the time than its share."""
        policy, per_step = self.state.policy, self.state.seconds_per_step
        share = policy.scan.share
        if share is not None and isinstance(body, Diagnose):
            share = min(share, policy.diagnostics.share)
        began = self._clock.mono()
        answers = self._performer.carry_out(body, self.state, step)
        rest = ceil((self._clock.mono() - began) / (share * per_step)) if share and per_step else 0
        return _last_marked(
            [
                a.model_copy(update={"rest": rest}) if isinstance(a, Scanned | Diagnosed) else a
                for a in answers
            ]
        )


def _last_marked(answers: Sequence[Input]) -> list[tuple[Input, bool]]:
    return [(answer, i == len(answers) - 1) for i, answer in enumerate(answers)]


def _told(error: Exception) -> str:
    return (str(error) if isinstance(error, AutomodeError) else f"{type(error).__name__}: {error}")[:2000]
