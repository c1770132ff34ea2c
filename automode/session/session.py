"""Read a session: while it is written, after it has ended, or after its process was killed."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from automode.errors import SessionCorruptError, SessionError
from automode.session import database, frames, ledger_file
from automode.session.log_rows import decode_record
from automode.session.records import TRUNK, CardRow, CheckpointRow, LineageRow, Record, Role, load_json
from automode.session.replay_feed import ReplayItem, replay_items
from automode.session.sample_table import SampleTable, read_ledger
from automode.session.session_view import session_panel
from automode.session.suspects import Suspects, read_suspects

LOG_NAME = "log.jsonl"
_PAGE = 512

_EVENTS = """
    SELECT seq, role, kind, v, body, t_wall, t_mono, cause, command_id, effective_at, stream, attempt, frame_cursor, crc
    FROM events
    WHERE seq > ? AND (? OR superseded = 0) AND (? IS NULL OR kind = ?) AND (? IS NULL OR role = ?)
    ORDER BY seq LIMIT ?"""
_CARDS = """
    SELECT card_id, rev, state, body, seq FROM cards
    WHERE (? OR seq NOT IN (SELECT seq FROM events WHERE superseded > 0)) AND (? IS NULL OR card_id = ?)
    ORDER BY id"""
_LINEAGE = """
    SELECT node, parents, kind, card, step, checkpoint, seq FROM lineage
    WHERE ? OR seq NOT IN (SELECT seq FROM events WHERE superseded > 0) ORDER BY id"""
_CHECKPOINTS = """
    SELECT digest, step, kind, seq FROM checkpoints
    WHERE ? OR seq NOT IN (SELECT seq FROM events WHERE superseded > 0) ORDER BY id"""


class Session:
    """A session, read-only; made by `Session.open`.

    Every call sees what has been committed when it is made. May be used from several threads. What a rewind or a
    resumption has superseded is left out unless it is asked for.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self._connection: sqlite3.Connection | None = connection
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the session folder ``path`` (or its ``session.db``).

        Raises:
            SessionError: It is no session, cannot be read, or was written by a newer automode.
            SessionCorruptError: The database is damaged.
        """
        folder = Path(path)
        with database.storage_errors(folder, "looking for a session"):
            if folder.name == database.DATABASE_NAME and folder.is_file():
                folder = folder.parent
            file = folder / database.DATABASE_NAME
            if not file.is_file():
                raise SessionError(
                    f"{folder} is no session: it has no {database.DATABASE_NAME}; give the folder that the run printed"
                )
        with database.storage_errors(folder, "opening the session"):
            connection = database.connect_reader(file)
            try:
                database.check_version(connection, file)
                row = connection.execute("SELECT value FROM meta WHERE key = 'header'").fetchone()
                header = _header(row, file)
            except BaseException:
                connection.close()
                raise
        return cls(folder, connection, header)

    def events(
        self,
        kind: str | None = None,
        role: Role | None = None,
        include_superseded: bool = False,
        *,
        after: int = 0,
    ) -> Iterator[Record]:
        """Records in log order.

        Args:
            kind: Only this kind.
            role: Only this role.
            include_superseded: Those before a rewind as well.
            after: Only records with a greater ``seq``, to follow a run.

        Raises:
            SessionCorruptError: A record does not match its checksum.
        """
        while True:
            # Page by page, so that a slow consumer never keeps a read transaction open under the writer.
            page = self._fetch(_EVENTS, (after, include_superseded, kind, kind, role, role, _PAGE))
            yield from (decode_record(row[:-1], row[-1]) for row in page)
            if len(page) < _PAGE:
                return
            after = page[-1][0]

    def last_seq(self) -> int:
        """``seq`` of the youngest record, 0 in an empty log; superseded ones count."""
        return int(self._fetch("SELECT coalesce(max(seq), 0) FROM events")[0][0])

    def streams(self) -> tuple[str, ...]:
        """Names of the streams that have rows."""
        return tuple(row[0] for row in self._fetch("SELECT DISTINCT stream FROM blocks ORDER BY stream"))

    def rows(self, stream: str = TRUNK, *, include_superseded: bool = False) -> int:
        """How many rows of ``stream`` have been committed."""
        with self._snapshot() as connection:
            return frames.count(connection, stream, include_superseded=include_superseded)

    def frame(
        self, name: str, stream: str = TRUNK, *, include_superseded: bool = False
    ) -> NDArray[np.float64]:
        """Values of one column, NaN where a row lacked it.

        ``row`` and ``attempt`` are columns of every stream.

        Raises:
            UsageError: The stream has no such column, or there is no such stream.
            SessionCorruptError: A block does not match its checksum.
        """
        with self._snapshot() as connection:
            return frames.read(connection, stream, (name,), include_superseded=include_superseded)[name]

    def frames(
        self, stream: str = TRUNK, *, include_superseded: bool = False
    ) -> dict[str, NDArray[np.float64]]:
        """Every column of ``stream``, by name, ``row`` and ``attempt`` included.

        Raises:
            UsageError: There is no such stream.
            SessionCorruptError: A block does not match its checksum.
        """
        with self._snapshot() as connection:
            return frames.read(connection, stream, None, include_superseded=include_superseded)

    def cards(self, *, include_superseded: bool = False) -> list[CardRow]:
        """The latest row of every plan card, in the order in which the cards first appeared."""
        latest = {row.card_id: row for row in self._cards(None, include_superseded)}
        return list(latest.values())

    def revisions(self, card_id: str, *, include_superseded: bool = False) -> list[CardRow]:
        """Every revision and state that the card has had, oldest first; empty if there is no such card."""
        return self._cards(card_id, include_superseded)

    def _cards(self, card_id: str | None, include_superseded: bool) -> list[CardRow]:
        return [
            CardRow(card_id=card, rev=rev, state=state, body=body, seq=seq)
            for card, rev, state, body, seq in self._fetch(_CARDS, (include_superseded, card_id, card_id))
        ]

    def lineage(self, *, include_superseded: bool = False) -> list[LineageRow]:
        """Nodes of the family tree as last written, in the order in which they first appeared."""
        nodes: dict[str, LineageRow] = {}
        for node, parents, kind, card, step, checkpoint, seq in self._fetch(_LINEAGE, (include_superseded,)):
            nodes[node] = LineageRow(
                node=node,
                parents=tuple(load_json(parents)),
                kind=kind,
                card=card,
                step=step,
                checkpoint=checkpoint,
                seq=seq,
            )
        return list(nodes.values())

    def checkpoints(self, *, include_superseded: bool = False) -> list[CheckpointRow]:
        """Checkpoints recorded as durable, oldest first."""
        return [
            CheckpointRow(digest=digest, step=step, kind=kind, seq=seq)
            for digest, step, kind, seq in self._fetch(_CHECKPOINTS, (include_superseded,))
        ]

    def suspects(self, step: int | None = None) -> Suspects:
        """The samples that a scan found to be probably mislabelled, with what speaks for it.

        Args:
            step: The trunk's step at the scan; None: the last scan.

        Raises:
            UsageError: There was no scan, or none at this step.
        """
        return read_suspects(self, step)

    def ledger(self) -> SampleTable:
        """How each training sample has fared, as of the last scan, the run's end, or the last stored state of the run.

        Raises:
            UsageError: The session holds no sample ledger; the message says why.
            SessionCorruptError: It is damaged.
        """
        return read_ledger(self)

    def iter_replay(self) -> Iterator[ReplayItem]:
        """The log as the live run saw it, superseded parts left out.

        Yields:
            ``("rows", first_row, names, values)``, values of shape (rows, columns), read-only, for trunk rows up to
            the next record's ``frame_cursor``, then ``("record", record)``, and so on; at last the rows that follow
            the last record. Row numbers jump where rows were superseded.

        Raises:
            SessionCorruptError: A block or record does not match its checksum.
        """
        return replay_items(self._snapshot)

    def log(self) -> Iterator[dict[str, Any]]:
        """Lines of the session's log file; a line torn by a kill comes as ``{"unreadable": text}``."""
        file = self.path / LOG_NAME
        if not file.is_file():
            return
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    entry = None
                yield entry if isinstance(entry, dict) else {"unreadable": line.rstrip("\n")}

    def verify(self) -> None:
        """Read everything and compare it with its checksums; a second or so for a million rows.

        Raises:
            SessionCorruptError: Something is damaged, missing, or was put in by another program.
        """
        with self._snapshot() as connection:
            database.check_tables(connection, self.path / database.DATABASE_NAME)
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise SessionCorruptError(
                    f"{self.path}: the database is damaged ({verdict}); restore it from a copy"
                )
            for stream in self.streams():
                frames.read(connection, stream, None, include_superseded=True)
            deque(self.iter_replay(), maxlen=0)
            ledger_file.read_file(self.path)
            for expected, record in enumerate(self.events(include_superseded=True), start=1):
                if record.seq != expected:
                    raise SessionCorruptError(
                        f"{self.path}: record {expected} is missing; restore it from a copy"
                    )

    def close(self) -> None:
        """Let go of the file; calling it twice does no harm."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._connection is None:
            return f"Session({str(self.path)!r}, closed)"
        return f"Session({str(self.path)!r}, {self.last_seq()} records, {self.rows()} rows, {len(self.cards())} cards)"

    def __rich__(self) -> Any:
        return session_panel(self).rich()

    def _repr_html_(self) -> str:
        return session_panel(self).html()

    @property
    def closed(self) -> bool:
        """Whether the file has been let go of."""
        return self._connection is None

    def _fetch(self, query: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._snapshot() as connection:
            return connection.execute(query, values).fetchall()

    @contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """A short read transaction: everything in it sees one state of the file."""
        with self._lock:
            if self._connection is None:
                raise SessionError(f"the session {self.path} is closed; open it again to read it")
            with database.storage_errors(self.path, "reading the session"):
                nested = self._connection.in_transaction
                if not nested:
                    self._connection.execute("BEGIN")
                try:
                    yield self._connection
                finally:
                    if not nested and self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")


def _header(row: tuple[str] | None, file: Path) -> dict[str, Any]:
    header = {} if row is None else load_json(row[0])
    if not isinstance(header, dict):
        raise SessionCorruptError(f"the header of {file} is no mapping; restore the folder from a copy")
    return header
