"""Full disks, failing calls, interrupts, refused journals: the file stays good and the memory keeps what is pending."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode.errors import SessionBusyError, SessionError
from automode.session import (
    CardRow,
    CheckpointRow,
    LineageRow,
    Record,
    Session,
    SessionStore,
    database,
)

MakeRecord = Callable[..., Record]
NAMES = ("a", "b", "c")


def _fill(opened: SessionStore, rows: int) -> None:
    opened.add_rows("trunk", 1, NAMES, np.random.default_rng(0).standard_normal((rows, 3)))


def _connection(opened: SessionStore) -> sqlite3.Connection:
    assert opened._connection is not None
    return opened._connection


def test_on_a_full_disk_nothing_is_written_nothing_is_lost_and_a_retry_succeeds(
    store: SessionStore, record: MakeRecord
) -> None:
    store.write([record(1)], durable=True)
    pages = _connection(store).execute("PRAGMA page_count").fetchone()[0]
    _connection(store).execute(f"PRAGMA max_page_count={pages + 3}")
    _fill(store, 5000)
    for _ in range(3):
        with pytest.raises(SessionError, match=r"disk is full.*free some space"):
            store.write([record(2, frame_cursor=5000)], durable=True)
        assert not store.flush_if_due(0.0)
    with pytest.raises(SessionError, match="disk is full"):
        store.flush_if_due(1.0)
    with Session.open(store.path) as session:
        assert session.last_seq() == 1
        assert session.rows() == 0
    _fill(store, 10)
    _connection(store).execute("PRAGMA max_page_count=1000000")
    assert store.flush_if_due(2.0)
    store.write([record(2, frame_cursor=5000)], durable=True)
    with Session.open(store.path) as session:
        assert session.last_seq() == 2
        expected = np.random.default_rng(0).standard_normal((5000, 3))[:, 1]
        np.testing.assert_array_equal(session.frame("b")[:5000], expected)
        np.testing.assert_array_equal(session.frame("b")[5000:], expected[:10])


def test_closing_on_a_full_disk_can_be_tried_again(store: SessionStore) -> None:
    pages = _connection(store).execute("PRAGMA page_count").fetchone()[0]
    _connection(store).execute(f"PRAGMA max_page_count={pages}")
    _fill(store, 5000)
    with pytest.raises(SessionError, match="disk is full"):
        store.close()
    with pytest.raises(SessionBusyError):
        SessionStore.open(store.path)
    _connection(store).execute("PRAGMA max_page_count=1000000")
    store.close()
    with Session.open(store.path) as session:
        assert session.rows() == 5000


def test_leaving_the_block_on_a_full_disk_frees_the_session_and_keeps_the_first_error(
    tmp_path: Path, record: MakeRecord
) -> None:
    def run(error: Exception | None) -> None:
        with SessionStore.open(tmp_path) as opened:
            _connection(opened).execute("PRAGMA max_page_count=1")
            _fill(opened, 5000)
            if error is not None:
                raise error

    SessionStore.create(tmp_path, header={}).close()
    with pytest.raises(SessionError, match="disk is full"):
        run(None)
    with pytest.raises(KeyError, match="the first") as caught:
        run(KeyError("the first"))
    assert "closing the session failed as well" in caught.value.__notes__[0]
    SessionStore.open(tmp_path).close()


def test_a_limit_on_file_size_is_an_error_that_a_person_can_act_on(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    code = """
import resource, sys
import numpy as np
from automode.errors import SessionError
from automode.session import Record, SessionStore
store = SessionStore.create(sys.argv[1], header={})
def record(seq):
    return Record(seq=seq, role="input", kind="k", v=1, body={}, t_wall=0.0, t_mono=0.0)
store.write([record(1)], durable=True)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
store.add_rows("trunk", 1, ("a",), np.arange(100_000.0)[:, None])
try:
    store.write([record(2)], durable=True)
except SessionError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
store.write([record(2)], durable=True)
store.close()
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "writing the session" in out.stdout
    assert "then try again" in out.stdout
    with Session.open(tmp_path) as session:
        assert session.last_seq() == 2
        np.testing.assert_array_equal(session.frame("a"), np.arange(100_000.0))


