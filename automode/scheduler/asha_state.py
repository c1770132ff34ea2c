"""The scheduler's state as plain data, and back, with everything checked on the way in."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from automode.errors import SchedulerError, UsageError
from automode.scheduler.board import Board
from automode.scheduler.bracket import Bracket
from automode.scheduler.decisions import decode_value, encode_value
from automode.scheduler.ladder import Ladder
from automode.scheduler.rung import Entry, is_usable
from automode.scheduler.settings import Settings
from automode.scheduler.trials import IN_FLIGHT, WITHDRAWN, Status, Trial


class ReportState(BaseModel):
    """One rung's reports, as columns."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    trial: list[int]
    value: list[float | Literal["nan", "inf", "-inf"] | None]
    seq: list[int]
    attempt: list[int]
    promoted: list[bool]


class TrialState(BaseModel):
    """All trials, as columns."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    status: list[str]
    rung: list[int]
    target: list[int]
    origin: list[int]
    attempt: list[int]
    held: list[int]


class AshaState(BaseModel):
    """Everything that an ASHA knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1]
    min_resource: int
    max_resource: int
    reduction_factor: int
    mode: Literal["min", "max"]
    candidates: int | None
    seed: int
    quota: bool
    brackets: int
    max_attempts: int
    budget: int | None
    seq: int
    spent: int
    unusable: int
    closed: bool
    cancelled: bool
    chain: str
    retries: list[int]
    trials: TrialState
    reports: list[list[ReportState]]


def dump(board: Board) -> dict[str, Any]:
    """Give a board as data that strict JSON can hold; equal boards give equal data."""
    settings = board.settings
    return {
        "version": 1,
        "min_resource": settings.ladder.min_resource,
        "max_resource": settings.ladder.max_resource,
        "reduction_factor": settings.ladder.reduction_factor,
        "mode": settings.mode,
        "candidates": settings.candidates,
        "seed": settings.seed,
        "quota": settings.quota,
        "brackets": settings.brackets,
        "max_attempts": settings.max_attempts,
        "budget": settings.budget,
        "seq": board.seq,
        "spent": board.spent,
        "unusable": board.unusable,
        "closed": board.closed,
        "cancelled": board.cancelled,
        "chain": board.chain.hex(),
        "retries": list(board.retries),
        "trials": {
            "status": [trial.status.value for trial in board.trials],
            "rung": [trial.rung for trial in board.trials],
            "target": [trial.target for trial in board.trials],
            "origin": [trial.origin for trial in board.trials],
            "attempt": [trial.attempt for trial in board.trials],
            "held": [trial.held for trial in board.trials],
        },
        "reports": [
            [
                {
                    "trial": list(rung.entries),
                    "value": [encode_value(entry.value) for entry in rung.entries.values()],
                    "seq": [entry.seq for entry in rung.entries.values()],
                    "attempt": [entry.attempt for entry in rung.entries.values()],
                    "promoted": [entry.promoted for entry in rung.entries.values()],
                }
                for rung in bracket.rungs
            ]
            for bracket in board.brackets
        ],
    }


def load(data: object) -> Board:
    """Rebuild a board from :func:`dump`.

    Raises:
        SchedulerError: The data is of another shape or version, or contradicts itself.
    """
    try:
        state = AshaState.model_validate(data)
        board = Board(
            Settings(
                ladder=Ladder(state.min_resource, state.max_resource, state.reduction_factor),
                mode=state.mode,
                candidates=state.candidates,
                seed=state.seed,
                quota=state.quota,
                brackets=state.brackets,
                max_attempts=state.max_attempts,
                budget=state.budget,
            )
        )
        board.chain = bytes.fromhex(state.chain)
    except (ValidationError, UsageError, ValueError) as error:
        raise SchedulerError(f"this is no scheduler state that this version can read: {error}") from error
    board.seq, board.spent, board.unusable = state.seq, state.spent, state.unusable
    board.closed, board.cancelled = state.closed, state.cancelled
    _load_trials(board, state.trials)
    _load_reports(board, state.reports)
    _load_retries(board, state.retries)
    return board


def _require(held: bool, what: str) -> None:
    if not held:
        raise _contradiction(what)


def _contradiction(what: str) -> SchedulerError:
    return SchedulerError(f"the scheduler state contradicts itself: {what}")


