"""Scalars in columns: rows pile up in memory and go to disk as blocks of a few hundred, with a checksum.

A block is a rectangle of float64 values in column order, little-endian, of one stream, one attempt and one schema
(the tuple of column names). The youngest block of a stream stays open until it holds `SEALED_ROWS` rows: a flush
writes it again with the new rows added, so that frequent small flushes do not leave thousands of tiny blocks behind.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from automode.errors import SessionCorruptError, UsageError
from automode.session.records import dump_json, is_encodable

SEALED_ROWS = 256
MAX_ROWS = 4096

Columns = Sequence[NDArray[np.float64]] | NDArray[np.float64]


def checksum(stream: str, first_row: int, rows: int, attempt: int, names: str, data: bytes) -> int:
    """CRC-32 over a block's values and its label, so that a block in the wrong place is found as well."""
    label = struct.pack("<qqq", first_row, rows, attempt) + f"{stream}\n{names}".encode()
    return zlib.crc32(data, zlib.crc32(label))


def decode(
    row: tuple[str, int, int, int, int, bytes], names: tuple[str, ...], names_text: str
) -> NDArray[np.float64]:
    """Values of a stored block, shape (rows, columns), read-only.

    Args:
        row: stream, first_row, rows, attempt, crc, data.
        names: The schema.
        names_text: The schema as it is stored (part of the checksum).

    Raises:
        SessionCorruptError: The size or the checksum is wrong.
    """
    stream, first_row, rows, attempt, crc, data = row
    where = f"block of stream {stream!r} at row {first_row}"
    if len(data) != 8 * rows * len(names):
        raise SessionCorruptError(
            f"{where} has {len(data)} bytes where {rows} x {len(names)} values need {8 * rows * len(names)}"
        )
    if checksum(stream, first_row, rows, attempt, names_text, data) != crc:
        raise SessionCorruptError(f"{where} does not match its checksum; restore the session from a copy")
    return np.frombuffer(data, dtype="<f8").reshape(len(names), rows).T


