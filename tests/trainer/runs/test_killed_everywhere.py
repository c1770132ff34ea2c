"""A run killed at its system calls and resumed in a new process ends with the decisions of the run that nobody killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from automode import replay
from automode.errors import SessionError
from automode.session import Session
from automode.session.checkpoints import CheckpointStore

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its trainers")

RUNS = Path(__file__).with_name("killed_runs.py")
KILLED = 9
KILLS = 3
PARTS = 4
TIMED = ("seconds", "rest")


class Nursery:
    """A process that has imported everything, and forks a trainer for each order."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def train(self, folder: Path, *, kill: int = 0, stop: int = 0, backend: str = "inline") -> int:
        """Train a session on, or begin it; give the exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"folder": str(folder), "backend": backend, "kill": kill, "stop": stop}
        order["resume"] = resumable(folder)
        if not order["resume"] and folder.exists():
            shutil.rmtree(folder)  # killed before its first checkpoint: nothing to go on from
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(RUNS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Nursery(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)


def resumable(folder: Path) -> bool:
    """Whether a session holds a checkpoint."""
    if not (folder / "session.db").is_file() or not (folder / "session.db").stat().st_size:
        return False
    try:
        with Session.open(folder) as session:
            return any(session.events("checkpointed"))
    except SessionError as error:
        assert "the run ended before it wrote anything" in str(error)  # noqa: PT017  # the only one that a kill may leave
        return False


def ended(folder: Path) -> bool:
    """Whether the run's last event is on disk."""
    with Session.open(folder) as session:
        return any(record.body["weights"] is not None for record in session.events("run_ended"))


def story(folder: Path) -> list[Any]:
    """Every event but those about cuts, by its place among the rows that count; what a clock measured is left out."""
    told = []
    rows = superseded = 0
    with Session.open(folder) as session:
        for record in session.events():
            if record.kind == "resumed":
                superseded += record.frame_cursor - rows
            rows = record.frame_cursor
            if record.kind not in ("checkpointed", "resumed"):
                told.append((record.kind, record.effective_at, rows - superseded, _untimed(record.body)))
    return told


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if k not in TIMED}
    return [_untimed(v) for v in value] if isinstance(value, list) else value


def outcome(folder: Path) -> Any:
    """Where every card ended, by which evidence, on which trials; and what was adopted."""
    with Session.open(folder) as session:
        moves = {r.body["card"]: r.body["after"] for r in session.events("card_moved")}
        verdicts = [
            (r.body["card"], r.body["verdict"], r.body["candidate"], r.body["mean"], r.body["look"])
            for r in session.events("verdict_given")
        ]
        values = {
            (r.body["card"], r.body["trial"], r.body["resource"], r.body["value"])
            for r in session.events("trial_reported")
        }
        adopted = [(r.body["card"], r.body["checkpoint"]) for r in session.events("adopted")]
    return moves, str(verdicts), values, adopted


def segments(folder: Path) -> Counter[str]:
    """How often each segment was begun, over all attempts."""
    file = folder.parent / f"{folder.name}-segments"
    return Counter(file.read_text().splitlines())


def sound(folder: Path) -> None:
    """What holds of the session however often it was cut."""
    report = replay(folder)
    assert report.differences == 0, report.first
    store = CheckpointStore(folder / "checkpoints")
    for digest in store.digests():
        store.verify(digest)
    with Session.open(folder) as session:
        session.verify()
        assert set(store.digests()) <= {row.digest for row in session.checkpoints(include_superseded=True)}
        assert {r.seq for r in session.events(include_superseded=True)} == set(
            range(1, session.last_seq() + 1)
        )


@pytest.fixture(scope="module")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "session"
    assert nursery.train(folder) == 0
    kinds = [kind for kind, *_ in story(folder)]
    for kind in ("scanned", "trial_reported", "evaluated", "adopted", "merged", "run_ended"):
        assert kind in kinds
    return folder


def calls(folder: Path) -> int:
    return int((folder.parent / f"{folder.name}-calls").read_text())


@pytest.mark.slow
def test_kills_one_after_the_other_change_no_decision(nursery: Nursery, whole: Path, tmp_path: Path) -> None:
    chance = random.Random(20261121)
    folder = tmp_path / "session"
    kills = 0
    while kills < KILLS:
        status = nursery.train(folder, kill=chance.randint(20, calls(whole) // 3))
        if status == 0:
            break
        assert status == KILLED
        kills += 1
    else:
        if not ended(folder):
            assert nursery.train(folder) == 0
    assert kills >= 2
    assert story(folder) == story(whole)
    sound(folder)
    once, often = segments(whole), segments(folder)
    assert sum(often.values()) <= sum(once.values()) + kills, "more than one segment was lost to a kill"


def test_a_card_that_a_stop_has_cut_short_goes_on_when_the_run_does(
    nursery: Nursery, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "session"
    stopped = nursery.train(folder, stop=29)
    assert stopped not in (0, KILLED)
    with Session.open(folder) as session:
        assert [r.body["after"] for r in session.events("card_moved")][-1] == "inconclusive"
    assert nursery.train(folder) == 0
    assert story(folder) == story(whole)
    sound(folder)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(1, PARTS + 1))
def test_a_kill_at_any_call_changes_no_decision(
    first: int, nursery: Nursery, whole: Path, tmp_path: Path
) -> None:
    """Together the parts kill at every call."""
    expected, once = story(whole), sum(segments(whole).values())
    for call in range(first, calls(whole) + 1, PARTS):
        folder = tmp_path / f"at{call}" / "session"
        folder.parent.mkdir()
        status = nursery.train(folder, kill=call)
        if status == 0:
            # What the clock decides (a flush every half second) makes a slow run's calls more than a quick one's.
            assert call > 0.6 * calls(whole), f"only {call} calls"
            break
        assert status == KILLED
        begun = resumable(folder)
        if not (begun and ended(folder)):
            assert nursery.train(folder) == 0, f"killed at call {call}"
        assert story(folder) == expected, f"killed at call {call}"
        sound(folder)
        if begun:
            assert sum(segments(folder).values()) <= once + 1, f"killed at call {call}"
        shutil.rmtree(folder.parent)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(8))
def test_chains_of_kills_change_no_decision(seed: int, nursery: Nursery, whole: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    folder = tmp_path / "session"
    while (status := nursery.train(folder, kill=chance.randint(1, 120))) == KILLED:
        if resumable(folder) and ended(folder):
            break
    assert status in (0, KILLED)
    assert story(folder) == story(whole)
    sound(folder)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_kills_beside_worker_processes_change_no_outcome(nursery: Nursery, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "session"
    assert nursery.train(whole, backend="process") == 0
    for call in range(20, calls(whole), 6):
        folder = tmp_path / f"at{call}" / "session"
        folder.parent.mkdir()
        status = nursery.train(folder, kill=call, backend="process")
        if status == KILLED and not (resumable(folder) and ended(folder)):
            assert nursery.train(folder, backend="process") == 0, f"killed at call {call}"
        assert outcome(folder) == outcome(whole), f"killed at call {call}"
        sound(folder)
