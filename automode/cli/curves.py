"""A loss curve from a log: rows in the order of their steps, each step once, beside what else was logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from automode.cli.curve_columns import Names, find_columns
from automode.cli.curve_table import Column, Table, read_table
from automode.errors import UsageError
from automode.planner.yaml_text import shown

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]

LARGEST_STEP: Final = 2**53
GAP: Final = 10
"""Missing rows that are worth a note."""

MOSTLY: Final = 0.95
"""Share of the rows that must hold a gradient norm before a blank one counts as NaN."""


@dataclass(slots=True, kw_only=True)
class Curve:
    """A loss curve, ready for the planner.

    Attributes:
        steps: Step of each row, strictly rising.
        loss: Raw losses; NaN and infinity as they were logged.
        grad_norm: Gradient norms; None where too few were logged.
        lr: Learning rates; None where none was logged.
        stride: Steps from one row to the next (the median).
        loss_name: The column that was read as the loss.
        notes: What a person should know about how the log was read.
    """

    steps: Steps
    loss: Floats
    grad_norm: Floats | None
    lr: Floats | None
    stride: int
    loss_name: str
    notes: list[str] = field(default_factory=list)


def load_curve(name: str, loss: str | None = None) -> Curve:
    """Read a loss curve from a CSV file (``-``: standard input) or from TensorBoard's event files.

    Args:
        name: The file, or a folder of event files.
        loss: The column (or tag) that is the loss; None: it is found by its name.

    Raises:
        UsageError: It cannot be read as a loss curve; the message says why, and where.
    """
    found: list[Names] = []

    def choose(columns: Sequence[str]) -> Sequence[str]:
        found.append(find_columns(shown(name, 400), columns, loss))
        return found[0].all()

    path = Path(name)
    if name != "-" and ("tfevents" in path.name or (path.is_dir() and any(path.glob("*tfevents*")))):
        from automode.cli.event_files import read_events

        table = read_events(path, choose)
    else:
        table = read_table(name, choose)
    return assemble(shown(name, 400), table, found[0])


def assemble(name: str, table: Table, names: Names) -> Curve:
    """Bring a table's rows into the order of their steps, and merge what was logged in rows of its own.

    Raises:
        UsageError: There is no loss in it, or a row with a loss has no step, or one that is no whole number.
    """
    notes = list(table.notes)
    losses = table.cells[names.loss]
    if not table.rows:
        raise UsageError(f"{name} holds column names and no rows: nothing has been logged yet")
    if not losses.rows and not (names.own and table.rows):
        raise UsageError(
            f"{name}: the column `{shown(names.loss)}` holds no number in any of its {table.rows} rows"
        )
    at = _steps(name, table, names, notes)
    loss = _spread(losses, table.rows)
    logged = _mask(losses, table.rows)
    if names.own:
        _blank_losses(logged, at >= 0, notes)
    rows = np.flatnonzero(logged)
    stepless = rows[at[rows] < 0]
    if stepless.size:
        raise UsageError(
            f"{name}, line {table.lines[stepless[0]]}: a loss without a step, in a log whose other rows have one"
        )
    rows = _in_order(at, rows, notes)
    steps = at[rows]
    stride = max(1, int(np.median(np.diff(steps)))) if len(steps) > 1 else 1
    _note_gaps(steps, stride, notes)
    return Curve(
        steps=steps,
        loss=loss[rows],
        grad_norm=_norms(table, names, at, rows, notes),
        lr=None if names.lr is None else _carried(table.cells[names.lr], at, steps),
        stride=stride,
        loss_name=names.loss,
        notes=notes,
    )


def _spread(column: Column, n: int) -> Floats:
    """A column over all rows, blank cells as NaN."""
    values = np.full(n, np.nan)
    values[_indices(column)] = np.frombuffer(column.values) if column.values else []
    return values


def _mask(column: Column, n: int) -> NDArray[np.bool_]:
    mask = np.zeros(n, dtype=bool)
    mask[_indices(column)] = True
    return mask


def _indices(column: Column) -> Steps:
    return np.frombuffer(column.rows, dtype=np.int64) if column.rows else np.empty(0, dtype=np.int64)


def _steps(name: str, table: Table, names: Names, notes: list[str]) -> Steps:
    """The step of every row; -1 where none was logged."""
    column = None if names.step is None else table.cells[names.step]
    if column is None or not column.rows:
        notes.append("no column of steps: rows are counted")
        return np.arange(table.rows, dtype=np.int64)
    raw = _spread(column, table.rows)
    there = np.isfinite(raw)
    wrong = np.flatnonzero(
        _mask(column, table.rows) & ~(there & (raw == np.floor(raw)) & (abs(raw) < LARGEST_STEP) & (raw >= 0))
    )
    if wrong.size:
        row = int(wrong[0])
        raise UsageError(
            f"{name}, line {table.lines[row]}, column `{shown(str(names.step))}`: a step is a whole number from 0, but "
            f"{raw[row]:g} came"
        )
    steps = np.full(table.rows, -1, dtype=np.int64)
    steps[there] = raw[there].astype(np.int64)
    epochs = None if names.epoch is None else _spread(table.cells[names.epoch], table.rows)
    return _counted_on(steps, np.flatnonzero(there), epochs, notes)


def _counted_on(steps: Steps, rows: Steps, epochs: Floats | None, notes: list[str]) -> Steps:
    """Steps that begin anew with every epoch are counted on: 0..99, 0..99 becomes 0..199."""
    known = steps[rows]
    back = np.flatnonzero(np.diff(known) < 0) + 1
    if not back.size or not (known[back] == known.min()).all():
        return steps
    risen = False
    if epochs is not None:
        before, after = epochs[rows[back - 1]], epochs[rows[back]]
        risen = bool((after > before).all())
    if back.size < 2 and not risen:
        return steps
    offset = np.zeros(len(known), dtype=np.int64)
    stride = max(1, int(np.median(np.diff(known)[np.diff(known) > 0]))) if (np.diff(known) > 0).any() else 1
    for i in back:
        offset[i:] = known[i - 1] + offset[i - 1] + stride - known[i]
    steps[rows] = known + offset
    notes.append(f"steps begin anew {back.size} times (they count within epochs): they are counted on")
    return steps


def _blank_losses(logged: NDArray[np.bool_], with_step: NDArray[np.bool_], notes: list[str]) -> None:
    """In a file of nothing but steps and losses, a row without a loss has one that is NaN: pandas writes NaN as nothing."""
    blank = with_step & ~logged
    if blank.any():
        notes.append(f"rows with a step and no loss, read as NaN: {int(blank.sum())}")
        logged |= blank


def _in_order(at: Steps, rows: Steps, notes: list[str]) -> Steps:
    """Rows by step; of a step that occurs again, as in the log of a resumed run, the last row counts."""
    order = rows[np.argsort(at[rows], kind="stable")]
    steps = at[order]
    last = np.ones(len(steps), dtype=bool)
    last[:-1] = steps[1:] != steps[:-1]
    again = len(order) - int(last.sum())
    if again:
        notes.append(
            f"rows whose step comes again later (a resumed run?): {again}; the last row of each step counts"
        )
    elif (np.diff(rows[np.argsort(at[rows], kind="stable")]) < 0).any():
        notes.append("the rows were not in the order of their steps: sorted")
    kept: Steps = order[last]
    return kept


def _note_gaps(steps: Steps, stride: int, notes: list[str]) -> None:
    gaps = np.flatnonzero(np.diff(steps) > GAP * stride)
    if gaps.size:
        first = int(gaps[0])
        more = f", and {gaps.size - 1} more gaps" if gaps.size > 1 else ""
        notes.append(
            f"no rows between step {steps[first]} and step {steps[first + 1]}{more}: signals go on across them"
        )


def _norms(table: Table, names: Names, at: Steps, rows: Steps, notes: list[str]) -> Floats | None:
    if names.grad_norm is None:
        return None
    column = table.cells[names.grad_norm]
    held = _indices(column)
    exact = np.isin(at[rows], at[held])
    if 2 * int(exact.sum()) < len(rows):
        notes.append(
            f"`{shown(names.grad_norm)}` stands in too few rows to be used ({int(exact.sum())} of {len(rows)})"
        )
        return None
    values = _carried(column, at, at[rows])
    assert values is not None
    if names.own and exact.mean() >= MOSTLY and not exact.all():
        notes.append(f"{int((~exact).sum())} rows have no gradient norm where the others do: read as NaN")
        values[~exact] = np.nan
    return values


def _carried(column: Column, at: Steps, steps: Steps) -> Floats | None:
    """The last value logged up to each step; before the first one, the first. Its rows may be other ones than the loss's."""
    rows = _indices(column)
    rows = rows[at[rows] >= 0]
    if not rows.size:
        return None
    values = np.frombuffer(column.values)[np.searchsorted(_indices(column), rows)]
    order = np.argsort(at[rows], kind="stable")
    place = np.searchsorted(at[rows][order], steps, side="right") - 1
    return np.asarray(values[order][np.maximum(place, 0)])
