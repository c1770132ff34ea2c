"""Requests from other processes: whole, in order, once, and never the end of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from automode.errors import SessionError, UsageError
from automode.session import SessionStore
from automode.session.inbox import MAX_BYTES, Inbox, is_request_id, post, withdraw

GOOD_NAME = "00000000000000000001-0000001-00000001-0123abcd.json"


def _requests(box: Inbox, now: float) -> list[dict[str, Any]]:
    return [request for _, request in box.poll(now)]


def test_requests_arrive_once_and_in_order(store: SessionStore) -> None:
    box = Inbox(store.path)
    ids = [post(store.path, {"n": n, "x": float("inf")}) for n in range(50)]
    assert ids == sorted(ids)
    assert box.poll(0.0) == [(i, {"n": n, "x": float("inf")}) for n, i in enumerate(ids)]
    assert box.poll(1.0) == []
    last = post(store.path, {"n": 50})
    assert box.poll(2.0) == [(last, {"n": 50})]


def test_order_holds_even_if_the_wall_clock_jumps_back(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    times = iter([now + 10**9, now, now - 10**12])
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    for n in range(3):
        post(store.path, {"n": n})
    assert _requests(Inbox(store.path), 0.0) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_the_folder_is_looked_at_every_fifth_of_a_second(store: SessionStore) -> None:
    box = Inbox(store.path)
    assert box.poll(10.0) == []
    post(store.path, {"n": 1})
    assert box.poll(10.19) == []
    assert _requests(box, 10.25) == [{"n": 1}]


def test_a_request_that_was_not_done_is_found_again_by_the_next_run(store: SessionStore) -> None:
    first, second = post(store.path, {"n": 1}), post(store.path, {"n": 2})
    box = Inbox(store.path)
    assert len(box.poll(0.0)) == 2
    box.done(first)
    box.done(first)
    assert Inbox(store.path).poll(0.0) == [(second, {"n": 2})]


def test_only_ids_can_be_done(store: SessionStore) -> None:
    for name in ("../session", "", "x", GOOD_NAME):
        with pytest.raises(UsageError, match="no request id"):
            Inbox(store.path).done(name)
    assert (store.path / "session.db").exists()


@pytest.mark.parametrize(
    ("request_", "said"),
    [({"x": "y" * MAX_BYTES}, "may have 1000000 bytes"), ({"x": object()}, "cannot be stored as JSON")],
)
def test_a_request_that_cannot_be_sent_is_refused_where_it_is_made(
    store: SessionStore, request_: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        post(store.path, request_)
    assert list((store.path / "inbox").iterdir()) == []


def test_posting_to_what_is_no_session_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="is no session"):
        post(tmp_path / "x", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("card.yaml", lambda p: p.write_text("a: 1"), "not named like a request"),
        (GOOD_NAME, lambda p: p.write_text("{"), "cannot be read"),
        (GOOD_NAME, lambda p: p.write_text("[1]"), "holds a list where a mapping was needed"),
        (GOOD_NAME, lambda p: p.write_text('{"a": NaN}'), "cannot be read"),
        (GOOD_NAME, lambda p: p.write_bytes(b'{"a": "\xff"}'), "no UTF-8"),
        (GOOD_NAME, lambda p: p.write_bytes(b"\0" * (MAX_BYTES + 1)), "more than 1000000 bytes"),
        (GOOD_NAME, lambda p: p.write_text("[" * 100_000), "cannot be read"),
        (GOOD_NAME, lambda p: p.mkdir(), "no plain file"),
        (GOOD_NAME, lambda p: p.symlink_to("/etc/hostname"), "no plain file"),
        (GOOD_NAME, lambda p: p.symlink_to("nowhere"), "no plain file"),
    ],
)
def test_what_is_no_request_is_set_aside_with_its_reason_and_the_others_come_through(
    store: SessionStore, name: str, make: Callable[[Path], object], reason: str
) -> None:
    box = Inbox(store.path)
    for turn in range(2):
        make(box.folder / name)
        good = post(store.path, {"n": turn})
        assert box.poll(float(turn)) == [(good, {"n": turn})]
        box.done(good)
    refused = box.folder / "refused"
    assert [p.name for p in box.folder.iterdir()] == ["refused"]
    reasons = sorted(refused.glob("*.reason.txt"))
    assert len(reasons) == 2
    assert all(reason in file.read_text() for file in reasons)
    assert len([p for p in refused.iterdir() if not p.name.endswith(".reason.txt")]) == 2


def test_a_file_that_can_be_neither_read_nor_moved_does_not_fail_the_run(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Inbox(store.path)
    (box.folder / "stuck").write_text("x")
    moves = 0

    def refuse(*_: Any) -> None:
        nonlocal moves
        moves += 1
        raise PermissionError("no")

    monkeypatch.setattr(os, "rename", refuse)
    for turn in range(3):
        good = post(store.path, {"n": turn})
        assert box.poll(float(turn)) == [(good, {"n": turn})]
        box.done(good)
    assert moves == 1
    assert (box.folder / "stuck").exists()


def test_a_folder_that_has_gone_is_an_error_that_says_so(store: SessionStore) -> None:
    box = Inbox(store.path)
    box.folder.rmdir()
    with pytest.raises(SessionError, match="folder is gone"):
        box.poll(0.0)


def test_many_threads_and_processes_may_post_while_the_run_reads(store: SessionStore) -> None:
    code = """
import sys
from automode.session.inbox import post
for n in range(20):
    post(sys.argv[1], {"who": sys.argv[2], "n": n, "pad": "x" * 20_000})
"""
    children = [subprocess.Popen([sys.executable, "-c", code, str(store.path), str(i)]) for i in range(2)]

    def work(who: str) -> None:
        for n in range(20):
            post(store.path, {"who": who, "n": n, "pad": "x" * 20_000})

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    box, seen, now = Inbox(store.path), [], 0.0
    deadline = time.monotonic() + 60
    while len(seen) < 100 and time.monotonic() < deadline:
        now += 1.0
        for request_id, request in box.poll(now):
            seen.append((request["who"], request["n"]))
            box.done(request_id)
    for thread in threads:
        thread.join()
    for child in children:
        assert child.wait(30) == 0
    for who in ("0", "1", "t0", "t1", "t2"):
        assert [n for w, n in seen if w == who] == list(range(20))
    assert list(box.folder.iterdir()) == []


def test_a_request_can_be_taken_back_until_it_is_answered(store: SessionStore) -> None:
    inbox = Inbox(store.path)
    first, second = post(store.path, {"n": 1}), post(store.path, {"n": 2})
    assert withdraw(store.path, first)
    assert not withdraw(store.path, first)
    assert inbox.poll(0.0) == [(second, {"n": 2})]
    inbox.done(second)
    assert not withdraw(store.path, second)
    with pytest.raises(UsageError, match="is no request id"):
        withdraw(store.path, "../session")


def test_only_names_of_files_are_request_ids(store: SessionStore) -> None:
    posted = post(store.path, {"n": 1})
    assert is_request_id(posted)
    assert not any(map(is_request_id, ("", f"{posted}+card", "call-00000018-2a60e45c+card")))