@dataclass(slots=True)
class _Chunk:
    """Rows of one stream, attempt and schema that follow each other; values in row order."""

    stream: str
    attempt: int
    names: tuple[str, ...]
    first_row: int
    values: array[float]
    pack: Callable[..., bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.pack = struct.Struct(f"{len(self.names)}d").pack  # a row at a time, and all or nothing

    @property
    def rows(self) -> int:
        return len(self.values) // len(self.names)

    def joined_to(self, before: _Chunk | None) -> _Chunk:
        """This chunk with the still open block before it in front, where the two are alike."""
        if before is None or before.rows >= SEALED_ROWS:
            return self
        if before.attempt != self.attempt or before.names != self.names:
            return self
        return _Chunk(self.stream, self.attempt, self.names, before.first_row, before.values + self.values)


OpenBlocks = dict[str, _Chunk]


@dataclass(slots=True)
class PendingRows:
    """Rows that are in memory and not yet on disk, and how many rows every stream has altogether.

    A flush is two calls: `write_blocks` inside the transaction, which changes nothing here, and `written` once it has
    been committed. A transaction that fails leaves everything as it was, ready for the next try.
    """

    rows: dict[str, int] = field(default_factory=dict)
    schemas: dict[tuple[str, ...], int] = field(default_factory=dict)
    _stored_schemas: set[int] = field(default_factory=set)
    _chunks: list[_Chunk] = field(default_factory=list)
    _current: dict[str, _Chunk] = field(default_factory=dict)
    _open_blocks: OpenBlocks = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._chunks)

    @classmethod
    def resumed(cls, rows: dict[str, int], schemas: dict[tuple[str, ...], int]) -> PendingRows:
        """State that follows what is already stored."""
        return cls(rows=dict(rows), schemas=dict(schemas), _stored_schemas=set(schemas.values()))

    def add(self, stream: str, attempt: int, names: tuple[str, ...], columns: Columns) -> int:
        """Append rows; returns the number of the first."""
        table = _table(names, columns)
        chunk = self._chunk(stream, attempt, names)
        first = self.rows[stream]
        if len(table):
            chunk.values.frombytes(table.tobytes())
            self.rows[stream] = first + len(table)
        return first

    def add_one(self, stream: str, attempt: int, names: tuple[str, ...], values: Sequence[float]) -> int:
        """Append one row; returns its number."""
        chunk = self._current.get(stream)
        if chunk is None or chunk.attempt != attempt or (chunk.names is not names and chunk.names != names):
            chunk = self._chunk(stream, attempt, names)
        try:
            packed = chunk.pack(*values)
        except struct.error as error:
            raise UsageError(
                f"a row of stream {stream!r} needs {len(names)} numbers for {names}: {error}"
            ) from error
        chunk.values.frombytes(packed)
        row = self.rows[stream]
        self.rows[stream] = row + 1
        return row

    def _chunk(self, stream: str, attempt: int, names: tuple[str, ...]) -> _Chunk:
        chunk = self._current.get(stream)
        if chunk is not None and chunk.attempt == attempt and chunk.names == names:
            return chunk
        if not isinstance(stream, str) or not stream or not is_encodable(stream):
            raise UsageError(f"a stream is named by a non-empty string of valid Unicode, got {stream!r}")
        if attempt < 1:
            raise UsageError(f"attempt must be at least 1, got {attempt}")
        _check_names(names)
        if names not in self.schemas:
            self.schemas[names] = len(self.schemas) + 1
        chunk = _Chunk(stream, attempt, names, self.rows.setdefault(stream, 0), array("d"))
        self._chunks.append(chunk)
        self._current[stream] = chunk
        return chunk

    def write_blocks(self, connection: sqlite3.Connection) -> OpenBlocks:
        """Write everything pending inside the caller's transaction.

        Returns:
            The youngest block of each stream written, to be handed to `written` after the commit.
        """
        for names, number in self.schemas.items():
            if number not in self._stored_schemas:
                connection.execute(
                    "INSERT OR IGNORE INTO schemas VALUES(?, ?)", (number, dump_json(list(names)))
                )
        youngest: OpenBlocks = {}
        for chunk in self._chunks:
            if chunk.values:
                before = youngest.get(chunk.stream) or self._open_blocks.get(chunk.stream)
                youngest[chunk.stream] = self._write_chunk(connection, chunk.joined_to(before))
        return youngest

    def _write_chunk(self, connection: sqlite3.Connection, chunk: _Chunk) -> _Chunk:
        # A copy: an array that lends its buffer cannot grow, and a failed write must be able to be retried.
        table = np.frombuffer(chunk.values.tobytes(), dtype=np.float64).reshape(-1, len(chunk.names))
        names = dump_json(list(chunk.names))
        last = 0
        for last in range(0, len(table), MAX_ROWS):
            part = table[last : last + MAX_ROWS]
            data = part.T.astype("<f8").tobytes()
            first_row = chunk.first_row + last
            crc = checksum(chunk.stream, first_row, len(part), chunk.attempt, names, data)
            connection.execute(
                "INSERT INTO blocks(stream, first_row, rows, attempt, schema, crc, data) VALUES(?,?,?,?,?,?,?) "
                "ON CONFLICT(stream, first_row) DO UPDATE SET "
                "rows=excluded.rows, crc=excluded.crc, data=excluded.data",
                (chunk.stream, first_row, len(part), chunk.attempt, self.schemas[chunk.names], crc, data),
            )
        rest = array("d", chunk.values[last * len(chunk.names) :])
        return _Chunk(chunk.stream, chunk.attempt, chunk.names, chunk.first_row + last, rest)

    def written(self, youngest: OpenBlocks) -> None:
        """Forget what the committed transaction has stored."""
        self._stored_schemas.update(self.schemas.values())
        self._open_blocks.update(youngest)
        self._chunks.clear()
        self._current.clear()


def _table(names: tuple[str, ...], columns: Columns) -> NDArray[np.float64]:
    """The values as (rows, columns) in row order."""
    try:
        if isinstance(columns, np.ndarray):
            table = np.ascontiguousarray(columns, dtype=np.float64)
        else:
            table = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=-1)
    except (TypeError, ValueError) as error:
        raise UsageError(f"columns must be equally long arrays of numbers: {error}") from error
    if table.ndim != 2 or table.shape[1] != len(names):
        raise UsageError(
            f"{len(names)} names need that many 1-D columns or an array of shape (rows, {len(names)}); "
            f"got shape {table.shape}"
        )
    return np.ascontiguousarray(table)


def _check_names(names: tuple[str, ...]) -> None:
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) and n for n in names):
        raise UsageError(f"column names must be a non-empty tuple of non-empty strings, got {names!r}")
    if len(set(names)) != len(names):
        raise UsageError(f"column names must differ from each other, got {names!r}")
