"""Rows and records interleaved as the live run handled them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from automode.errors import SessionCorruptError
from automode.session import frames
from automode.session.log_rows import decode_record
from automode.session.records import TRUNK, Record

RowsItem = tuple[Literal["rows"], int, tuple[str, ...], NDArray[np.float64]]
RecordItem = tuple[Literal["record"], Record]
ReplayItem = RowsItem | RecordItem
Snapshot = Callable[[], AbstractContextManager[sqlite3.Connection]]

_RECORDS = """
    SELECT seq, role, kind, v, body, t_wall, t_mono, cause, command_id, effective_at, stream, attempt, frame_cursor, crc
    FROM events WHERE seq > ? AND seq <= ? AND (superseded = 0 OR superseded > ?) ORDER BY seq LIMIT ?"""
_BLOCKS_PAGE = 64
_RECORDS_PAGE = 512


def replay_items(snapshot: Snapshot) -> Iterator[ReplayItem]:
    """Records and trunk rows in order, as of the moment of the first item.

    The reader lets go of the database between pages, so a writer is never held up; what it commits or supersedes
    meanwhile does not show.
    """
    with snapshot() as connection:
        last_seq = connection.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        rewinds = connection.execute("SELECT coalesce(max(op), 0) FROM rewinds").fetchone()[0]
        end = frames.end_row(connection, TRUNK)
        live = frames.live_spans(frames.dead_spans(connection, TRUNK), end)
        feed = _Feed(snapshot, frames.schemas(connection), live)
    for record in _records(snapshot, last_seq, rewinds):
        if record.frame_cursor > end:
            raise SessionCorruptError(
                f"record {record.seq} follows {record.frame_cursor} trunk rows, but only {end} are there; "
                "restore the session from a copy"
            )
        yield from feed.until(record.frame_cursor)
        yield "record", record
    yield from feed.until(end)


def _records(snapshot: Snapshot, last_seq: int, rewinds: int) -> Iterator[Record]:
    after = 0
    while True:
        with snapshot() as connection:
            page = connection.execute(_RECORDS, (after, last_seq, rewinds, _RECORDS_PAGE)).fetchall()
        yield from (decode_record(row[:-1], row[-1]) for row in page)
        if len(page) < _RECORDS_PAGE:
            return
        after = page[-1][0]


@dataclass(slots=True)
class _Feed:
    """Hands out the live rows of the trunk up to a given row, block by block."""

    snapshot: Snapshot
    schemas: frames.Schemas
    live: list[frames.Span]
    _position: int = 0
    _span: int = 0
    _page: list[frames.Block] = field(default_factory=list)
    _index: int = 0

    def until(self, cursor: int) -> Iterator[RowsItem]:
        while self._span < len(self.live):
            first, end = self.live[self._span]
            self._position = max(self._position, first)
            stop = min(end, cursor)
            while self._position < stop:
                yield self._piece(stop)
            if self._position < end:
                return
            self._span += 1

    def _piece(self, stop: int) -> RowsItem:
        """The next rows that lie in one block, ``stop`` at most."""
        start, _, names, values = self._block()
        first = self._position
        self._position = min(start + len(values), stop)
        return "rows", first, names, values[first - start : self._position - start]

    def _block(self) -> frames.Block:
        """The block that holds the current position."""
        while self._index < len(self._page):
            block = self._page[self._index]
            if self._position < block[0] + len(block[3]):
                return block
            self._index += 1
        with self.snapshot() as connection:
            self._page = list(frames.blocks(connection, TRUNK, self.schemas, self._position, _BLOCKS_PAGE))
        self._index = 0
        if not self._page or self._position >= self._page[0][0] + len(self._page[0][3]):
            raise SessionCorruptError(
                f"no block holds trunk row {self._position}; restore the session from a copy"
            )
        return self._page[0]
