"""A run's scalars as CSV, beside its database: for spreadsheets, and for whatever reads Lightning's or W&B's."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

FIRST = ("step", "row")
"""Columns that every file begins with: the step, and for a step's own scalars the number of its row, from 0."""


class CsvLog:
    """Appends rows to a CSV file; a column that comes late is added, and rows that lack it have an empty cell.

    Args:
        path: The file. What it holds already is kept up to the place where the run goes on.
        after_step: Rows of later steps are of an attempt that was cut, and are dropped.
        after_row: Rows with this number and later ones likewise.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, after_step: int = 0, after_row: int = 0) -> None:
        self.path = Path(path)
        self._columns: list[str] = list(FIRST)
        kept: list[dict[str, str]] = []
        if self.path.is_file():
            with self.path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    if row.get("row"):
                        if int(float(row["row"])) < after_row:
                            kept.append(row)
                    elif row.get("step") and float(row["step"]) <= after_step:
                        kept.append(row)
            for row in kept:
                self._columns += [name for name in row if name is not None and name not in self._columns]
        self._file = self._rewritten(kept)

    def log_block(self, names: Sequence[str], rows: Sequence[Sequence[float]], steps: Sequence[int]) -> None:
        """Append rows.

        Args:
            names: Columns, without ``step``.
            rows: One a step, as long as ``names``.
            steps: The step of each.

        Raises:
            OSError: The file cannot be written.
        """
        self._widen(names)
        places = [self._columns.index(name) for name in names]
        lines = []
        for step, row in zip(steps, rows, strict=True):
            cells = [""] * len(self._columns)
            cells[0] = str(step)
            for place, value in zip(places, row, strict=True):
                cells[place] = _cell(value)
            lines.append(cells)
        csv.writer(self._file, lineterminator="\n").writerows(lines)
        self._file.flush()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row.

        Raises:
            OSError: The file cannot be written.
        """
        numbers = {name: value for name, value in metrics.items() if name not in FIRST}
        self.log_block(list(numbers), [[float(value) for value in numbers.values()]], [step or 0])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _widen(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._columns]
        if not new:
            return
        self._file.close()
        with self.path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self._columns += new
        self._file = self._rewritten(rows)

    def _rewritten(self, rows: list[dict[str, str]]) -> TextIO:
        """Write the file anew, whole or not at all, and open it for appending."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".tmp")
        with fresh.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self._columns)
            writer.writerows([row.get(name) or "" for name in self._columns] for row in rows)
        fresh.replace(self.path)
        return self.path.open("a", encoding="utf-8", newline="")


def _cell(value: float) -> str:
    return (
        str(int(value))
        if value == value and abs(value) < 2**53 and value == int(value)
        else repr(float(value))
    )