def _load_trials(board: Board, columns: TrialState) -> None:
    names = {status.value: status for status in Status}
    candidates = board.settings.candidates
    _require(
        candidates is None or len(columns.status) <= candidates,
        f"{len(columns.status)} trials of {candidates} candidates",
    )
    rows = _rows(
        columns.status,
        columns.rung,
        columns.target,
        columns.origin,
        columns.attempt,
        columns.held,
        what="trials",
    )
    for number, (name, rung, target, origin, attempt, held) in enumerate(rows):
        if name not in names:
            raise _contradiction(f"trial {number} has the unknown status {name!r}")
        bracket, status = board.assign(number), names[name]
        trial = Trial(
            bracket=bracket,
            status=status,
            rung=rung,
            target=target,
            origin=origin,
            attempt=attempt,
            held=held,
        )
        problem = _trial_problem(board, trial)
        if problem is not None:
            raise _contradiction(f"trial {number} is {name} and {problem}")
        board.trials.append(trial)
        if status in IN_FLIGHT:
            board.brackets[bracket].depart(target)
            board.in_flight += 1


def _trial_problem(board: Board, trial: Trial) -> str | None:
    """Say what cannot be about a trial taken by itself."""
    first, top, target, status = trial.bracket, board.ladder.top, trial.target, trial.status
    if not first <= target <= top:
        return f"goes to rung {target}"
    if status in (Status.PAUSED, Status.FINISHED) and (status is Status.FINISHED) != (target == top):
        return f"has target {target} of {top}"
    before = target - 1 if target > first else -1
    if not (
        (trial.rung == before and (status in IN_FLIGHT or status in WITHDRAWN))
        or (trial.rung == target and status not in IN_FLIGHT)
    ):
        return f"stands at rung {trial.rung} with target {target}"
    if trial.origin != 0 and (target == first or trial.origin != board.ladder.levels[target - 1]):
        return f"starts its segment from {trial.origin}"
    if not 1 <= trial.attempt <= board.settings.max_attempts:
        return f"has attempt {trial.attempt}"
    if not 0 <= trial.held < 1 << (top + 1):
        return f"holds checkpoints {trial.held:b}"
    return None


def _load_reports(board: Board, brackets: list[list[ReportState]]) -> None:
    _require(len(brackets) == len(board.brackets), f"{len(brackets)} brackets")
    seen: set[int] = set()
    counts = [0] * len(board.trials)
    for bracket, columns in zip(board.brackets, brackets, strict=True):
        _require(len(columns) == len(bracket.rungs), f"{len(columns)} rungs in bracket {bracket.first}")
        for index, (rung, column) in enumerate(zip(bracket.rungs, columns, strict=True), start=bracket.first):
            rows = _rows(
                column.trial, column.value, column.seq, column.attempt, column.promoted, what="reports"
            )
            for number, encoded, seq, attempt, promoted in rows:
                value = decode_value(encoded)
                entry = Entry(value=value, seq=seq, attempt=attempt, promoted=promoted)
                problem = _report_problem(board, bracket, index, number, entry)
                if problem is not None or seq in seen:
                    raise _contradiction(f"trial {number} at {rung.level} {problem or 'has a number twice'}")
                seen.add(seq)
                counts[number] += 1
                rung.record(number, board.loss(value), entry)
    for number, (trial, count) in enumerate(zip(board.trials, counts, strict=True)):
        wanted = 0 if trial.status in WITHDRAWN else max(0, trial.rung - trial.bracket + 1)
        if count != wanted:
            raise _contradiction(f"trial {number} has {count} reports and should have {wanted}")


def _report_problem(board: Board, bracket: Bracket, index: int, number: int, entry: Entry) -> str | None:
    """Say what cannot be about a report, the trials being known already."""
    if not 0 <= number < len(board.trials) or number in bracket.rung(index).entries:
        return "is unknown or double"
    trial = board.trials[number]
    if trial.bracket != bracket.first or trial.status in WITHDRAWN:
        return "is not its place"
    if not (1 <= entry.seq <= board.seq and 1 <= entry.attempt <= board.settings.max_attempts):
        return f"has the sequence number {entry.seq} and attempt {entry.attempt}"
    if index > trial.rung or entry.promoted != (index < trial.target):
        return "is misplaced"
    diverged = trial.status is Status.DIVERGED and index == trial.rung
    if is_usable(entry.value) == diverged:
        return f"reported {entry.value} and {'diverged' if diverged else 'went on'}"
    return None


def _load_retries(board: Board, retries: list[int]) -> None:
    queued = sorted(number for number, trial in enumerate(board.trials) if trial.status is Status.QUEUED)
    _require(sorted(retries) == queued, f"the retries {sorted(retries)} are not the queued trials {queued}")
    board.retries.extend(retries)


def _rows(*columns: list[Any], what: str) -> zip[tuple[Any, ...]]:
    lengths = {len(column) for column in columns}
    _require(len(lengths) == 1, f"the columns of its {what} have different lengths")
    return zip(*columns, strict=True)
