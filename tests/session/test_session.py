"""Reading: while the run writes, after it has ended, and when the files are not what they should be."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session import CardRow, LineageRow, Record, Session, SessionStore, database, replay_feed

MakeRecord = Callable[..., Record]


@pytest.fixture
def ended(tmp_path: Path, record: MakeRecord) -> Path:
    """A closed session: 3000 trunk rows, 40 records, one card."""
    with SessionStore.create(tmp_path / "ended", header={"project": "p"}) as store:
        for i in range(40):
            store.add_rows(
                "trunk", 1, ("loss", "lr"), np.random.default_rng(i).standard_normal((75, 2)).round(6)
            )
            store.write([record(i + 1, frame_cursor=75 * (i + 1), body={"text": "x" * 300})], durable=False)
        store.write(
            [record(41, frame_cursor=3000)],
            cards=[CardRow(card_id="c", rev=1, state="proposed", body="b", seq=41)],
            durable=True,
        )
    return tmp_path / "ended"


def _read_all(path: Path) -> tuple[object, ...]:
    with Session.open(path) as session:
        return (
            session.header,
            list(session.events()),
            {name: values.tobytes() for name, values in session.frames().items()},
            session.cards(),
            session.lineage(),
            session.checkpoints(),
        )


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_a_path_that_is_no_session_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SessionError, match="is no session"):
        Session.open(tmp_path / "x")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_that_no_file_can_have_and_a_header_that_is_none_are_errors_of_ours(ended: Path) -> None:
    with pytest.raises(SessionError, match="File name too long"):
        Session.open("x" * 5000)
    with contextlib.closing(sqlite3.connect(ended / "session.db")) as connection, connection:
        connection.execute("UPDATE meta SET value = '[]' WHERE key = 'header'")
    with pytest.raises(SessionCorruptError, match="header"):
        Session.open(ended)


def test_the_database_inside_the_folder_may_be_named_instead(ended: Path) -> None:
    with Session.open(ended / "session.db") as session:
        assert session.path == ended


def test_a_sqlite_file_of_another_program_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "session.db") as other:
        other.execute("CREATE TABLE t(x)")
    other.close()
    with pytest.raises(SessionError, match="no automode session"):
        Session.open(tmp_path)


def test_a_session_killed_before_its_first_commit_says_so(tmp_path: Path) -> None:
    (tmp_path / "session.db").touch()
    with pytest.raises(SessionError, match="is empty: the run ended before it wrote anything"):
        Session.open(tmp_path)


def test_a_session_of_a_newer_version_is_refused_by_reader_and_writer(ended: Path) -> None:
    with sqlite3.connect(ended / "session.db") as other:
        other.execute(f"PRAGMA user_version={database.SCHEMA_VERSION + 1}")
    other.close()
    for opener in (Session.open, SessionStore.open):
        with pytest.raises(SessionError, match="upgrade automode"):
            opener(ended)


@pytest.mark.parametrize(
    ("statement", "reading"),
    [
        (
            "UPDATE blocks SET data = zeroblob(length(data)) WHERE first_row = 300",
            lambda s: s.frame("loss"),
        ),
        ("UPDATE blocks SET data = substr(data, 9)", lambda s: s.frame("loss")),
        ("UPDATE blocks SET attempt = 2 WHERE first_row = 300", lambda s: s.frame("loss")),
        ("UPDATE blocks SET schema = 9", lambda s: s.frame("row")),
        ('UPDATE schemas SET names = \'["lr","loss"]\'', lambda s: s.frame("loss")),
        ("DELETE FROM blocks WHERE first_row = 300", lambda s: s.frame("loss")),
        ("DELETE FROM blocks WHERE first_row = 300", lambda s: list(s.iter_replay())),
        ("DELETE FROM blocks WHERE first_row = 0", lambda s: s.frame("loss")),
        ("DELETE FROM blocks WHERE first_row = 2700", lambda s: list(s.iter_replay())),
        ("DELETE FROM events WHERE seq = 7", Session.verify),
        ("DROP TABLE dead_rows", Session.verify),
        ("UPDATE events SET body = '{}' WHERE seq = 7", lambda s: list(s.events())),
        ("UPDATE events SET kind = 'other' WHERE seq = 7", lambda s: list(s.iter_replay())),
        ("UPDATE events SET t_mono = t_mono + 1 WHERE seq = 7", lambda s: list(s.events())),
    ],
)
def test_a_changed_block_or_record_is_found(
    ended: Path, statement: str, reading: Callable[[Session], object]
) -> None:
    with sqlite3.connect(ended / "session.db") as other:
        other.execute(statement)
    other.close()
    with Session.open(ended) as session:
        for look in (reading, Session.verify):
            with pytest.raises(SessionCorruptError):
                look(session)


def test_damaged_bytes_give_an_error_of_ours_and_never_other_numbers_or_records(
    ended: Path, tmp_path: Path
) -> None:
    good = (ended / "session.db").read_bytes()
    _, events, frames, *_ = _read_all(ended)
    chance = random.Random(5)
    refused = 0
    broken = tmp_path / "broken"
    broken.mkdir()
    for _ in range(150):
        data = bytearray(good)
        match chance.randrange(3):
            case 0:
                data = data[: chance.randrange(len(data))]
            case 1:
                at = chance.randrange(len(data) - 64)
                data[at : at + 64] = chance.randbytes(64)
            case _:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (broken / "session.db").write_bytes(data)
        try:
            found = _read_all(broken)
        except SessionError:
            refused += 1
        else:
            # Damage to slack space, or to tables without checksums, may go unseen; numbers and records may not change.
            assert found[1] == events
            assert found[2] == frames
    assert refused > 50


def test_a_reader_follows_a_writer_in_another_process(tmp_path: Path) -> None:
    code = """
