"""The scheduler's state as plain data, and back, with everything checked on the way in."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from automode.errors import SchedulerError, UsageError
from automode.scheduler.board import Board
from automode.scheduler.decisions import decode_value, encode_value
from automode.scheduler.ladder import Ladder
from automode.scheduler.rung import Entry
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
        raise SchedulerError(f"the scheduler state contradicts itself: {what}")


def _load_trials(board: Board, columns: TrialState) -> None:
    rows = list(
        _rows(
            columns.status,
            columns.rung,
            columns.target,
            columns.origin,
            columns.attempt,
            columns.held,
            what="trials",
        )
    )
    candidates = board.settings.candidates
    _require(candidates is None or len(rows) <= candidates, f"{len(rows)} trials of {candidates} candidates")
    names = {status.value: status for status in Status}
    for number, (name, rung, target, origin, attempt, held) in enumerate(rows):
        first = board.assign(number)
        _require(name in names, f"trial {number} has the unknown status {name!r}")
        _require(first <= target <= board.ladder.top, f"trial {number} goes to rung {target}")
        status = names[name]
        before = target - 1 if target > first else -1
        expected = {before} if status in IN_FLIGHT else {before, target} if status in WITHDRAWN else {target}
        _require(rung in expected, f"trial {number} is {name} at rung {rung} with target {target}")
        origins = {0, board.ladder.levels[target - 1]} if target > first else {0}
        _require(origin in origins, f"trial {number} starts its segment from {origin}")
        _require(1 <= attempt <= board.settings.max_attempts, f"trial {number} has attempt {attempt}")
        _require(0 <= held < 1 << (board.ladder.top + 1), f"trial {number} holds checkpoints {held:b}")
        trial = Trial(
            bracket=first, status=status, rung=rung, target=target, origin=origin, attempt=attempt, held=held
        )
        board.trials.append(trial)
        if status in IN_FLIGHT:
            board.brackets[first].depart(target)
            board.in_flight += 1


def _load_reports(board: Board, brackets: list[list[ReportState]]) -> None:
    _require(len(brackets) == len(board.brackets), f"{len(brackets)} brackets")
    seen: set[int] = set()
    for bracket, columns in zip(board.brackets, brackets, strict=True):
        _require(len(columns) == len(bracket.rungs), f"{len(columns)} rungs in bracket {bracket.first}")
        for index, (rung, column) in enumerate(zip(bracket.rungs, columns, strict=True), start=bracket.first):
            rows = _rows(
                column.trial, column.value, column.seq, column.attempt, column.promoted, what="reports"
            )
            for number, encoded, seq, attempt, promoted in rows:
                where = f"trial {number} at {rung.level}"
                _require(
                    0 <= number < len(board.trials) and number not in rung.entries,
                    f"{where} is unknown or double",
                )
                trial = board.trials[number]
                _require(
                    trial.bracket == bracket.first and trial.status not in WITHDRAWN,
                    f"{where} is not its place",
                )
                _require(1 <= seq <= board.seq and seq not in seen, f"{where} has the sequence number {seq}")
                _require(index <= trial.rung and promoted == (index < trial.target), f"{where} is misplaced")
                seen.add(seq)
                value = decode_value(encoded)
                rung.record(
                    number, board.loss(value), Entry(value=value, seq=seq, attempt=attempt, promoted=promoted)
                )
                _require(
                    not promoted or rung.rank(number) is not None,
                    f"{where} was promoted without a finite value",
                )
    for number, trial in enumerate(board.trials):
        if trial.status not in WITHDRAWN:
            reports = [number in rung.entries for rung in board.brackets[trial.bracket].rungs]
            count = max(0, trial.rung - trial.bracket + 1)
            _require(
                sum(reports) == count, f"trial {number} has {sum(reports)} reports and should have {count}"
            )


def _load_retries(board: Board, retries: list[int]) -> None:
    queued = sorted(number for number, trial in enumerate(board.trials) if trial.status is Status.QUEUED)
    _require(sorted(retries) == queued, f"the retries {sorted(retries)} are not the queued trials {queued}")
    board.retries.extend(retries)


def _rows(*columns: list[Any], what: str) -> zip[tuple[Any, ...]]:
    lengths = {len(column) for column in columns}
    _require(len(lengths) == 1, f"the columns of its {what} have different lengths")
    return zip(*columns, strict=True)
