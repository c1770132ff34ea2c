"""Tables as files that people and other tools read: CSV, JSON, and Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from automode.errors import NotExecutableError, UsageError

ExportFormat = Literal["csv", "json", "parquet"]
Table = Mapping[str, Sequence[Any]]
"""Columns by name, all of one length; None where a value is not known."""


def format_of(path: str | os.PathLike[str], file_format: str | None = None) -> ExportFormat:
    """Give the format that is asked for, else that of the file's ending.

    Raises:
        UsageError: It is none of those that are known.
        NotExecutableError: Parquet without pyarrow.
    """
    named = file_format or Path(path).suffix.removeprefix(".").lower()
    for known in get_args(ExportFormat):
        if known == named:
            if known == "parquet" and importlib.util.find_spec("pyarrow") is None:
                raise NotExecutableError(
                    "writing Parquet needs pyarrow, which is not installed; install it or write csv or json"
                )
            return known  # type: ignore[no-any-return]
    raise UsageError(f"the format is {named!r}, but must be csv, json or parquet")


def write_table(
    path: str | os.PathLike[str], table: Table, file_format: str | None = None, *, overwrite: bool = False
) -> Path:
    """Write a table to a file, whole or not at all.

    Args:
        path: File to write; its folder must exist.
        table: The columns.
        file_format: ``csv``, ``json`` (a list of objects) or ``parquet``. None: by the file's ending.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The path written. What is unknown is empty in CSV and null elsewhere.

    Raises:
        UsageError: Unknown format, the file exists, or it cannot be written.
        NotExecutableError: Parquet without pyarrow.
    """
    path = Path(path)
    chosen = format_of(path, file_format)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; name another file or ask for it to be overwritten")
    partial = path.with_name(path.name + ".partial")
    try:
        if chosen == "parquet":
            arrow = importlib.import_module("pyarrow")
            columns = {name: list(values) for name, values in table.items()}
            importlib.import_module("pyarrow.parquet").write_table(arrow.table(columns), partial)
        else:
            partial.write_text(table_text(table, chosen), encoding="utf-8", newline="")
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    return path


def table_text(table: Table, file_format: Literal["csv", "json"]) -> str:
    """Return a table as text: CSV with a header, or JSON as a list of objects."""
    rows = zip(*table.values(), strict=True)
    if file_format == "json":
        return json.dumps([dict(zip(table, row, strict=True)) for row in rows])
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(table)
    writer.writerows(rows)
    return text.getvalue()
