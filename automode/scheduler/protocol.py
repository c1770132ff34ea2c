"""The protocol's fences: which reports and failures count, which are ignored, which are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import SupportsFloat

from automode.errors import SchedulerError, UsageError
from automode.scheduler.board import Board
from automode.scheduler.decisions import Ignored, encode_value
from automode.scheduler.ladder import whole
from automode.scheduler.rung import Entry, Value
from automode.scheduler.trials import IN_FLIGHT, WITHDRAWN, Status, Trial


def metric(value: object) -> Value:
    """Take a reported metric: a number of any kind (numpy and tensor scalars too), or ``None``.

    Raises:
        UsageError: It is no number.
    """
    if value is None or type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise UsageError(f"value is {value!r}, but must be a number or None: report the metric as a float")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"value is {value!r}, which does not fit into a float: report the metric as one"
        ) from error


def known(board: Board, trial: object) -> Trial:
    """Look a trial up.

    Raises:
        SchedulerError: It was never started.
        UsageError: It is no whole number.
    """
    number = whole("trial", trial, least=0)
    if number >= len(board.trials):
        raise SchedulerError(f"trial {number} was never started: {len(board.trials)} were, counted from 0")
    return board.trials[number]


def screen_report(
    board: Board, trial: int, resource: int, value: Value, attempt: int | None
) -> Ignored | None:
    """Judge a report by the key (trial, rung, attempt); ``None`` means that it counts.

    Raises:
        SchedulerError: It answers no job that was issued, or contradicts an earlier report.
    """
    record = known(board, trial)
    if attempt is not None:
        attempt = whole("attempt", attempt, least=1)

    def ignored(reason: str) -> Ignored:
        return Ignored(trial=trial, resource=resource, attempt=attempt, reason=reason)

    if board.cancelled:
        return ignored("the scheduler was cancelled")
    if record.status in WITHDRAWN:
        return ignored(f"trial {trial} is {record.status.value}")
    if record.status in IN_FLIGHT:
        target = board.ladder.levels[record.target]
        if resource == target:
            return _fence(record, trial, resource, attempt)
        if record.origin < resource < target:
            return ignored(
                f"{resource} lies between the rungs: an intermediate value is a log, not a rung's value"
            )
    return _repeated(board, record, trial, resource, value, attempt)


def _fence(record: Trial, trial: int, resource: int, attempt: int | None) -> Ignored | None:
    queued = record.status is Status.QUEUED
    issued = record.attempt - 1 if queued else record.attempt
    if attempt is not None and attempt > issued:
        raise _never_issued(trial, resource, attempt, issued)
    if queued or (attempt is not None and attempt < issued):
        reason = (
            f"trial {trial} to {resource}: attempt {attempt or issued} was declared failed before it reported"
        )
        return Ignored(trial=trial, resource=resource, attempt=attempt, reason=reason)
    return None


def _repeated(
    board: Board, record: Trial, trial: int, resource: int, value: Value, attempt: int | None
) -> Ignored:
    entry = _entry(board, record, trial, resource)
    if entry is None:
        if record.status in IN_FLIGHT:
            state = f"its segment runs from {record.origin} to {board.ladder.levels[record.target]}"
        else:
            state = f"it is {record.status.value} at {board.ladder.levels[record.rung]}"
        raise SchedulerError(
            f"trial {trial} reported at {resource}, but {state}: evaluate exactly at the job's to_resource"
        )
    if attempt is not None and attempt > entry.attempt:
        raise _never_issued(trial, resource, attempt, entry.attempt)
    if attempt is not None and attempt < entry.attempt:
        reason = f"trial {trial} to {resource}: attempt {attempt} was declared failed before it reported"
    elif encode_value(value) == encode_value(entry.value):
        reason = f"trial {trial} to {resource}: the same value was reported before"
    else:
        raise SchedulerError(
            f"trial {trial} to {resource}, attempt {entry.attempt}: {value} was reported after {entry.value};"
            " one segment has one value"
        )
    return Ignored(trial=trial, resource=resource, attempt=attempt, reason=reason)


def screen_failure(
    board: Board, trial: int, attempt: int | None, resource: int | None = None
) -> Ignored | None:
    """Judge a failure message by the same key; ``None`` means that it counts.

    Raises:
        SchedulerError: It answers no job that was issued.
    """
    record = known(board, trial)
    if attempt is not None:
        attempt = whole("attempt", attempt, least=1)
    target = board.ladder.levels[record.target]
    if resource is not None:
        resource = whole("resource", resource, least=1)

    def ignored(reason: str) -> Ignored:
        return Ignored(trial=trial, resource=resource or target, attempt=attempt, reason=reason)

    if board.cancelled:
        return ignored("the scheduler was cancelled")
    if record.status in WITHDRAWN:
        return ignored(f"trial {trial} is {record.status.value}")
    if resource is not None and resource != target:
        return _failed_before(board, record, trial, resource, attempt, ignored)
    issued = record.attempt - 1 if record.status is Status.QUEUED else record.attempt
    if attempt is not None and attempt > issued:
        raise _never_issued(trial, target, attempt, issued)
    if record.status is Status.RUNNING:
        if attempt is None or attempt == issued:
            return None
        return ignored(f"trial {trial} to {target}: attempt {attempt} was declared failed already")
    if record.status is Status.QUEUED:
        return ignored(
            f"trial {trial} to {target}: the failure is known and the segment waits for another try"
        )
    if attempt is None:
        raise SchedulerError(
            f"trial {trial} is {record.status.value}: no segment of it is in flight that could fail"
        )
    return ignored(f"trial {trial} to {target}: its value was reported before the failure")


def _failed_before(
    board: Board,
    record: Trial,
    trial: int,
    resource: int,
    attempt: int | None,
    ignored: Callable[[str], Ignored],
) -> Ignored:
    entry = _entry(board, record, trial, resource)
    if entry is None:
        raise SchedulerError(
            f"trial {trial} has no segment that ends at {resource}: nothing there could fail"
        )
    if attempt is not None and attempt > entry.attempt:
        raise _never_issued(trial, resource, attempt, entry.attempt)
    return ignored(f"trial {trial} to {resource}: its value was reported before the failure")


def _entry(board: Board, record: Trial, trial: int, resource: int) -> Entry | None:
    index = board.ladder.rung_of(resource)
    bracket = board.brackets[record.bracket]
    return None if index is None or index < bracket.first else bracket.rung(index).entries.get(trial)


def _never_issued(trial: int, resource: int, attempt: int, issued: int) -> SchedulerError:
    return SchedulerError(
        f"trial {trial} to {resource}: attempt {attempt} was never issued, the latest is {issued}"
    )
