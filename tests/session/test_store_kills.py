"""A writer killed at random moments: the session opens, and nothing that was acknowledged is missing."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from automode.errors import SessionError
from automode.session import Record, Session, SessionStore

# Rows hold their own number, records their own seq, so that a reader can tell what is right without being told.
CHILD = """
import sys, time
import numpy as np
from automode.session import Record, SessionStore
print("ready", flush=True)
sys.stdin.readline()
path = sys.argv[1]
store = SessionStore.open(path) if sys.argv[2] == "open" else SessionStore.create(path, header={"name": "run"})
print("opened", flush=True)
names = ("row", "square")
while True:
    for _ in range(7):
        row = float(store.rows())
        store.add_row("trunk", 1, names, (row, row * row))
    store.flush_if_due(time.monotonic())
    seq, rows = store.next_seq, store.rows()
    record = Record(seq=seq, role="input", kind="k", v=1, body={"seq": seq, "pad": "x" * (seq % 900)},
                    t_wall=0.0, t_mono=0.0, frame_cursor=rows)
    durable = seq % 3 == 0
    store.write([record], durable=durable)
    if durable:
        print(seq, rows, flush=True)
"""


def _kill_after(path: Path, how: str, seconds: float, *, writing: bool) -> tuple[bool, int, int]:
    """Run the writer and kill it ``seconds`` after it was let go, or after its first acknowledgement.

    Returns:
        Whether it opened the session, and what it acknowledged.
    """
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        early = [child.stdout.readline() for _ in range(2)] if writing else []
        time.sleep(seconds)
        child.kill()
        lines = "".join([*early, child.stdout.read()]).splitlines()
    # The pipe keeps what was written before the kill; a line without its end was not acknowledged in full.
    acknowledged = [tuple(map(int, line.split())) for line in lines[1:] if len(line.split()) == 2]
    seq, rows = acknowledged[-1] if acknowledged else (0, 0)
    return bool(lines), seq, rows


def _check(path: Path, seq: int, rows: int) -> int:
    with Session.open(path) as session:
        assert session.header == {"name": "run"}
        records = list(session.events())
        assert [r.seq for r in records] == list(range(1, len(records) + 1))
        assert all(r.body == {"seq": r.seq, "pad": "x" * (r.seq % 900)} for r in records)
        assert len(records) >= seq
        known = session.frame("row")
        assert known.tolist() == list(range(len(known)))
        assert len(known) >= max([rows, *(r.frame_cursor for r in records)])
        if len(known):
            np.testing.assert_array_equal(session.frame("square"), known**2)
    return len(records)


def _has_begun(path: Path) -> bool:
    """Whether the session was made before the kill; where it was not, opening it says so."""
    file = path / "session.db"
    if not file.exists():
        return False
    try:
        Session.open(path).close()
    except SessionError as error:
        return "is empty: the run ended before it wrote anything" not in str(error)
    return True


@pytest.mark.slow
def test_a_writer_killed_at_random_moments_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    path = tmp_path / "run"
    how, seq, rows, before = "create", 0, 0, 0
    for turn in range(12):
        # A third of the kills falls into creation or opening, the rest into writing.
        writing = turn % 3 != 0
        seconds = chance.uniform(0.0, 0.37 if writing else 0.03)
        opened, new_seq, new_rows = _kill_after(path, how, seconds, writing=writing)
        seq, rows = max(seq, new_seq), max(rows, new_rows)
        if how == "create" and not opened and not _has_begun(path):
            path = tmp_path / f"run{turn}"
            continue
        how = "open"
        found = _check(path, seq, rows)
        assert found >= before, f"seed {seed}: acknowledged records are gone"
        before = found
    assert seq > 0, f"seed {seed}: the writer never got to write"
    with SessionStore.open(path) as store:
        assert store.next_seq == before + 1
        last = Record(
            seq=store.next_seq,
            role="fact",
            kind="end",
            v=1,
            body={},
            t_wall=0.0,
            t_mono=0.0,
            frame_cursor=store.rows(),
        )
        store.write([last], durable=True)
