"""The one writer of a session.

What happens at a step is cheap and lives in memory until it is due; what is decided is a transaction. `write` commits
the records it is given together with every scalar row that came before them, so that a decision never stands in the
log without the observations that it rests on. A commit that fails leaves the file and the memory as they were, and
the same call can be made again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from automode.errors import SessionError
from automode.session import database
from automode.session.blocks import Columns, OpenBlocks, PendingRows
from automode.session.durable_files import sync_folder
from automode.session.log_rows import ExtraRows, check_target, encode_records, insert_records, supersede
from automode.session.records import TRUNK, CardRow, CheckpointRow, LineageRow, Record, dump_json, load_json
from automode.session.writer_lock import WriterLock

FLUSH_SECONDS = 0.5


class SessionStore:
    """Writes one session folder; made by `create` or `open`, never directly.

    Only the process that opened it may use it, from the thread that opened it.
    """

    def __init__(self, folder: Path, lock: WriterLock, connection: sqlite3.Connection, journal: str) -> None:
        self.path = folder
        self.journal = journal
        self._lock = lock
        self._connection: sqlite3.Connection | None = connection
        self._pid = os.getpid()
        self._synchronous = ""
        self._next_seq = 1
        self._last_cursor = 0
        self._marked_rows: dict[str, int] = {}
        self._pending = PendingRows()
        self._flushed_at: float | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, header: Mapping[str, Any]) -> Self:
        """Start a new session in ``path``, which is made if it is missing.

        Args:
            path: The session folder.
            header: What the session is about (project, versions, seed ...), JSON types; fixed from now on.

        Raises:
            SessionError: The folder holds a session already, or cannot be written.
            SessionBusyError: Another writer is at work in it.
        """
        folder = Path(path)
        text = dump_json(dict(header))
        with database.storage_errors(folder, "creating the session"), ExitStack() as undo:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("artifacts", "checkpoints", "inbox"):
                (folder / name).mkdir(exist_ok=True)
            lock = WriterLock(folder)
            undo.callback(lock.release)
            file = folder / database.DATABASE_NAME
            _refuse_existing(file)
            connection, journal = database.connect_writer(file)
            undo.callback(connection.close)
            database.create_tables(connection, text)
            sync_folder(folder)
            undo.pop_all()
        return cls(folder, lock, connection, journal)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Take up an existing session where its log ends, to append to it.

        Raises:
            SessionError: There is no session, or a newer automode wrote it.
            SessionBusyError: Its writer is still at work.
            SessionCorruptError: The database is damaged.
        """
        folder = Path(path)
        file = folder / database.DATABASE_NAME
        if not file.is_file():
            raise SessionError(f"{folder} is no session: it has no {database.DATABASE_NAME}")
        with database.storage_errors(folder, "opening the session"), ExitStack() as undo:
            lock = WriterLock(folder)
            undo.callback(lock.release)
            connection, journal = database.connect_writer(file)
            undo.callback(connection.close)
            database.check_version(connection, file)
            store = cls(folder, lock, connection, journal)
            store._take_up(connection)
            undo.pop_all()
        return store

    def _take_up(self, connection: sqlite3.Connection) -> None:
        last = connection.execute("SELECT seq, frame_cursor FROM events ORDER BY seq DESC LIMIT 1").fetchone()
        if last is not None:
            self._next_seq, self._last_cursor = last[0] + 1, last[1]
        rows = dict(connection.execute("SELECT stream, max(first_row + rows) FROM blocks GROUP BY stream"))
        schemas = {
            tuple(load_json(text)): number
            for number, text in connection.execute("SELECT id, names FROM schemas ORDER BY id")
        }
        self._pending = PendingRows.resumed(rows, schemas)
        self._marked_rows = dict(
            connection.execute(
                "SELECT stream, rows FROM cursors AS c "
                "WHERE seq = (SELECT max(seq) FROM cursors WHERE stream = c.stream)"
            )
        )

    @property
    def next_seq(self) -> int:
        """The ``seq`` that the next record must have."""
        return self._next_seq

    def rows(self, stream: str = TRUNK) -> int:
        """Rows that ``stream`` has had so far, those in memory and superseded ones included."""
        return self._pending.rows.get(stream, 0)

    def add_rows(self, stream: str, attempt: int, names: tuple[str, ...], columns: Columns) -> int:
        """Append scalar rows in memory; they go to disk with the next `write`, `flush` or `flush_if_due`.

        Args:
            stream: ``trunk``, a trial's id, or a rank.
            attempt: Attempt of that stream, from 1.
            names: Column names; pass the same tuple object again where possible.
            columns: One array a name, all of one length; or one array of shape (rows, columns).

        Returns:
            Number of the first row added (rows of a stream count from 0 and never start again).

        Raises:
            UsageError: Names or shapes do not fit.
        """
        self._check_open()
        return self._pending.add(stream, attempt, names, columns)

    def add_row(self, stream: str, attempt: int, names: tuple[str, ...], values: Sequence[float]) -> int:
        """Append one row of plain floats; the fast way for a training loop.

        Returns:
            The row's number.

        Raises:
            UsageError: The number of values is not that of the names, or a value is no number.
        """
        if self._connection is None:
            self._check_open()
        return self._pending.add_one(stream, attempt, names, values)

    def write(
        self,
        records: Sequence[Record],
        *,
        cards: Iterable[CardRow] = (),
        lineage: Iterable[LineageRow] = (),
        checkpoints: Iterable[CheckpointRow] = (),
        durable: bool,
        supersede_after: int | None = None,
    ) -> None:
        """Commit pending rows and these records as one transaction.

        Args:
            records: In order; the first has ``seq == next_seq``.
            cards: Revisions and states of plan cards; their ``seq`` is that of a record, old or in this call.
            lineage: Nodes of the family tree, likewise.
            checkpoints: Checkpoints that are on disk, likewise.
            durable: Wait until the disk has it. Needed before a command is carried out.
            supersede_after: First mark everything after this record as superseded (see `supersede`).

        Raises:
            UsageError: The records do not follow the log.
            SessionError: The commit failed; nothing was written, nothing is lost, the call can be made again.
        """
        first, last = self._next_seq, self._next_seq + len(records) - 1
        encoded = encode_records(
            records, first_seq=first, first_cursor=self._last_cursor, rows=self.rows(TRUNK)
        )
        extra = ExtraRows.encode(cards, lineage, checkpoints, last_seq=last)
        marks = self._changed_streams() if records else {}
        youngest: OpenBlocks = {}
        try:
            with self._transaction(durable=durable) as connection:
                if supersede_after is not None:
                    check_target(connection, supersede_after, last_seq=first - 1)
                youngest = self._pending.write_blocks(connection)
                if supersede_after is not None:
                    supersede(connection, supersede_after, next_seq=first, ends=self._pending.rows)
                insert_records(connection, encoded, first_seq=first, stream_rows=marks)
                extra.insert(connection)
            self._committed(records, marks, youngest)
        except BaseException:
            # An interrupt may fall between the commit and the line after it.
            if records and self._last_stored_seq() == last:
                self._committed(records, marks, youngest)
            raise

    def _committed(self, records: Sequence[Record], marks: dict[str, int], youngest: OpenBlocks) -> None:
        self._pending.written(youngest)
        self._marked_rows.update(marks)
        if records:
            self._next_seq = records[-1].seq + 1
            self._last_cursor = records[-1].frame_cursor

    def _last_stored_seq(self) -> int | None:
        try:
            row = self._check_open().execute("SELECT max(seq) FROM events").fetchone()
        except (sqlite3.Error, SessionError):
            return None
        return None if row is None else row[0]

    def supersede(self, after_seq: int) -> None:
        """Mark what came after record ``after_seq`` as superseded: kept, but out of the story from now on.

        For the trunk these are the rows from that record's ``frame_cursor`` on; for other streams, what they added
        after it. 0 supersedes everything. Give ``supersede_after`` to `write` instead to do it in one transaction
        with the record that says why.

        Raises:
            UsageError: There is no such record.
            SessionError: The commit failed; it can be tried again.
        """
        self.write((), durable=True, supersede_after=after_seq)

    def flush(self) -> None:
        """Commit pending rows without waiting for the disk."""
        if self._pending:
            self.write((), durable=False)

    def flush_if_due(self, now: float) -> bool:
        """Commit pending rows if the last time was half a second ago or more.

        Args:
            now: Seconds on a monotonic clock.

        Returns:
            Whether it was due.

        Raises:
            SessionError: The commit failed; the rows stay in memory and the next half second tries again.
        """
        if self._flushed_at is not None and now - self._flushed_at < FLUSH_SECONDS:
            return False
        first = self._flushed_at is None
        self._flushed_at = now
        if first:
            return False
        self.flush()
        return True

    def close(self) -> None:
        """Commit what is pending, leave one self-contained database file and let the next writer in.

        Raises:
            SessionError: The last commit failed. The store stays open: free some space and close it again.
        """
        if self._connection is None or os.getpid() != self._pid:
            return
        self.flush()
        self._release()

    def abandon(self) -> None:
        """Close without writing what is pending, for a disk that goes on refusing; the next writer is let in."""
        if os.getpid() == self._pid:
            self._release()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            # With readers around this fails, and the write-ahead log stays until the last of them has gone.
            connection.execute("PRAGMA busy_timeout=0")
            connection.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.Error:
            pass
        finally:
            connection.close()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SessionError as failure:
            self._release()
            if error is None:
                raise
            error.add_note(f"closing the session failed as well: {failure}")

    def __repr__(self) -> str:
        state = "closed" if self._connection is None else f"next_seq={self._next_seq}"
        return f"SessionStore({str(self.path)!r}, {state})"

    def _check_open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise SessionError(f"the session {self.path} is closed; open it again to write to it")
        if os.getpid() != self._pid:
            raise SessionError(
                f"the session {self.path} belongs to process {self._pid}; a forked process cannot write it"
            )
        return self._connection

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        connection = self._check_open()
        level = "FULL" if durable else "NORMAL"
        with database.storage_errors(self.path, "writing the session"):
            if level != self._synchronous:
                connection.execute(f"PRAGMA synchronous={level}")
                self._synchronous = level
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _changed_streams(self) -> dict[str, int]:
        rows = self._pending.rows
        return {stream: count for stream, count in rows.items() if self._marked_rows.get(stream) != count}


def _refuse_existing(file: Path) -> None:
    if file.exists():
        raise SessionError(f"{file.parent} holds a session already; resume it or choose another folder")
