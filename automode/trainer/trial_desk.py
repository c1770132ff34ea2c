"""Trials between the log and the backend: commands become jobs, results become the answers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentJob
from automode.errors import NotExecutableError
from automode.planner.approval import CardRecord
from automode.planner.events import (
    Acknowledged,
    StartTrial,
    StopTrial,
    TrialFailed,
    TrialReported,
    TrialsNoted,
)
from automode.planner.metrics import Metric
from automode.trainer.earlier import Answer, Earlier, key_of

Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A segment that was under way when the run was cut, with the trunk steps' worth of work that it had had."""

    pumped: int
    body: StartTrial
    command_id: str


@dataclass(frozen=True, slots=True)
class _Known:
    """A segment whose end an earlier attempt has seen."""

    body: StartTrial
    command_id: str
    answer: Answer


class TrialDesk:
    """Hands segments to a backend, and remembers which command each of them answers.

    Args:
        backend: Runs segments; None where forks are refused.
    """

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend
        self._commands: dict[Key, str] = {}
        self._pumped: dict[Key, int] = {}
        self._lower: dict[str, set[str]] = {}
        self._answers: Mapping[str, Answer] = {}
        self._said: Sequence[tuple[int, TrialsNoted]] = ()
        self._spared: set[tuple[str, int, int]] = set()
        self._usable: Callable[[Answer], bool] = lambda answer: False
        self._cut: list[_Cut] = []
        self._known: list[_Known] = []
        self._early: list[SegmentDone | SegmentFailed] = []

    @property
    def busy(self) -> bool:
        """Whether any segment is queued or running, or is to be reported as it was."""
        waiting = self._cut or self._known or self._early
        return bool(waiting) or (self._backend is not None and self._backend.busy)

    # A run that is taken up.

    def progress(self) -> list[list[str | int]]:
        """Say how much work every segment under way has had: card, trial, attempt, trunk steps' worth."""
        return [[*key, pumped] for key, pumped in self._pumped.items()]

    def know(self, earlier: Earlier, usable: Callable[[Answer], bool]) -> None:
        """Take what earlier attempts' segments came to, and whether what one left behind can be used."""
        self._answers, self._said, self._usable = earlier.answers, earlier.notes, usable

    def keep(self, card: str, checkpoints: Iterable[str]) -> None:
        """Know checkpoints below the top rung that earlier attempts have left."""
        self._lower.setdefault(card, set()).update(checkpoints)

    def take_up(self, body: StartTrial, command_id: str, pumped: int) -> None:
        """Begin a segment again that was under way, and give it as much work at once as it had had."""
        self._cut.append(_Cut(pumped, body, command_id))

    def catch_up(self) -> None:
        """Bring segments that were under way to where they were; what ends on the way is reported at the next pump."""
        if not self._cut:
            return
        cut, self._cut = sorted(self._cut, key=lambda job: -job.pumped), []
        for job, after in zip(cut, [*(job.pumped for job in cut[1:]), 0], strict=True):
            self.start(job.body, job.command_id)
            if self._backend is None:
                continue
            for _ in range(job.pumped - after):
                self._count(1)
                self._early += self._backend.pump(1)

    # What the driver asks.

    def start(self, body: StartTrial, command_id: str) -> None:
        """Submit a segment; its report comes later.

        Raises:
            NotExecutableError: This run has no backend, or one that cannot give the trial what its card asks for.
        """
        if self._backend is None:
            raise NotExecutableError("this run trains no specialists, so it has no backend for trials")
        answer = self._answers.get(key_of(body)) if self._answers else None
        if answer is not None and self._usable(answer):
            self._pumped[_key(body)] = 0
            self._known.append(_Known(body, command_id, answer))
            self._spared.add((body.card, body.trial, body.to_resource))
            return
        job = SegmentJob(
            card=body.card,
            trial=body.trial,
            attempt=body.rung_attempt,
            variant=body.variant,
            base=body.base,
            checkpoint=body.checkpoint,
            from_resource=body.from_resource,
            to_resource=body.to_resource,
            top_resource=body.top_resource,
            per_trunk_step=body.per_trunk_step,
            resources=body.resources,
        )
        self._backend.submit(job)
        self._commands[job.key] = command_id
        self._pumped[job.key] = 0

    def stop(self, body: StopTrial) -> Acknowledged:
        """Give a segment up; what it had spent is told."""
        key = (body.card, body.trial, body.rung_attempt)
        self._commands.pop(key, None)
        self._pumped.pop(key, None)
        self._cut = [job for job in self._cut if _key(job.body) != key]
        for known in [known for known in self._known if _key(known.body) == key]:
            self._known.remove(known)
            if isinstance(known.answer.body, TrialReported) and known.answer.body.checkpoint is not None:
                self.keep(body.card, [known.answer.body.checkpoint])
        spent = self._backend.cancel(*key) if self._backend is not None else 0.0
        return Acknowledged(command=body.kind, card=body.card, passes=spent)

    def pump(
        self, trunk_steps: int, step: int, cards: Mapping[str, CardRecord]
    ) -> list[tuple[TrialsNoted | TrialReported | TrialFailed, str | None]]:
        """Let the backend work for so many trunk steps.

        Args:
            trunk_steps: Trunk steps' worth of time slices.
            step: The trunk's step, at which what is known already may be due.
            cards: Every card of the session.

        Returns:
            What the backend says of trials, and then what ended, each with the command that it answers.
        """
        if self._backend is None:
            return []
        found = self._due(step)
        self._count(trunk_steps)
        ended, self._early = [*self._early, *self._backend.pump(trunk_steps)], []
        for result in ended:
            self._pumped.pop(result.job.key, None)
            if isinstance(result, SegmentDone) and result.job.to_resource < result.job.top_resource:
                self.keep(result.job.card, [result.checkpoint])
        answers = [
            (_reported(r, cards[r.job.card].card.acceptance.metric), self._commands.pop(r.job.key, None))
            for r in ended
        ]
        return [*((note, None) for note in self._notes(cards, step)), *found, *answers]

    def _due(self, step: int) -> list[tuple[TrialReported | TrialFailed, str | None]]:
        """Give the ends that earlier attempts have seen by this step."""
        if not self._known:
            return []
        due = sorted((k for k in self._known if k.answer.step <= step), key=lambda k: k.answer.seq)
        self._known = [k for k in self._known if k.answer.step > step]
        for known in due:
            self._pumped.pop(_key(known.body), None)
            body = known.answer.body
            below = known.body.to_resource < known.body.top_resource
            if isinstance(body, TrialReported) and body.checkpoint is not None and below:
                self.keep(body.card, [body.checkpoint])
        return [(known.answer.body, known.command_id) for known in due]

    def _count(self, trunk_steps: int) -> None:
        for key in self._pumped:
            self._pumped[key] += trunk_steps

    def _notes(self, cards: Mapping[str, CardRecord], step: int) -> list[TrialsNoted]:
        """What is to be said of trials and no card knows yet: each rung, and a run that is taken up, says things again."""
        found: list[TrialsNoted] = []
        said = [note for at, note in self._said if at <= step and note.card in cards]
        for note in [*(self._of_spared(note) for note in said), *self._fresh_notes()]:
            known = [*cards[note.card].notes, *(other for other in found if other.card == note.card)]
            new = tuple(t for t in note.trials if not any(other.says(t, note) for other in known))
            if new:
                found.append(note.model_copy(update={"trials": new}))
        return found

    def _of_spared(self, note: TrialsNoted) -> TrialsNoted:
        """Of what an earlier attempt has said, what is about segments that are not trained again."""
        spared = tuple(t for t in note.trials if (note.card, t, note.resource) in self._spared)
        return note.model_copy(update={"trials": spared})

    def _fresh_notes(self) -> list[TrialsNoted]:
        return [
            TrialsNoted(card=n.card, trials=n.trials, resource=n.resource, what=n.what, why=n.why)
            for n in (self._backend.notes() if self._backend is not None else ())
        ]

    def dropped(self, card: str, checkpoints: set[str]) -> set[str]:
        """Of checkpoints that the ladder has dropped, those that are still there; told once."""
        mine = self._lower.get(card, set())
        gone = mine & checkpoints
        mine -= gone
        return gone

    def lower_rungs(self, card: str) -> set[str]:
        """Checkpoints below the top rung of a card that has ended; told once."""
        return self._lower.pop(card, set())

    def close(self) -> None:
        """Give everything up."""
        if self._backend is not None:
            self._backend.close()


def _key(body: StartTrial) -> Key:
    return (body.card, body.trial, body.rung_attempt)


def _reported(result: SegmentDone | SegmentFailed, metric: Metric) -> TrialReported | TrialFailed:
    job = result.job
    match result:
        case SegmentDone():
            return TrialReported(
                card=job.card,
                trial=job.trial,
                rung_attempt=job.attempt,
                resource=job.to_resource,
                value=result.value,
                metric=metric,
                choice=result.choice,
                checkpoint=result.checkpoint,
                passes=result.passes,
                stopped_early=result.stopped_early,
                seconds=result.seconds,
            )
        case SegmentFailed():
            return TrialFailed(
                card=job.card,
                trial=job.trial,
                rung_attempt=job.attempt,
                resource=job.to_resource,
                error=result.error,
                retryable=result.retryable,
                passes=result.passes,
            )
        case _:
            assert_never(result)
