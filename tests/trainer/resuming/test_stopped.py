"""Runs that are stopped by a signal or an error, or killed: what is left goes on where it stood."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from automode.errors import SessionCorruptError, SessionError
from automode.session import Session
from automode.session.checkpoints import CheckpointStore
from automode.trainer.resuming import _loaded

pytestmark = pytest.mark.torch


def newest(folder: Path) -> Path:
    return max((folder / "default").iterdir(), key=lambda path: path.name)


def last(folder: Path) -> dict[str, Any]:
    with Session.open(newest(folder)) as session:
        return list(session.events("checkpointed"))[-1].body


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit")]
)
def test_a_signal_stops_the_run_after_its_step_and_the_run_goes_on_from_there(
    number: int, raised: str, scripts: Any, run: Any, tmp_path: Path
) -> None:
    cell = scripts.Cell(dropout=True, workers=2 if number == signal.SIGINT else 0)
    untouched = run("fitted", cell, tmp_path / "untouched")["told"]
    stopped = run("signalled", cell, tmp_path / "cut", signals={"7": [int(number)]})
    assert stopped["raised"] == raised
    assert stopped["restored"]
    assert (last(tmp_path / "cut")["step"], last(tmp_path / "cut")["why"]) == (7, "signal")
    resumed = run("fitted", cell, tmp_path / "cut", resume="auto")
    assert resumed["told"] == untouched
    assert resumed["path"] == str(newest(tmp_path / "cut"))


def test_a_second_signal_ends_the_run_at_once(scripts: Any, run: Any, tmp_path: Path) -> None:
    stopped = run(
        "signalled", scripts.Cell(), tmp_path, signals={"7": [int(signal.SIGINT), int(signal.SIGINT)]}
    )
    assert stopped["raised"] == "KeyboardInterrupt"
    assert "second signal" in stopped["text"]
    assert stopped["restored"]
    assert any("while the weights were being written" in note for note in stopped["notes"])
    with Session.open(newest(tmp_path)) as session:
        assert not any(session.events("checkpointed"))


@pytest.mark.parametrize("where", ["reading", "forward"])
def test_an_error_leaves_the_state_of_the_last_step_and_says_what_may_have_moved(
    where: str, scripts: Any, run: Any, tmp_path: Path
) -> None:
    failed = run("failing", scripts.Cell(), tmp_path, where=where, at=8)
    assert any("the state of step 7 is stored" in note for note in failed["notes"])
    assert (last(tmp_path)["step"], last(tmp_path)["why"]) == (7, "error")
    manifest = CheckpointStore(newest(tmp_path) / "checkpoints").manifest(last(tmp_path)["checkpoint"])
    assert manifest["resume"] == "approximate"
    assert "moved" in manifest["doubts"][0] or "next batch" in manifest["doubts"][0]
    resumed = run("fitted", scripts.Cell(), tmp_path, resume="auto")
    assert resumed["told"]["steps"] == scripts.STEPS


def test_an_error_in_the_update_leaves_no_state_and_says_why(scripts: Any, run: Any, tmp_path: Path) -> None:
    failed = run("failing", scripts.Cell(), tmp_path, where="update", at=8)
    assert any("no checkpoint of step 7" in note for note in failed["notes"])
    with Session.open(newest(tmp_path)) as session:
        assert not any(session.events("checkpointed"))


def kills(run: Any, cell: Any, folder: Path, count: int, seed: int) -> None:
    """Kill a run over and over at random moments; what was acknowledged is there, whole, and the run still gets to its end."""
    chance = random.Random(seed)
    given = {"max_epochs": 4 * count, "keep_checkpoints": 2, "val_every_n_epochs": 0}
    untouched = run("fitted", cell, folder / "untouched", checkpoint_every=None, **given)["told"]
    folder = folder / "killed"
    folder.mkdir()
    killed = 0
    for _ in range(count):
        (folder / "pid").unlink(missing_ok=True)
        over = threading.Event()
        killer = threading.Thread(
            target=kill_soon, args=(folder / "pid", 0.05 + 0.35 * chance.random(), over)
        )
        killer.start()
        try:
            run("acknowledging", cell, folder, resume="auto", **given)
            break  # a quick machine has come to the end before that many kills
        except AssertionError as error:
            assert str(error) == "the process died"  # noqa: PT017  # the other way that a round may end
            killed += 1
        finally:
            over.set()
            killer.join()
        check_whole(folder)
    assert killed > count // 10
    resumed = run("fitted", cell, folder, resume="auto", checkpoint_every=None, **given)["told"]
    assert resumed == untouched


def kill_soon(file: Path, seconds: float, over: threading.Event) -> None:
    """Kill the process that this file names, and its loader's workers.

    The workers with it, since torch's workers ask for their parent as they begin: one whose parent is killed before that waits
    for ever, and with it everybody who waits for the end of a pipe that it has inherited.
    """
    while not file.exists() or not file.read_text():
        if over.wait(0.001):
            return
    if not over.wait(seconds):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def check_whole(folder: Path) -> None:
    """No session is damaged, and a state at least as new as the last that was acknowledged is whole."""
    for path in (folder / "default").glob("*"):
        with opened(path) as session:
            if session is not None:
                session.verify()
    file = folder / "acknowledged"
    # The last line may be torn; the point at the end of a line tells.
    lines = [line for line in file.read_text().splitlines() if line.endswith(" .")] if file.exists() else []
    if lines:
        path, step, _ = lines[-1].split()
        assert int(_loaded(Path(path)).rest["step"]) >= int(step)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Session | None]:
    """A session; None where the kill came while it was made."""
    try:
        session = Session.open(path)
    except SessionCorruptError:
        raise
    except SessionError:
        yield None
        return
    with session:
        yield session


def test_twenty_kills_at_random_moments_lose_nothing_that_was_acknowledged(
    scripts: Any, run: Any, tmp_path: Path
) -> None:
    kills(run, scripts.Cell(dropout=True), tmp_path, 20, seed=1)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2])
def test_two_hundred_kills_at_random_moments_lose_nothing_that_was_acknowledged(
    workers: int, scripts: Any, run: Any, tmp_path: Path
) -> None:
    kills(run, scripts.Cell(dropout=True, workers=workers), tmp_path, 100, seed=2)
