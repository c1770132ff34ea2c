"""The single writer: order, transactions, superseding, resumption."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from automode.errors import SessionBusyError, SessionError, UsageError
from automode.session import CardRow, CheckpointRow, LineageRow, Record, Session, SessionStore
from automode.session.writer_lock import held

MakeRecord = Callable[..., Record]
NAMES = ("loss", "lr")


def _rows(n: int, start: int = 0) -> np.ndarray:
    return np.arange(2 * start, 2 * (start + n), dtype=np.float64).reshape(n, 2)


def test_records_rows_and_what_they_bring_along_read_back_as_written(
    store: SessionStore, record: MakeRecord
) -> None:
    assert store.next_seq == 1
    assert store.add_rows("trunk", 1, NAMES, _rows(3)) == 0
    first = record(
        1,
        role="command",
        kind="start_trial",
        v=2,
        body={"x": math.inf, "y": [1, None, "z"]},
        cause=1,
        command_id="c-1",
        effective_at=7,
        stream="rank1",
        attempt=2,
        frame_cursor=3,
    )
    card = CardRow(card_id="c7", rev=1, state="proposed", body="reason: x\n", seq=1)
    node = LineageRow(node="n1", parents=("n0", "m"), kind="fork", card="c7", step=3, checkpoint=None, seq=1)
    mark = CheckpointRow(digest="sha256:ab", step=3, kind="base", seq=1)
    store.write([first], cards=[card], lineage=[node], checkpoints=[mark], durable=True)
    with Session.open(store.path) as session:
        assert session.header == {"project": "p"}
        assert list(session.events()) == [first]
        assert session.cards() == [card]
        assert session.lineage() == [node]
        assert session.checkpoints() == [mark]
        assert session.frame("loss").tolist() == [0.0, 2.0, 4.0]
        assert session.frame("lr").tolist() == [1.0, 3.0, 5.0]


def test_rows_stay_in_memory_until_a_write_or_half_a_second(store: SessionStore) -> None:
    with Session.open(store.path) as session:
        store.add_row("trunk", 1, NAMES, (1.0, 2.0))
        assert not store.flush_if_due(100.0)  # the first call starts the clock
        assert not store.flush_if_due(100.49)
        assert session.rows() == 0
        assert store.rows() == 1
        assert store.flush_if_due(100.5)
        assert session.rows() == 1
        store.add_row("trunk", 1, NAMES, (3.0, 4.0))
        assert not store.flush_if_due(100.9)
        assert store.flush_if_due(101.0)
        assert session.frame("loss").tolist() == [1.0, 3.0]


def test_frequent_flushes_leave_few_blocks(store: SessionStore, record: MakeRecord) -> None:
    for i in range(600):
        store.add_row("trunk", 1, NAMES, (float(i), 0.0))
        store.write([record(i + 1, frame_cursor=i + 1)], durable=False)
    store.close()
    with Session.open(store.path) as session:
        assert session.frame("loss").tolist() == list(range(600))
        blocks = session._fetch("SELECT first_row, rows FROM blocks ORDER BY first_row")
    assert blocks == [(0, 256), (256, 256), (512, 88)]


def test_how_far_a_stream_was_is_noted_only_where_it_has_moved(
    store: SessionStore, record: MakeRecord
) -> None:
    store.add_rows("trial", 1, NAMES, _rows(1))
    for seq in range(1, 5):
        store.add_rows("trunk", 1, NAMES, _rows(1))
        store.write([record(seq)], durable=False)
    with Session.open(store.path) as session:
        marks = session._fetch("SELECT stream, seq, rows FROM cursors ORDER BY stream, seq")
    assert marks == [("trial", 1, 1), *(("trunk", n, n) for n in range(1, 5))]


def test_a_long_gap_between_flushes_is_cut_into_blocks_of_bounded_size(store: SessionStore) -> None:
    store.add_rows("trunk", 1, NAMES, _rows(10_000))
    store.flush()
    with Session.open(store.path) as session:
        assert max(n for (n,) in session._fetch("SELECT rows FROM blocks")) == 4096
        assert session.frame("loss").tolist() == list(range(0, 20_000, 2))


def test_columns_may_be_one_array_or_one_array_a_name(store: SessionStore) -> None:
    store.add_rows("a", 1, NAMES, _rows(4))
    store.add_rows("b", 1, NAMES, [_rows(4)[:, 0], _rows(4)[:, 1]])
    store.add_rows("c", 1, NAMES, np.asfortranarray(_rows(4)))
    store.add_rows("d", 1, NAMES, np.concatenate([_rows(4), _rows(4)], axis=1)[:, :2])
    store.add_rows("e", 1, NAMES, [np.arange(0, 8, 2), np.arange(1, 9, 2, dtype=np.float32)])
    store.add_rows("e", 1, NAMES, np.empty((0, 2)))
    store.flush()
    with Session.open(store.path) as session:
        for stream in "abcde":
            assert session.frame("lr", stream).tolist() == [1.0, 3.0, 5.0, 7.0], stream


@pytest.mark.parametrize(
    ("names", "columns", "said"),
    [
        (NAMES, np.zeros(4), "got shape"),
        (NAMES, np.zeros((4, 3)), "got shape"),
        (NAMES, [np.zeros(3), np.zeros(4)], "equally long"),
        (NAMES, [["a"], ["b"]], "equally long arrays of numbers"),
        ((), np.zeros((4, 0)), "non-empty tuple"),
        (("a", "a"), np.zeros((4, 2)), "differ"),
        (["a", "b"], np.zeros((4, 2)), "tuple"),
        (("a", ""), np.zeros((4, 2)), "non-empty strings"),
    ],
)
def test_rows_that_do_not_fit_their_names_are_refused_and_leave_nothing(
    store: SessionStore, names: tuple[str, ...], columns: np.ndarray, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        store.add_rows("trunk", 1, names, columns)
    assert store.rows() == 0
    store.flush()


@pytest.mark.parametrize("values", [(1.0,), (1.0, 2.0, 3.0), (1.0, "x"), (1.0, None)])
def test_a_row_that_does_not_fit_is_refused_and_leaves_nothing(
    store: SessionStore, values: tuple[float, ...]
) -> None:
    store.add_row("trunk", 1, NAMES, (1.0, 2.0))
    with pytest.raises(UsageError, match="a row of stream 'trunk'"):
        store.add_row("trunk", 1, NAMES, values)
    store.add_row("trunk", 1, NAMES, (3.0, 4.0))
    store.flush()
    with Session.open(store.path) as session:
        assert session.frame("lr").tolist() == [2.0, 4.0]


def test_streams_without_a_name_and_attempts_below_one_are_refused(store: SessionStore) -> None:
    for stream in ("", "\ud800"):
        with pytest.raises(UsageError, match="stream"):
            store.add_rows(stream, 1, NAMES, _rows(1))
    with pytest.raises(UsageError, match="attempt"):
        store.add_rows("trunk", 0, NAMES, _rows(1))


def test_the_log_has_no_gap_and_no_repetition(store: SessionStore, record: MakeRecord) -> None:
    store.write([record(1), record(2)], durable=False)
    for wrong in ([record(2)], [record(4)], [record(3), record(5)], [record(3), record(3)]):
        with pytest.raises(UsageError, match="the log goes on with record"):
            store.write(wrong, durable=False)
    store.write([record(3)], durable=False)
    with Session.open(store.path) as session:
        assert [r.seq for r in session.events()] == [1, 2, 3]


def test_frame_cursors_never_go_back_nor_beyond_the_rows(store: SessionStore, record: MakeRecord) -> None:
    store.add_rows("trunk", 1, NAMES, _rows(5))
    store.write([record(1, frame_cursor=2), record(2, frame_cursor=4)], durable=False)
    for cursor in (3, 6, -1):
        with pytest.raises(UsageError, match=f"follows {cursor} trunk rows"):
            store.write([record(3, frame_cursor=cursor)], durable=False)
    store.write([record(3, frame_cursor=5)], durable=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"role": "guess"},
        {"kind": ""},
        {"t_wall": math.nan},
        {"t_mono": math.inf},
        {"cause": 2**63},
        {"effective_at": "soon"},
        {"attempt": None},
        {"body": [1]},
        {"kind": "\ud800"},
        {"body": {"x": object()}},
    ],
)
def test_a_record_that_the_log_cannot_hold_is_refused_and_nothing_is_written(
    store: SessionStore, record: MakeRecord, fields: dict[str, object]
) -> None:
    with pytest.raises(UsageError):
        store.write([record(1), record(2, **fields)], durable=False)
    with Session.open(store.path) as session:
        assert list(session.events(include_superseded=True)) == []
    assert store.next_seq == 1


def test_cards_and_checkpoints_must_belong_to_a_record_of_the_log(
    store: SessionStore, record: MakeRecord
) -> None:
    card = CardRow(card_id="c7", rev=1, state="proposed", body="", seq=2)
    with pytest.raises(UsageError, match="c7 refers to record 2"):
        store.write([record(1)], cards=[card], durable=False)
    store.write([record(1), record(2)], cards=[card], durable=False)


def test_superseding_keeps_everything_but_takes_it_out_of_the_story(
    store: SessionStore, record: MakeRecord
) -> None:
    store.add_rows("trunk", 1, NAMES, _rows(10))
    store.add_rows("trial", 1, NAMES, _rows(4))
    store.write(
        [record(1, frame_cursor=6)],
        cards=[CardRow(card_id="c", rev=1, state="proposed", body="", seq=1)],
        durable=True,
    )
    store.add_rows("trial", 1, NAMES, _rows(3))
    store.add_rows("late", 1, NAMES, _rows(2))
    store.write(
        [record(2, frame_cursor=10)],
        cards=[CardRow(card_id="c", rev=1, state="approved", body="", seq=2)],
        lineage=[LineageRow(node="n", parents=(), kind="fork", card="c", step=1, checkpoint=None, seq=2)],
        checkpoints=[CheckpointRow(digest="sha256:0", step=1, kind="x", seq=2)],
        durable=True,
    )
    store.add_rows("trunk", 1, NAMES, _rows(5))  # still in memory: superseded all the same
    store.write([record(3, kind="rewound", frame_cursor=15)], durable=True, supersede_after=1)
    assert store.rows("trunk") == 15
    store.add_rows("trunk", 2, NAMES, _rows(2, start=100))
    store.flush()
    with Session.open(store.path) as session:
        assert [r.seq for r in session.events()] == [1, 3]
        assert [r.seq for r in session.events(include_superseded=True)] == [1, 2, 3]
        assert session.frame("loss").tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 200.0, 202.0]
        assert session.frame("row").tolist() == [0, 1, 2, 3, 4, 5, 15, 16]
        assert session.frame("attempt").tolist() == [1] * 6 + [2] * 2
        assert session.rows(include_superseded=True) == 17
        assert session.rows("trial") == 4
        assert session.rows("late") == 0
        assert [c.state for c in session.cards()] == ["proposed"]
        assert [c.state for c in session.revisions("c", include_superseded=True)] == ["proposed", "approved"]
        assert (session.lineage(), session.checkpoints()) == ([], [])
        assert len(session.lineage(include_superseded=True)) == 1
        assert len(session.checkpoints(include_superseded=True)) == 1


def test_going_back_to_the_beginning_and_going_back_twice(store: SessionStore, record: MakeRecord) -> None:
    store.add_rows("trunk", 1, NAMES, _rows(3))
    store.write([record(1, frame_cursor=1), record(2, frame_cursor=3)], durable=True)
    store.supersede(1)
    store.add_rows("trunk", 2, NAMES, _rows(3))
    store.write([record(3, frame_cursor=6)], durable=True)
    store.supersede(0)
    store.write([record(4, frame_cursor=6)], durable=True)
    with Session.open(store.path) as session:
        assert [r.seq for r in session.events()] == [4]
        assert session.rows() == 0
        assert session.frame("loss").shape == (0,)


def test_going_back_to_what_is_not_there_or_no_longer_counts_is_refused(
    store: SessionStore, record: MakeRecord
) -> None:
    store.write([record(1), record(2), record(3)], durable=True)
    for wrong in (-1, 4):
        with pytest.raises(UsageError, match="the log has 1 to 3"):
            store.supersede(wrong)
    store.supersede(1)
    with pytest.raises(UsageError, match="is superseded"):
        store.supersede(2)
    with Session.open(store.path) as session:
        assert [r.seq for r in session.events()] == [1]


def test_a_session_is_taken_up_where_it_ended(tmp_path: Path, record: MakeRecord) -> None:
    with SessionStore.create(tmp_path, header={}) as store:
        store.add_rows("trunk", 1, NAMES, _rows(3))
        store.add_rows("trial", 1, ("z",), np.ones((2, 1)))
        store.write([record(1, frame_cursor=2)], durable=True)
        store.add_rows("trunk", 1, NAMES, _rows(1, start=3))
    with SessionStore.open(tmp_path) as store:
        assert (store.next_seq, store.rows(), store.rows("trial"), store.rows("new")) == (2, 4, 2, 0)
        with pytest.raises(UsageError, match="follows 1 trunk rows"):
            store.write([record(2, frame_cursor=1)], durable=True)
        assert store.add_rows("trunk", 2, NAMES, _rows(2, start=4)) == 4
        assert store.add_rows("trunk", 2, ("z", "loss"), np.ones((1, 2))) == 6
        store.write([record(2, frame_cursor=7)], durable=True)
    with Session.open(tmp_path) as session:
        assert session.frame("loss").tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 1.0]
        assert session.frame("attempt").tolist() == [1, 1, 1, 1, 2, 2, 2]
        assert np.isnan(session.frame("lr")[-1])
        assert session.streams() == ("trial", "trunk")


def test_superseding_after_resumption_still_knows_what_other_streams_had(
    tmp_path: Path, record: MakeRecord
) -> None:
    with SessionStore.create(tmp_path, header={}) as store:
        store.add_rows("trial", 1, NAMES, _rows(3))
        store.write([record(1)], durable=True)
        store.add_rows("trial", 1, NAMES, _rows(3))
        store.write([record(2)], durable=True)
    with SessionStore.open(tmp_path) as store:
        store.add_rows("trial", 2, NAMES, _rows(1))
        store.supersede(1)
    with Session.open(tmp_path) as session:
        assert session.rows("trial") == 3


def test_a_closed_session_is_one_file_without_journals(store: SessionStore, record: MakeRecord) -> None:
    store.write([record(1)], durable=True)
    assert (store.path / "session.db-wal").exists()
    store.close()
    store.close()
    assert sorted(p.name for p in store.path.iterdir() if p.name.startswith("session.db")) == ["session.db"]
    assert "closed" in repr(store)
    for use in (
        lambda: store.write([record(2)], durable=True),
        lambda: store.add_rows("trunk", 1, NAMES, _rows(1)),
        lambda: store.add_row("trunk", 1, NAMES, (1.0, 2.0)),
    ):
        with pytest.raises(SessionError, match="is closed"):
            use()


def test_a_folder_that_holds_a_session_is_not_used_for_another(store: SessionStore) -> None:
    store.close()
    with pytest.raises(SessionError, match="holds a session already"):
        SessionStore.create(store.path, header={})
    SessionStore.open(store.path).close()


def test_opening_what_is_no_session_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="is no session"):
        SessionStore.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_and_told_who_writes(store: SessionStore) -> None:
    with pytest.raises(SessionBusyError, match=f"process {os.getpid()} on "):
        SessionStore.open(store.path)
    code = (
        "import sys; from automode.errors import SessionBusyError; from automode.session import SessionStore\n"
        "try: SessionStore.open(sys.argv[1])\nexcept SessionBusyError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(store.path)], capture_output=True, text=True, check=True
    )
    assert f"process {os.getpid()} on " in out.stdout
    store.close()
    SessionStore.open(store.path).close()


def test_whether_a_run_writes_can_be_asked_without_disturbing_it(store: SessionStore) -> None:
    code = "import sys; from pathlib import Path; from automode.session.writer_lock import held; print(held(Path(sys.argv[1])))"

    def elsewhere() -> str:
        command = [sys.executable, "-c", code, str(store.path)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    assert held(store.path)
    assert elsewhere() == "True"
    assert store.next_seq == 1  # and the run goes on
    store.add_rows("trunk", 1, NAMES, _rows(1))
    store.close()
    assert not held(store.path)
    assert elsewhere() == "False"
    assert not held(store.path.parent)


def test_the_lock_is_free_again_when_opening_fails(tmp_path: Path) -> None:
    (tmp_path / "session.db").write_bytes(b"no database at all" * 100)
    for _ in range(2):
        with pytest.raises(SessionError) as caught:
            SessionStore.open(tmp_path)
        assert not isinstance(caught.value, SessionBusyError)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_cannot_write_and_does_not_disturb_the_parent(
    store: SessionStore, record: MakeRecord
) -> None:
    store.add_row("trunk", 1, NAMES, (1.0, 2.0))

    def child(queue: multiprocessing.Queue[str]) -> None:
        try:
            store.write([record(1)], durable=True)
        except SessionError as error:
            queue.put(str(error))
        store.close()

    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert "a forked process cannot write it" in queue.get(timeout=30)
    process.join(30)
    assert process.exitcode == 0
    with pytest.raises(SessionBusyError):
        SessionStore.open(store.path)
    store.write([record(1, frame_cursor=1)], durable=True)
    with Session.open(store.path) as session:
        assert session.rows() == 1


def test_another_thread_of_the_writer_is_refused(store: SessionStore, record: MakeRecord) -> None:
    errors: list[Exception] = []

    def other() -> None:
        try:
            store.write([record(1)], durable=True)
        except SessionError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "thread" in str(errors[0])
    store.write([record(1)], durable=True)
