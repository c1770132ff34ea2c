"""Records, cards, lineage and checkpoints as rows of the database: encoded, checked, inserted, superseded."""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from automode.errors import SessionCorruptError, UsageError
from automode.session.records import (
    ROLES,
    TRUNK,
    CardRow,
    CheckpointRow,
    LineageRow,
    Record,
    dump_json,
    is_encodable,
    load_json,
)

_INT64 = 2**63

EventRow = tuple[int, str, str, int, str, float, float, int | None, str | None, int | None, str, int, int]


def event_checksum(row: EventRow) -> int:
    """CRC-32 over everything that an event's row says."""
    return zlib.crc32(json.dumps(row).encode())


def encode_records(
    records: Sequence[Record], *, first_seq: int, first_cursor: int, rows: int
) -> list[EventRow]:
    """Check that the records go on where the log ends, and encode them.

    Args:
        records: In order.
        first_seq: The ``seq`` that the first one must have.
        first_cursor: The ``frame_cursor`` of the record before it.
        rows: Trunk rows so far; no record may claim to follow more.

    Raises:
        UsageError: They do not follow, or hold what the log cannot take.
    """
    encoded: list[EventRow] = []
    cursor = first_cursor
    for expected, record in enumerate(records, start=first_seq):
        _check_record(record, expected)
        if not cursor <= record.frame_cursor <= rows:
            raise UsageError(
                f"record {expected} says that it follows {record.frame_cursor} trunk rows, but the record before it "
                f"follows {cursor} and there are {rows}"
            )
        cursor = record.frame_cursor
        encoded.append(_event_row(record))
    return encoded


def decode_record(row: EventRow, crc: int) -> Record:
    """The record of a stored row.

    Raises:
        SessionCorruptError: The row does not match its checksum.
    """
    if event_checksum(row) != crc:
        raise SessionCorruptError(
            f"record {row[0]} does not match its checksum; restore the session from a copy"
        )
    seq, role, kind, v, body, t_wall, t_mono, cause, command_id, effective_at, stream, attempt, cursor = row
    if role not in ROLES:
        raise SessionCorruptError(f"record {seq} has the unknown role {role!r}")
    return Record(
        seq=seq,
        role=role,
        kind=kind,
        v=v,
        body=load_json(body),
        t_wall=t_wall,
        t_mono=t_mono,
        cause=cause,
        command_id=command_id,
        effective_at=effective_at,
        stream=stream,
        attempt=attempt,
        frame_cursor=cursor,
    )


def insert_records(
    connection: sqlite3.Connection,
    encoded: Sequence[EventRow],
    *,
    first_seq: int,
    stream_rows: Mapping[str, int],
) -> None:
    """Insert records, and how many rows the streams that have grown had when the first of them was written."""
    connection.executemany(
        "INSERT INTO cursors(stream, seq, rows) VALUES(?,?,?)",
        [(stream, first_seq, rows) for stream, rows in stream_rows.items()],
    )
    connection.executemany(
        "INSERT INTO events(seq, role, kind, v, body, t_wall, t_mono, cause, command_id, effective_at, stream, "
        "attempt, frame_cursor, crc) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        [(*row, event_checksum(row)) for row in encoded],
    )


@dataclass(frozen=True, slots=True)
class ExtraRows:
    """What a record brings along in the same transaction."""

    cards: list[tuple[str, int, str, str, int]]
    lineage: list[tuple[str, str, str, str | None, int, str | None, int]]
    checkpoints: list[tuple[str, int, str, int]]

    @classmethod
    def encode(
        cls,
        cards: Iterable[CardRow],
        lineage: Iterable[LineageRow],
        checkpoints: Iterable[CheckpointRow],
        *,
        last_seq: int,
    ) -> Self:
        """Encode and check that each refers to a record of the log.

        Raises:
            UsageError: One refers to a record that does not exist.
        """
        rows = cls(
            [(c.card_id, c.rev, c.state, c.body, c.seq) for c in cards],
            [(n.node, dump_json(n.parents), n.kind, n.card, n.step, n.checkpoint, n.seq) for n in lineage],
            [(c.digest, c.step, c.kind, c.seq) for c in checkpoints],
        )
        named = [*((r[0], r[-1]) for r in rows.cards), *((r[0], r[-1]) for r in rows.lineage)]
        for name, seq in (*named, *((r[0], r[-1]) for r in rows.checkpoints)):
            if not 1 <= seq <= last_seq:
                raise UsageError(f"{name} refers to record {seq}, but the log has 1 to {last_seq}")
        return rows

    def insert(self, connection: sqlite3.Connection) -> None:
        """Insert inside the caller's transaction."""
        connection.executemany(
            "INSERT INTO cards(card_id, rev, state, body, seq) VALUES(?,?,?,?,?)", self.cards
        )
        connection.executemany(
            "INSERT INTO lineage(node, parents, kind, card, step, checkpoint, seq) VALUES(?,?,?,?,?,?,?)",
            self.lineage,
        )
        connection.executemany(
            "INSERT INTO checkpoints(digest, step, kind, seq) VALUES(?,?,?,?)", self.checkpoints
        )