import sys
from automode.session import Record, SessionStore
with SessionStore.create(sys.argv[1], header={}) as store:
    print("made", flush=True)
    for seq in range(1, 401):
        if seq == 201:
            sys.stdin.readline()
        for _ in range(5):
            store.add_row("trunk", 1, ("n",), (float(store.rows()),))
        store.write([Record(seq=seq, role="fact", kind="k", v=1, body={"n": seq}, t_wall=0.0, t_mono=0.0,
                            frame_cursor=store.rows())], durable=seq % 50 == 0)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "made\n"
        seen, turns = 0, 0
        with Session.open(tmp_path) as session:
            while seen < 400:
                for item in session.events(after=seen):
                    assert item.seq == seen + 1
                    assert item.body == {"n": item.seq}
                    seen = item.seq
                values = session.frame("n")
                assert values.tolist() == list(range(len(values)))
                assert len(values) >= 5 * seen  # a record never shows before the rows that it follows
                rows = [i for i in session.iter_replay() if i[0] == "rows"]
                assert sum(len(i[3]) for i in rows) >= 5 * seen
                turns += 1
                assert writer.poll() in (None, 0)
                if seen and not writer.stdin.closed:  # the second half is written while somebody reads
                    writer.stdin.close()
        assert writer.wait(30) == 0
    assert turns > 1


def test_a_slow_reader_does_not_stop_the_writer_and_sees_one_state(
    store: SessionStore, record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_feed, "_RECORDS_PAGE", 4)
    monkeypatch.setattr(replay_feed, "_BLOCKS_PAGE", 4)
    for i in range(30):
        store.add_rows("trunk", 1, ("n",), np.arange(300.0 * i, 300.0 * (i + 1))[:, None])
        store.write([record(i + 1, frame_cursor=300 * (i + 1))], durable=False)
    store.supersede(20)
    with Session.open(store.path) as session:
        replay = session.iter_replay()
        first = [next(replay) for _ in range(4)]
        store.add_rows("trunk", 1, ("n",), np.zeros((5, 1)))
        store.write([record(31, frame_cursor=9005)], durable=True, supersede_after=3)
        items = [*first, *replay]
        assert [i[1].seq for i in items if i[0] == "record"] == list(range(1, 21))
        table = np.concatenate([i[3][:, 0] for i in items if i[0] == "rows"])
        assert table.tolist() == list(range(6000))
        assert [i[1].seq for i in session.iter_replay() if i[0] == "record"] == [1, 2, 3, 31]


def test_one_session_may_be_read_from_many_threads(ended: Path) -> None:
    wanted = _read_all(ended)[1:3]
    failures: list[BaseException] = []
    with Session.open(ended) as session:

        def read() -> None:
            try:
                for _ in range(5):
                    assert list(session.events()) == wanted[0]
                    assert {n: v.tobytes() for n, v in session.frames().items()} == wanted[1]
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_an_unclosed_session_can_be_copied_and_read(store: SessionStore, record: MakeRecord) -> None:
    store.add_rows("trunk", 1, ("n",), np.ones((3, 1)))
    store.write([record(1, frame_cursor=3)], durable=True)
    copy = store.path.with_name("copy")
    copy.mkdir()
    for name in ("session.db", "session.db-wal"):
        shutil.copy(store.path / name, copy / name)
    with Session.open(copy) as session:
        assert session.last_seq() == 1
        assert session.rows() == 3


