"""Tables of numbers as training logs write them: CSV with any delimiter, quoting and encoding mark, wide or long (MLflow)."""

from __future__ import annotations

import csv
import io
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import IO, Final

from automode.errors import UsageError
from automode.planner.yaml_text import shown

BLANKS: Final = frozenset({"", "none", "null", "na", "n/a", "<na>"})
DELIMITERS: Final = ",;\t|"
LONG: Final = ("key", "value", "step")
"""Columns of a long table, as MLflow exports it: one metric a row."""

TRUE: Final = frozenset({"true", "1", "t", "yes"})


@dataclass(slots=True)
class Column:
    """A column's cells that are not blank: their rows (from 0, strictly rising) and values."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, row: int, value: float) -> None:
        """Append a cell."""
        self.rows.append(row)
        self.values.append(value)


@dataclass(slots=True, kw_only=True)
class Table:
    """What was read: the columns that were asked for, by name, and how many rows there are.

    Attributes:
        columns: Every column's name, in order, whether it was read or not.
        cells: The columns that were read.
        rows: Rows in all.
        lines: Line in the file at which each row begins.
        notes: What a person should know about how it was read.
    """

    columns: tuple[str, ...]
    cells: dict[str, Column] = field(default_factory=dict)
    rows: int = 0
    lines: array[int] = field(default_factory=lambda: array("q"))
    notes: list[str] = field(default_factory=list)


Chooser = Callable[[Sequence[str]], Sequence[str]]
"""Names the columns that are wanted, of those that there are."""


def read_table(name: str, choose: Chooser) -> Table:
    """Read the columns of a file that `choose` names; ``-`` is standard input.

    Args:
        name: The file.
        choose: Gets the names of the columns (for a long table, of its metrics), and returns those to keep.

    Raises:
        UsageError: There is no such file, it is empty, no table, or a cell that is needed is no number; with its line.
    """
    with _text(name) as text:
        try:
            return _read(shown(name, 400), text, choose)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{shown(name, 400)} is no text in UTF-8 (or UTF-16 with its mark): {error}"
            ) from None


@contextmanager
def _text(name: str) -> Iterator[IO[str]]:
    try:
        if name == "-":
            yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
            return
        path = Path(name)
        if path.is_dir():
            raise UsageError(f"{shown(name, 400)} is a folder; name the CSV file in it")
        with path.open("rb") as raw:
            mark = raw.read(2)
        encoding = "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with path.open(encoding=encoding, newline="") as file:
            yield file
    except FileNotFoundError:
        raise UsageError(f"there is no file {shown(name, 400)}") from None
    except OSError as error:
        raise UsageError(f"{shown(name, 400)} cannot be read: {error}") from None


def _read(name: str, text: IO[str], choose: Chooser) -> Table:
    first, skipped = text.readline(), 0
    while first and not first.strip():
        first, skipped = text.readline(), skipped + 1
    if not first:
        raise UsageError(
            f"{name} is empty: a header with column names (`step,loss`) and a row a step are needed"
        )
    delimiter = max(DELIMITERS, key=lambda d: (first.count(d), -DELIMITERS.index(d)))
    reader = csv.reader(_again(first, text), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [cell.strip() for cell in next(reader)]
        _check_header(name, header, skipped + 1)
        rows = _rows(name, reader, header, skipped)
        lowered = [title.lower() for title in header]
        if all(title in lowered for title in LONG):
            return _long(name, header, rows, choose, comma=delimiter == ";")
        return _wide(name, header, rows, choose, comma=delimiter == ";")
    except csv.Error as error:
        raise UsageError(f"{name}, line {skipped + reader.line_num}: no CSV ({error})") from None


def _again(first: str, text: IO[str]) -> Iterator[str]:
    yield first
    yield from text


def _check_header(name: str, header: Sequence[str], line: int) -> None:
    def is_number(cell: str) -> bool:
        try:
            float(cell)
        except ValueError:
            return False
        return True

    if any(is_number(title) for title in header):
        raise UsageError(
            f"{name}, line {line}: column names are needed (such as `step,loss`), but the line holds the numbers "
            f"{shown(', '.join(header), 80)}"
        )


def _rows(
    name: str, reader: Iterator[list[str]], header: Sequence[str], skipped: int
) -> Iterator[tuple[int, list[str]]]:
    """Rows with their lines. One that is too short is refused, unless it is the last: a run may be writing it just now."""
    width = len(header)
    short: tuple[int, int] | None = None
    line = skipped + 1
    for cells in reader:
        line, begins = skipped + reader.line_num, line + 1  # type: ignore[attr-defined]
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        if short is not None:
            raise UsageError(
                f"{name}, line {short[0]}: {width} cells are needed, as in the header, but {short[1]} came"
            )
        if len(cells) > width and any(cell.strip() for cell in cells[width:]):
            raise UsageError(
                f"{name}, line {begins}: {width} cells are needed, as in the header, but {len(cells)} came"
            )
        if len(cells) < width:
            short = (begins, len(cells))
            continue
        yield begins, cells


def _wide(
    name: str, header: Sequence[str], rows: Iterator[tuple[int, list[str]]], choose: Chooser, *, comma: bool
) -> Table:
    table = Table(columns=tuple(header))
    wanted = []
    for title in choose(header):
        if header.count(title) > 1:
            raise UsageError(
                f"{name}: the column `{shown(title)}` stands in the header {header.count(title)} times"
            )
        wanted.append((header.index(title), title, table.cells.setdefault(title, Column())))
    for row, (line, cells) in enumerate(rows):
        table.lines.append(line)
        table.rows = row + 1
        for at, title, column in wanted:
            cell = cells[at].strip()
            if cell and (value := number(name, line, title, cell, comma=comma)) is not None:
                column.add(row, value)
    return table


def _long(
    name: str, header: Sequence[str], rows: Iterator[tuple[int, list[str]]], choose: Chooser, *, comma: bool
) -> Table:
    """One metric a row: each (key, step) becomes a cell of the column `key`; every row here is a row of the table."""
    at = {title.lower(): i for i, title in enumerate(header)}
    key_at, value_at, step_at, nan_at, run_at = (
        at.get(t) for t in ("key", "value", "step", "is_nan", "run_id")
    )
    assert key_at is not None
    assert value_at is not None
    assert step_at is not None
    every: dict[str, Column] = {}
    runs: dict[str, set[str]] = {}
    steps = Column()
    table = Table(columns=())
    for row, (line, cells) in enumerate(rows):
        key = cells[key_at].strip()
        value = number(name, line, "value", cells[value_at].strip(), comma=comma)
        step = number(name, line, "step", cells[step_at].strip(), comma=comma)
        if nan_at is not None and cells[nan_at].strip().lower() in TRUE:
            value = nan
        table.lines.append(line)
        table.rows = row + 1
        if step is not None:
            steps.add(row, step)
        if value is not None:
            every.setdefault(key, Column()).add(row, value)
        if run_at is not None:
            runs.setdefault(key, set()).add(cells[run_at].strip())
    table.columns = ("step", *every)
    for title in choose(table.columns):
        if len(runs.get(title, ())) > 1:
            several = ", ".join(sorted(runs[title])[:5])
            raise UsageError(
                f"{name} holds `{shown(title)}` of {len(runs[title])} runs ({shown(several, 120)}): keep the rows of one run_id"
            )
        table.cells[title] = steps if title == "step" else every[title]
    return table


def number(name: str, line: int, title: str, cell: str, *, comma: bool = False) -> float | None:
    """Read a cell; None for a blank one. NaN and infinity are numbers here.

    Raises:
        UsageError: The cell is no number.
    """
    if cell.lower() in BLANKS:
        return None
    try:
        # float() would take 1_000 for a thousand; a log that holds it is damaged.
        return float("?" if "_" in cell else cell.replace(",", ".") if comma else cell)
    except ValueError:
        raise UsageError(
            f"{name}, line {line}, column `{shown(title)}`: a number is needed, but {shown(repr(cell), 60)} came"
        ) from None