def check_target(connection: sqlite3.Connection, after_seq: int, *, last_seq: int) -> None:
    """Refuse to go back to a record that does not exist or is itself out of the story.

    Raises:
        UsageError: So it is.
    """
    if not 0 <= after_seq <= last_seq:
        raise UsageError(
            f"cannot go back to record {after_seq}: the log has 1 to {last_seq} (0: the beginning)"
        )
    row = connection.execute("SELECT superseded FROM events WHERE seq = ?", (after_seq,)).fetchone()
    if row is not None and row[0]:
        raise UsageError(
            f"cannot go back to record {after_seq}: it is superseded; choose one that still counts"
        )


def supersede(
    connection: sqlite3.Connection, after_seq: int, *, next_seq: int, ends: Mapping[str, int]
) -> None:
    """Mark the records and rows after ``after_seq`` inside the caller's transaction.

    Args:
        connection: In a transaction that has written all pending rows.
        after_seq: The last record that still counts.
        next_seq: The record that comes next.
        ends: Rows of each stream.
    """
    op = connection.execute("SELECT coalesce(max(op), 0) + 1 FROM rewinds").fetchone()[0]
    connection.execute(
        "INSERT INTO rewinds(op, after_seq, next_seq) VALUES(?,?,?)", (op, after_seq, next_seq)
    )
    connection.execute("UPDATE events SET superseded = ? WHERE seq > ? AND superseded = 0", (op, after_seq))
    kept = dict(
        connection.execute(
            "SELECT stream, rows FROM cursors AS c WHERE seq = "
            "(SELECT max(seq) FROM cursors WHERE stream = c.stream AND seq <= ?)",
            (after_seq,),
        )
    )
    # The trunk is exact: a record may have been decided on earlier rows than were there when it was written.
    at = connection.execute("SELECT frame_cursor FROM events WHERE seq = ?", (after_seq,)).fetchone()
    kept[TRUNK] = 0 if at is None else at[0]
    connection.executemany(
        "INSERT INTO dead_rows(op, stream, first_row, end_row) VALUES(?,?,?,?)",
        [(op, s, kept.get(s, 0), end) for s, end in ends.items() if kept.get(s, 0) < end],
    )


def _check_record(record: Record, expected: int) -> None:
    if record.seq != expected:
        raise UsageError(f"the log goes on with record {expected}, got {record.seq}; nothing was written")
    if record.role not in ROLES or not record.kind:
        raise UsageError(f"record {expected} needs a role among {ROLES} and a kind, got {record!r}")
    if not (math.isfinite(record.t_wall) and math.isfinite(record.t_mono)):
        raise UsageError(f"record {expected} needs finite times, got {record.t_wall} and {record.t_mono}")
    for name in ("v", "cause", "effective_at", "attempt"):
        value = getattr(record, name)
        if value is None and name in ("cause", "effective_at"):
            continue
        if not isinstance(value, int) or not -_INT64 <= value < _INT64:
            raise UsageError(f"record {expected}: {name} must be a whole number of 64 bits, got {value!r}")
    for text in (record.kind, record.stream, record.command_id or ""):
        if not is_encodable(text):
            raise UsageError(f"record {expected}: {text!r} is no valid Unicode text")
    if not isinstance(record.body, dict):
        raise UsageError(f"record {expected}: body must be a dict, got {type(record.body).__name__}")


def _event_row(record: Record) -> EventRow:
    return (
        record.seq,
        record.role,
        record.kind,
        record.v,
        dump_json(record.body),
        float(record.t_wall),
        float(record.t_mono),
        record.cause,
        record.command_id,
        record.effective_at,
        record.stream,
        record.attempt,
        record.frame_cursor,
    )
