"""The SQLite file of a session: its tables, how it is opened, and what its errors mean for a person."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from automode.errors import SessionBusyError, SessionCorruptError, SessionError

DATABASE_NAME = "session.db"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x6175746D  # "autm": tells a session from any other SQLite file
BUSY_SECONDS = 10.0

_TABLES = (
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE events(
        seq INTEGER PRIMARY KEY, role TEXT NOT NULL, kind TEXT NOT NULL, v INTEGER NOT NULL,
        body TEXT NOT NULL, t_wall REAL NOT NULL, t_mono REAL NOT NULL, cause INTEGER, command_id TEXT,
        effective_at INTEGER, stream TEXT NOT NULL, attempt INTEGER NOT NULL, frame_cursor INTEGER NOT NULL,
        crc INTEGER NOT NULL, superseded INTEGER NOT NULL DEFAULT 0)""",
    "CREATE TABLE schemas(id INTEGER PRIMARY KEY, names TEXT NOT NULL)",
    # The blob stands last, so that reading the other columns touches no overflow page.
    """CREATE TABLE blocks(
        id INTEGER PRIMARY KEY, stream TEXT NOT NULL, first_row INTEGER NOT NULL, rows INTEGER NOT NULL,
        attempt INTEGER NOT NULL, schema INTEGER NOT NULL, crc INTEGER NOT NULL, data BLOB NOT NULL,
        UNIQUE(stream, first_row))""",
    # How many rows a stream had when record seq was written; a row only where the number changed.
    """CREATE TABLE cursors(
        stream TEXT NOT NULL, seq INTEGER NOT NULL, rows INTEGER NOT NULL, PRIMARY KEY(stream, seq)) WITHOUT ROWID""",
    "CREATE TABLE rewinds(op INTEGER PRIMARY KEY, after_seq INTEGER NOT NULL, next_seq INTEGER NOT NULL)",
    """CREATE TABLE dead_rows(
        op INTEGER NOT NULL, stream TEXT NOT NULL, first_row INTEGER NOT NULL, end_row INTEGER NOT NULL)""",
    """CREATE TABLE cards(
        id INTEGER PRIMARY KEY, card_id TEXT NOT NULL, rev INTEGER NOT NULL, state TEXT NOT NULL,
        body TEXT NOT NULL, seq INTEGER NOT NULL)""",
    """CREATE TABLE lineage(
        id INTEGER PRIMARY KEY, node TEXT NOT NULL, parents TEXT NOT NULL, kind TEXT NOT NULL, card TEXT,
        step INTEGER NOT NULL, checkpoint TEXT, seq INTEGER NOT NULL)""",
    """CREATE TABLE checkpoints(
        id INTEGER PRIMARY KEY, digest TEXT NOT NULL, step INTEGER NOT NULL, kind TEXT NOT NULL,
        seq INTEGER NOT NULL)""",
)


def writer_uri(database: Path) -> str:
    """SQLite URI that opens ``database`` for writing."""
    return database.absolute().as_uri() + "?mode=rwc"


def connect_writer(database: Path) -> tuple[sqlite3.Connection, str]:
    """Open ``database`` for the one writer.

    Returns:
        The connection (explicit transactions only) and the journal mode in force: ``wal``, or ``delete`` on file
        systems that refuse shared memory (network drives).
    """
    connection = sqlite3.connect(writer_uri(database), uri=True, isolation_level=None, timeout=BUSY_SECONDS)
    try:
        journal = _choose_journal(connection)
        # macOS: fsync does not reach the platter unless asked to; the pragma does nothing elsewhere.
        connection.execute("PRAGMA fullfsync=ON")
    except BaseException:
        connection.close()
        raise
    return connection, journal


def _choose_journal(connection: sqlite3.Connection) -> str:
    try:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        # Some network file systems grant WAL and fail at the first access to the shared memory.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        mode = "refused"
    if mode == "wal":
        return "wal"
    return str(connection.execute("PRAGMA journal_mode=DELETE").fetchone()[0])


