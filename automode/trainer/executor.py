"""Carrying out what is durable: one command after the other; an error is an answer too, and never the run's end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from automode.backends.base import Backend
from automode.engine import State
from automode.errors import AutomodeError, SessionError
from automode.planner.events import (
    Acknowledged,
    AskApproval,
    CommandFailed,
    Diagnose,
    Diagnosed,
    Envelope,
    Input,
    Scan,
    Scanned,
    Snapshot,
    StartTrial,
    StopRun,
    StopTrial,
)
from automode.trainer.agenda import Agenda
from automode.trainer.clock import Clock
from automode.trainer.earlier import Earlier
from automode.trainer.narrator import Narrator
from automode.trainer.performer import Performer
from automode.trainer.random_state import forked_rng
from automode.trainer.remembering import remembered, remind, remind_card
from automode.trainer.trial_desk import TrialDesk

Answers = list[tuple[Input, str | None]]
"""Inputs, each with the id of the command that it answers for good."""


class Executor:
    """Knows who carries out which command.

    Args:
        performer: Carries out commands that touch models and data.
        backend: Runs trials; None where forks are refused.
        narrator: Tells people what happens.
        session: The session's folder.
        log: The session's logger.
        clock: What looking costs is measured by it.

    Attributes:
        agenda: Commands whose turn is still to come.
        trials: Segments under way.
        stop: Why the run was asked to stop, or None.
    """

    def __init__(
        self,
        *,
        performer: Performer,
        backend: Backend | None,
        narrator: Narrator,
        session: Path,
        log: Any,
        clock: Clock,
    ) -> None:
        self.agenda = Agenda()
        self.trials = TrialDesk(backend)
        self.stop: str | None = None
        self._performer = performer
        self._narrator = narrator
        self._session = session
        self._log = log
        self._clock = clock
        self._done_with: list[str] = []
        self._rests: dict[tuple[str, int], int] = {}

    # Commands.

    def perform(self, command: Envelope, state: State, step: int) -> Answers:
        """Carry out one command; the answers, none where they come later."""
        body = command.body
        try:
            with forked_rng():
                answers = self._carry_out(command, state, step)
        except Exception as error:
            self._log.warning("command_failed", command=body.kind, error=f"{type(error).__name__}: {error}")
            card = getattr(body, "card", None)
            answers = [CommandFailed(command=body.kind, card=card, error=_told(error))]
        last = len(answers) - 1
        return [(answer, command.command_id if i == last else None) for i, answer in enumerate(answers)]

    def _carry_out(self, command: Envelope, state: State, step: int) -> Sequence[Input]:
        body = command.body
        match body:
            case AskApproval():
                path = self._narrator.ask(state.cards[body.card].card, self._session)
                return [Acknowledged(command=body.kind, card=body.card, note=path)]
            case StopRun():
                self.stop = body.why
                return [Acknowledged(command=body.kind, card=body.card)]
            case StopTrial():
                return [self.trials.stop(body)]
            case StartTrial():
                self.trials.start(body, command.command_id or "")
                return []
            case Scan() | Diagnose():
                return self._look_at(body, state, step)
            case _ if self.agenda.put_aside(command, step, ended=state.trunk_ended):
                return []
            case _:
                return self._performer.carry_out(body, state, step)

    def _look_at(self, body: Scan | Diagnose, state: State, step: int) -> list[Input]:
        """Look at the trunk, and say for how long not to look again, so that it takes no more of the time than its share."""
        share, per_step = state.policy.scan.share, state.seconds_per_step
        if share is not None and isinstance(body, Diagnose):
            share = min(share, state.policy.diagnostics.share)
        began = self._clock.mono()
        answers = self._performer.carry_out(body, state, step)
        took = self._clock.mono() - began
        rest = ceil(took / (share * per_step)) if share and per_step else 0
        # An earlier attempt's measurement counts, so that the run that is taken up scans where that one did.
        return [
            a.model_copy(update={"rest": self._rests.get((a.kind, step), rest)})
            if isinstance(a, Scanned | Diagnosed)
            else a
            for a in answers
        ]

    def ended(self, card: str) -> None:
        """Know that a card needs nothing any more."""
        self._done_with.append(card)

    def tidy(self, state: State) -> None:
        """Delete checkpoints of trials that nothing can go on from, now that what made them so is on disk."""
        gone: set[str] = set()
        for card, execution in state.executions.items():
            gone |= self.trials.dropped(card, execution.dropped)
        for card in self._done_with:
            gone |= self.trials.lower_rungs(card)
            self._performer.forget(card)
        if self._done_with:
            self._performer.slow_down(state)
        self._done_with.clear()
        if gone:
            try:
                self._performer.delete(gone)
            except SessionError as error:
                self._log.warning("checkpoints_kept", why=str(error))

    # A run that is cut, and taken up again.

    def state(self) -> dict[str, Any]:
        """Say what :meth:`take_up` needs beside the log: plain data and tensors."""
        return {
            "waiting": self.agenda.ids(),
            "segments": self.trials.progress(),
            "rests": [[kind, step, rest] for (kind, step), rest in self._rests.items()],
            "memory": remembered(self._performer),
        }

    def take_up(
        self, commands: Sequence[Envelope], state: State, step: int, kept: Mapping[str, Any], earlier: Earlier
    ) -> Answers:
        """Put everything back to where it was at a checkpoint.

        Args:
            commands: Those without an answer there, in order.
            state: The fold's.
            step: The trunk's.
            kept: What :meth:`state` gave.
            earlier: What came behind the checkpoint.

        Returns:
            Failures of cards that cannot go on.
        """
        self._rests = {(kind, at): rest for kind, at, rest in kept["rests"]} | dict(earlier.rests)
        memory = kept["memory"]
        remind(self._performer, memory)
        failed: Answers = []
        for card, execution in state.executions.items():
            whole = state.cards[card].card
            try:
                remind_card(self._performer, whole, memory, earlier.resolved.get(card))
            except (AutomodeError, OSError) as error:
                failed.append((CommandFailed(command="resolve", card=card, error=_told(error)), None))
            top = None if whole.asha is None else whole.asha.max_steps
            below = {r.checkpoint for (_, at), r in execution.reports.items() if at != top and r.checkpoint}
            self.trials.keep(card, below - execution.dropped)
        for card, execution in state.executions.items():
            if execution.action == "stop":
                self.stop = f"card {card} ({state.cards[card].card.reason})"
        lost = {answer.card for answer, _ in failed if isinstance(answer, CommandFailed)}
        waiting = set(kept["waiting"])
        pumped = {tuple(key): n for *key, n in kept["segments"]}
        for command in commands:
            body = command.body
            if getattr(body, "card", None) in lost:
                continue
            if isinstance(body, StartTrial) and command.command_id not in waiting:
                key = (body.card, body.trial, body.rung_attempt)
                self.trials.take_up(body, command.command_id or "", pumped.get(key, 0))
            elif command.command_id in waiting or (
                not self.agenda.put_aside(command, step, ended=False) and not _was_dropped(body)
            ):
                self.agenda.add([command])
        return failed


def _was_dropped(body: Any) -> bool:
    """Tell whether a command's exact step has gone by without an answer: its card had ended before."""
    return isinstance(body, Snapshot) and body.at_step is not None


def _told(error: Exception) -> str:
    return (str(error) if isinstance(error, AutomodeError) else f"{type(error).__name__}: {error}")[:2000]