def _refusing_connect(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make SQLite behave as in a folder that cannot be written, unless the file is opened as immutable."""
    real, uris = sqlite3.connect, []

    def connect(name: str, **options: object) -> sqlite3.Connection:
        uris.append(name)
        if "immutable=1" not in name:
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        return real(name, **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    return uris


def test_a_closed_session_on_read_only_media_can_be_read(
    ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = _refusing_connect(monkeypatch)
    with Session.open(ended) as session:
        assert session.last_seq() == 41
    assert ["immutable=1" in uri for uri in uris] == [False, True]


def test_an_unclosed_session_on_read_only_media_is_refused_with_advice(
    ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ended / "session.db-wal").write_bytes(b"pending")
    _refusing_connect(monkeypatch)
    with pytest.raises(SessionError, match="copy the session folder"):
        Session.open(ended)


def test_unknown_columns_and_streams_are_refused_with_a_hint(ended: Path) -> None:
    with Session.open(ended) as session:
        with pytest.raises(UsageError, match="no column 'los'; did you mean 'loss'"):
            session.frame("los")
        with pytest.raises(UsageError, match="no column 'zzz'; there are 'attempt', 'loss', 'lr', 'row'"):
            session.frame("zzz")
        with pytest.raises(UsageError, match="no stream 'trunc'; did you mean 'trunk'"):
            session.frame("loss", "trunc")


def test_a_trunk_without_rows_yet_is_empty_not_an_error(store: SessionStore) -> None:
    with Session.open(store.path) as session:
        assert session.frame("loss").shape == (0,)
        assert {n: v.shape for n, v in session.frames().items()} == {"row": (0,), "attempt": (0,)}
        assert session.rows() == 0
        assert session.streams() == ()
        assert list(session.iter_replay()) == []


def test_columns_that_a_schema_lacked_are_nan(store: SessionStore) -> None:
    store.add_rows("trunk", 1, ("a",), np.ones((2, 1)))
    store.add_rows("trunk", 1, ("a", "b"), np.full((2, 2), 2.0))
    store.flush()
    with Session.open(store.path) as session:
        np.testing.assert_array_equal(session.frame("a"), [1, 1, 2, 2])
        np.testing.assert_array_equal(session.frame("b"), [np.nan, np.nan, 2, 2])
        assert list(session.frames()) == ["row", "attempt", "a", "b"]


def test_cards_and_lineage_show_what_was_written_last(store: SessionStore, record: MakeRecord) -> None:
    def card(name: str, rev: int, state: str, seq: int) -> CardRow:
        return CardRow(card_id=name, rev=rev, state=state, body=f"rev: {rev}", seq=seq)

    def node(step: int, checkpoint: str | None, seq: int) -> LineageRow:
        return LineageRow(
            node="n", parents=("root",), kind="fork", card="b", step=step, checkpoint=checkpoint, seq=seq
        )

    store.write(
        [record(1), record(2)],
        cards=[card("b", 1, "proposed", 1), card("a", 1, "proposed", 2)],
        lineage=[node(1, None, 1)],
        durable=False,
    )
    store.write(
        [record(3)],
        cards=[card("b", 2, "proposed", 3), card("b", 2, "approved", 3)],
        lineage=[node(1, "sha256:1", 3)],
        durable=False,
    )
    with Session.open(store.path) as session:
        assert [(c.card_id, c.rev, c.state) for c in session.cards()] == [
            ("b", 2, "approved"),
            ("a", 1, "proposed"),
        ]
        assert [(c.rev, c.state) for c in session.revisions("b")] == [
            (1, "proposed"),
            (2, "proposed"),
            (2, "approved"),
        ]
        assert session.revisions("zzz") == []
        assert session.lineage() == [node(1, "sha256:1", 3)]


def test_many_records_are_read_page_by_page(store: SessionStore, record: MakeRecord) -> None:
    store.write([record(i) for i in range(1, 1500)], durable=False)
    with Session.open(store.path) as session:
        assert [r.seq for r in session.events()] == list(range(1, 1500))
        assert [r.seq for r in session.events(after=1400)] == list(range(1401, 1500))
        assert len(list(session.iter_replay())) == 1499


def test_the_log_file_is_read_and_torn_lines_are_told_apart(store: SessionStore) -> None:
    with Session.open(store.path) as session:
        assert list(session.log()) == []
        (store.path / "log.jsonl").write_bytes(b'{"event":"a"}\n{"event":"b\n[1]\n\xff\xfe\n{"event":"c"}')
        assert list(session.log()) == [
            {"event": "a"},
            {"unreadable": '{"event":"b'},
            {"unreadable": "[1]"},
            {"unreadable": "\ufffd\ufffd"},
            {"event": "c"},
        ]


def test_a_closed_reader_says_so(ended: Path) -> None:
    session = Session.open(ended)
    assert "41 records, 3000 rows, 1 cards" in repr(session)
    assert "41 records" in session._repr_html_()
    session.close()
    session.close()
    assert "closed" in repr(session)
    with pytest.raises(SessionError, match="is closed"):
        session.rows()


def test_html_of_a_hostile_path_is_escaped(tmp_path: Path) -> None:
    SessionStore.create(tmp_path / "<b>x", header={}).close()
    with Session.open(tmp_path / "<b>x") as session:
        assert "<b>" not in session._repr_html_()


def test_replaying_a_long_log_starts_at_once_and_reads_no_more_than_it_hands_out(
    ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.open(ended) as session:
        items: Iterator[object] = session.iter_replay()
        pages = 0
        real = session._snapshot

        def counted() -> object:
            nonlocal pages
            pages += 1
            return real()

        monkeypatch.setattr(session, "_snapshot", counted)
        items = session.iter_replay()
        next(items)
        assert pages == 3  # the state, one page of records, one page of blocks
