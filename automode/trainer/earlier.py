"""What earlier attempts of a run did behind the checkpoint that it is taken up from: finished work and people's answers.

A run that goes on exactly comes to the same commands again. A segment that was trained behind the checkpoint needs no training
then, what a person has asked for counts again, and what only a clock could tell is told as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from automode.engine.resuming import looks_of
from automode.errors import SessionCorruptError, SessionError
from automode.planner.controls import AGAIN
from automode.planner.events import (
    Controlled,
    Decided,
    Evaluate,
    Resolved,
    StartTrial,
    TrialFailed,
    TrialReported,
    TrialsNoted,
)
from automode.session import Record, Session
from automode.session.replaying import to_envelope
from automode.trainer.requests_desk import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a segment came to, at which step of the trunk that was known, and where it stands in the log."""

    body: TrialReported | TrialFailed
    step: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What the log holds of earlier attempts.

    Attributes:
        attempt: The latest of them.
        looks: What each look at val-B was at, superseded ones included.
        answers: What segments came to behind the checkpoint, by :func:`key_of` their command.
        notes: What was said of trials behind the checkpoint, and at which step of the trunk, in order.
        requests: What people asked behind the checkpoint, and what they changed: rows since, and the request, in order. What was
            asked before somebody had an earlier state loaded belongs to what was left behind.
        rests: Steps without a scan that a scan behind the checkpoint asked for, by its kind and step.
        resolved: How each card's selection was resolved, up to the checkpoint.
    """

    attempt: int
    looks: tuple[str, ...]
    answers: Mapping[str, Answer]
    notes: tuple[tuple[int, TrialsNoted], ...]
    requests: tuple[tuple[int, Request], ...]
    rests: Mapping[tuple[str, int], int]
    resolved: Mapping[str, Resolved]


def key_of(command: StartTrial) -> str:
    """Name a segment: everything that its result depends on."""
    return command.model_dump_json()


def is_usable(answer: Answer, verify: Callable[[str], object], *, exact: bool) -> bool:
    """Tell whether what a segment came to can stand for training it again.

    Args:
        answer: What it came to.
        verify: Raises where a checkpoint is not there, or damaged.
        exact: Whether the run goes on exactly: then a checkpoint that is gone is one that nothing needed any more when it
            was deleted.
    """
    if not isinstance(answer.body, TrialReported) or answer.body.checkpoint is None:
        return True
    try:
        verify(answer.body.checkpoint)
    except SessionCorruptError:
        return False
    except SessionError:
        return exact
    return True


def read_earlier(session: Session, at_seq: int) -> Earlier:
    """Read what came behind a checkpoint, in all attempts that went on from it.

    Args:
        session: The session.
        at_seq: The checkpoint's record.
    """
    attempt = 1
    looks = looks_of(
        Evaluate.model_validate(record.body) for record in session.events("evaluate", include_superseded=True)
    )
    resolved = {
        record.body["card"]: Resolved.model_validate(record.body)
        for record in session.events("resolved")
        if record.seq <= at_seq
    }
    commands = {
        record.command_id: StartTrial.model_validate(record.body)
        for record in session.events("start_trial", include_superseded=True)
    }
    answers: dict[str, Answer] = {}
    notes: list[tuple[int, TrialsNoted]] = []
    requests: dict[str, tuple[int, Request]] = {}
    rests: dict[tuple[str, int], int] = {}
    for rows, record in _since(session, at_seq):
        attempt = max(attempt, record.attempt)
        if record.kind in ("trial_reported", "trial_failed") and record.command_id in commands:
            body = to_envelope(record).body
            answers[key_of(commands[record.command_id])] = Answer(
                body=body, step=record.effective_at or 0, seq=record.seq
            )
        elif record.kind == "trials_noted":
            notes.append((record.effective_at or 0, TrialsNoted.model_validate(record.body)))
        elif record.kind == "decided":
            decided = Decided.model_validate(record.body)
            requests.setdefault(decided.request, (rows, decided))
        elif record.kind == "controlled" and record.body["refused"] is None and record.body["verb"] in AGAIN:
            ordered = Controlled.model_validate(record.body)
            requests.setdefault(ordered.request, (rows, ordered))
        elif record.kind == "resumed" and record.body.get("actor") is not None:
            requests.clear()
        elif "rest" in record.body and record.effective_at is not None:
            rests[(record.kind, record.effective_at)] = int(record.body["rest"])
    return Earlier(
        attempt=attempt,
        looks=looks,
        answers=answers,
        notes=tuple(notes),
        requests=tuple(sorted(requests.values(), key=lambda item: item[0])),
        rests=rests,
        resolved=resolved,
    )


def _since(session: Session, at_seq: int) -> Iterator[tuple[int, Record]]:
    """Give each record from the checkpoint's on, with the rows that its attempt had trained since the checkpoint."""
    trained: dict[int, int] = {}
    first: int | None = None
    offset = 0
    for record in session.events(include_superseded=True, after=at_seq - 1):
        if first is None:
            first = record.frame_cursor
        if record.kind == "resumed":
            first, offset = record.frame_cursor, trained[record.body["at_seq"]]
        rows = offset + record.frame_cursor - first
        if record.kind == "checkpointed":
            trained[record.seq] = rows
        yield rows, record