def create_tables(connection: sqlite3.Connection, header: str) -> None:
    """Make every table and store the header, in one transaction: a killed creation leaves an empty file."""
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES('header', ?)", (header,))
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    connection.execute("COMMIT")


def connect_reader(database: Path) -> sqlite3.Connection:
    """Open ``database`` read-only; a live writer, or one that was killed, does not matter."""
    uri = database.absolute().as_uri()
    connection = _try_reader(uri + "?mode=ro")
    if connection is None:
        wal = database.with_name(database.name + "-wal")
        if wal.exists() and wal.stat().st_size > 0:
            raise SessionError(
                f"{database} was not closed by its writer and stands in a folder that cannot be written; "
                "copy the session folder to a writable place and open the copy"
            )
        # Read-only media: nobody can be writing, so the lock and shared-memory files can be left out.
        connection = _try_reader(uri + "?mode=ro&immutable=1")
    if connection is None:
        raise SessionError(f"{database} cannot be opened for reading; check its permissions")
    return connection


def _try_reader(uri: str) -> sqlite3.Connection | None:
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False
        )
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        if connection is not None:
            connection.close()
        if _primary_code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            return None
        raise
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return connection


def check_version(connection: sqlite3.Connection, database: Path) -> None:
    """Refuse a file that is no session, or one that a newer automode wrote."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables == 0:
        raise SessionError(
            f"{database} is empty: the run ended before it wrote anything; start a new session"
        )
    if application != APPLICATION_ID:
        raise SessionError(f"{database} is a SQLite file but no automode session")
    if version > SCHEMA_VERSION:
        raise SessionError(
            f"{database} has schema version {version}; this automode reads up to {SCHEMA_VERSION}: upgrade automode"
        )


def check_tables(connection: sqlite3.Connection, database: Path) -> None:
    """Refuse a file of this version that holds other tables, views or triggers than a session has.

    Raises:
        SessionCorruptError: It does.
    """
    found = {row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if found != set(_TABLES):
        raise SessionCorruptError(f"{database} does not have the tables of a session; do not trust this file")


@contextmanager
def storage_errors(folder: Path, doing: str) -> Iterator[None]:
    """Turn errors of SQLite and of the operating system into a `SessionError` that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explained(error, folder, doing) from error
    except OSError as error:
        raise explained_os_error(error, folder, doing) from error


def explained_os_error(error: OSError, folder: Path, doing: str) -> SessionError:
    """The `SessionError` for an operating-system error met while ``doing`` something in ``folder``."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            advice = "the disk is full (or the quota used up): free some space and try again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            advice = "the folder cannot be written: check its permissions"
        case errno.ENOENT:
            advice = "the folder is gone: was it moved or deleted while the run went on?"
        case _:
            advice = "check the disk and try again"
    return SessionError(f"{doing} in {folder} failed ({error}); {advice}")


def _explained(error: sqlite3.Error, folder: Path, doing: str) -> SessionError:
    match _primary_code(error):
        case sqlite3.SQLITE_FULL:
            advice = "the disk is full: free some space and try again; what was pending is still in memory"
        case sqlite3.SQLITE_IOERR:
            advice = (
                "reading or writing the disk failed: check space, quota and the disk's health, then try again"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return SessionBusyError(
                f"{doing} in {folder} failed ({error}): another process held the database for more than "
                f"{BUSY_SECONDS:.0f} s; close backup or database programs that have it open and try again"
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            advice = "the file cannot be opened for this: check that the folder exists and can be written"
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return SessionCorruptError(
                f"{doing} in {folder} failed ({error}): {DATABASE_NAME} is damaged; restore the folder from a copy"
            )
        case _:
            advice = "the transaction was rolled back; what was pending is still in memory"
    return SessionError(f"{doing} in {folder} failed ({error}); {advice}")


def _primary_code(error: sqlite3.Error) -> int:
    code = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF
