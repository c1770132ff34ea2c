"""Read scalar columns back from their blocks."""

from __future__ import annotations

import difflib
import sqlite3
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from automode.errors import SessionCorruptError, UsageError
from automode.session.blocks import decode
from automode.session.records import TRUNK, load_json

ROW = "row"
ATTEMPT = "attempt"
_PAGE = 64

Span = tuple[int, int]
Schemas = dict[int, tuple[tuple[str, ...], str]]
Block = tuple[int, int, tuple[str, ...], NDArray[np.float64]]


def schemas(connection: sqlite3.Connection) -> Schemas:
    """Column names of every schema, parsed and as stored."""
    return {
        number: (tuple(load_json(text)), text)
        for number, text in connection.execute("SELECT id, names FROM schemas")
    }


def end_row(connection: sqlite3.Connection, stream: str) -> int:
    """Rows of ``stream`` on disk, superseded ones included."""
    query = "SELECT first_row + rows FROM blocks WHERE stream = ? ORDER BY first_row DESC LIMIT 1"
    row = connection.execute(query, (stream,)).fetchone()
    return 0 if row is None else int(row[0])


def dead_spans(connection: sqlite3.Connection, stream: str) -> list[Span]:
    """Superseded rows as ascending half-open ranges that do not touch."""
    query = "SELECT first_row, end_row FROM dead_rows WHERE stream = ? ORDER BY first_row, end_row"
    spans: list[Span] = []
    for first, end in connection.execute(query, (stream,)):
        if spans and first <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((first, end))
    return spans


def live_spans(dead: list[Span], end: int) -> list[Span]:
    """What ``dead`` leaves of rows 0 to ``end``."""
    spans: list[Span] = []
    start = 0
    for first, stop in [*dead, (end, end)]:
        if start < min(first, end):
            spans.append((start, min(first, end)))
        start = stop
    return spans


def count(connection: sqlite3.Connection, stream: str, *, include_superseded: bool) -> int:
    """Rows of ``stream``."""
    end = end_row(connection, stream)
    if include_superseded:
        return end
    return sum(stop - start for start, stop in live_spans(dead_spans(connection, stream), end))


def blocks(
    connection: sqlite3.Connection, stream: str, known: Schemas, first: int, limit: int
) -> Iterator[Block]:
    """Up to ``limit`` blocks from the one that holds row ``first`` on: first row, attempt, names, values.

    Raises:
        SessionCorruptError: A block is damaged, missing, or of an unknown schema.
    """
    query = (
        "SELECT first_row, rows, attempt, schema, crc, data FROM blocks WHERE stream = ? AND first_row >= "
        "(SELECT coalesce(max(first_row), 0) FROM blocks WHERE stream = ? AND first_row <= ?) "
        "ORDER BY first_row LIMIT ?"
    )
    expected: int | None = None
    for start, rows, attempt, schema, crc, data in connection.execute(query, (stream, stream, first, limit)):
        if start > first if expected is None else start != expected:
            raise SessionCorruptError(f"rows of stream {stream!r} are missing before row {start}")
        if schema not in known:
            raise SessionCorruptError(
                f"block of stream {stream!r} at row {start} has the unknown schema {schema}"
            )
        names, text = known[schema]
        yield start, attempt, names, decode((stream, start, rows, attempt, crc, data), names, text)
        expected = start + rows


def read(
    connection: sqlite3.Connection,
    stream: str,
    names: tuple[str, ...] | None,
    *,
    include_superseded: bool,
) -> dict[str, NDArray[np.float64]]:
    """Columns of a stream (all, if ``names`` is None), NaN where a row's schema lacked them.

    Raises:
        UsageError: There is no such stream or column.
        SessionCorruptError: A block is damaged.
    """
    end = end_row(connection, stream)
    if end == 0 and stream != TRUNK:
        known = [row[0] for row in connection.execute("SELECT DISTINCT stream FROM blocks")]
        raise UsageError(f"there is no stream {stream!r}{_hint(stream, known)}")
    table = schemas(connection)
    present = _columns(connection, stream, table)
    wanted = tuple(present) if names is None else names
    for name in wanted:
        if name not in present and end > 0:
            raise UsageError(f"stream {stream!r} has no column {name!r}{_hint(name, list(present))}")
    result = {name: np.full(end, np.nan) for name in wanted}
    for start, attempt, columns, values in blocks(connection, stream, table, 0, -1):
        stop = start + len(values)
        where = {name: i for i, name in enumerate(columns)}
        for name, out in result.items():
            if name in where:
                out[start:stop] = values[:, where[name]]
            elif name == ROW:
                out[start:stop] = np.arange(start, stop)
            elif name == ATTEMPT:
                out[start:stop] = attempt
    if include_superseded:
        return result
    live = live_spans(dead_spans(connection, stream), end)
    if live == [(0, end)] or end == 0:
        return result
    parts = [slice(*span) for span in live]
    return {
        name: np.concatenate([values[part] for part in parts]) if parts else values[:0]
        for name, values in result.items()
    }


def _columns(connection: sqlite3.Connection, stream: str, table: Schemas) -> dict[str, None]:
    query = "SELECT schema, min(first_row) FROM blocks WHERE stream = ? GROUP BY schema ORDER BY 2"
    present = dict.fromkeys((ROW, ATTEMPT))
    for number, _ in connection.execute(query, (stream,)):
        if number in table:
            present.update(dict.fromkeys(table[number][0]))
    return present


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(map(repr, sorted(known)))}" if known else ""