class _Faulty:
    """A connection whose k-th statement fails, once."""

    def __init__(self, connection: sqlite3.Connection, at: int, error: BaseException) -> None:
        self._connection, self._left, self._error = connection, at, error

    def _count(self, statement: str) -> None:
        if statement == "ROLLBACK":
            return
        self._left -= 1
        if self._left == 0:
            raise self._error

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        self._count(statement)
        return self._connection.execute(statement, *values)

    def executemany(self, statement: str, *values: Any) -> sqlite3.Cursor:
        self._count(statement)
        return self._connection.executemany(statement, *values)

    def close(self) -> None:
        self._connection.close()

    @property
    def in_transaction(self) -> bool:
        return self._connection.in_transaction


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), KeyboardInterrupt()], ids=repr)
def test_whichever_statement_fails_the_transaction_is_as_if_it_had_not_been_tried(
    tmp_path: Path, record: MakeRecord, error: BaseException
) -> None:
    failures = 0
    for at in range(1, 100):
        with SessionStore.create(tmp_path / str(at), header={}) as opened:
            _fill(opened, 10)
            opened.write([record(1, frame_cursor=10)], durable=False)
            _fill(opened, 5)
            real = _connection(opened)
            opened._connection = _Faulty(real, at, error)  # type: ignore[assignment]
            extra: dict[str, Any] = {
                "cards": [CardRow(card_id="c", rev=1, state="s", body="", seq=2)],
                "lineage": [
                    LineageRow(node="n", parents=(), kind="k", card=None, step=0, checkpoint=None, seq=2)
                ],
                "checkpoints": [CheckpointRow(digest="d", step=0, kind="k", seq=2)],
            }
            try:
                opened.write([record(2, frame_cursor=15)], **extra, durable=True, supersede_after=1)
            except (SessionError, KeyboardInterrupt):
                failures += 1
                opened._connection = real
                with Session.open(opened.path) as session:
                    assert (session.last_seq(), session.rows(), session.cards()) == (1, 10, [])
                opened.write([record(2, frame_cursor=15)], **extra, durable=True, supersede_after=1)
            else:
                opened._connection = real
                assert failures >= 10  # every statement of the transaction had its turn
                return
            with Session.open(opened.path) as session:
                assert [r.seq for r in session.events()] == [1, 2]
                assert (session.rows(), session.rows(include_superseded=True)) == (10, 15)
                assert len(session.cards()) == len(session.lineage()) == len(session.checkpoints()) == 1
    pytest.fail("the write never got through")


def test_an_interrupt_right_after_the_commit_does_not_write_anything_twice(
    store: SessionStore, record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(store, 10)
    real = store._committed

    def interrupted(*args: Any) -> None:
        monkeypatch.setattr(store, "_committed", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_committed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.write([record(1, frame_cursor=10)], durable=True)
    assert store.next_seq == 2
    _fill(store, 3)
    store.write([record(2, frame_cursor=13)], durable=True)
    with Session.open(store.path) as session:
        assert [r.seq for r in session.events()] == [1, 2]
        assert session.rows() == 13


@pytest.mark.skipif(os.name == "nt", reason="the VFS without shared memory exists on POSIX only")
def test_where_shared_memory_is_refused_the_rollback_journal_serves(
    tmp_path: Path, record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = database.writer_uri
    monkeypatch.setattr(database, "writer_uri", lambda path: real(path) + "&vfs=unix-dotfile")
    with SessionStore.create(tmp_path, header={}) as opened:
        assert opened.journal == "delete"
        _fill(opened, 10)
        opened.write([record(1, frame_cursor=10)], durable=True)
        assert not (tmp_path / "session.db-wal").exists()
    monkeypatch.undo()
    with SessionStore.open(tmp_path) as opened:
        assert opened.journal == "wal"
        opened.write([record(2, frame_cursor=10)], durable=True)
    with Session.open(tmp_path) as session:
        assert [r.seq for r in session.events()] == [1, 2]
        assert session.rows() == 10


def _failing(name: str, at: int, code: int) -> Iterator[Callable[..., Any]]:
    real = getattr(os, name)
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    yield call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize(("call", "at"), [("mkdir", 1), ("mkdir", 2), ("mkdir", 4), ("fsync", 1)])
def test_a_session_that_cannot_be_created_says_why_and_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int, code: int
) -> None:
    for faulty in _failing(call, at, code):
        monkeypatch.setattr(os, call, faulty)
        with pytest.raises(SessionError, match="creating the session") as caught:
            SessionStore.create(tmp_path / "run", header={})
        monkeypatch.undo()
    wanted = {errno.ENOSPC: "free some space", errno.EIO: "check the disk", errno.EACCES: "permissions"}
    assert wanted[code] in str(caught.value)
    (tmp_path / "run" / "session.db").unlink(missing_ok=True)
    SessionStore.create(tmp_path / "run", header={}).close()


def test_a_database_that_somebody_holds_is_reported_as_busy(
    store: SessionStore, record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sqlite3.connect(store.path / "session.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    _connection(store).execute("PRAGMA busy_timeout=20")
    with pytest.raises(SessionBusyError, match="another process held the database"):
        store.write([record(1)], durable=True)
    other.close()
    store.write([record(1)], durable=True)
