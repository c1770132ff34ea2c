"""Orders from the command line to a run that trains, and what is said where nobody hears them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from click.testing import CliRunner, Result

from automode.cli.main import main
from automode.session.inbox import post

pytestmark = pytest.mark.torch


def automode(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    assert done.exit_code == code, done.output
    return done


def test_another_process_orders_a_run_about(desk: Any) -> None:
    run = desk.run()
    code = "from automode.cli.main import main; main()"
    asked = ["ctl", str(run.path), "step", "7", "--as", "ann", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["actor"] == "ann"
    assert run.trainer.wait_until_paused(desk.patience)
    assert run.events("controlled")[-1].body["step"] == 7
    assert run.finish().steps == 36


def test_an_order_is_carried_out_and_told(desk: Any) -> None:
    run = desk.run()
    path = run.path
    assert "then pausing" in automode("ctl", path, "step", 5).output
    run.trainer.wait_until_paused(desk.patience)
    assert (
        "max_epochs=4" in automode("ctl", path, "set", "max_epochs=4", "lr=1e-3", "--note", "slower").output
    )
    assert "test_1 on 40 samples" in automode("ctl", path, "test").output
    stored = json.loads(automode("ctl", path, "checkpoint", "--json").output)["result"]["checkpoint"]
    assert "step 5" in automode("ctl", path, "load", stored.removeprefix("sha256:")[:8]).output
    run.trainer.wait_until_paused(desk.patience)
    assert "training goes on" in automode("ctl", path, "resume").output
    assert run.ended().steps == 48


def test_where_a_run_stands_is_said_by_status_and_ls(desk: Any) -> None:
    run = desk.run(hold=True)
    root = run.folder
    automode("ctl", run.path, "step", 4, "--as", "ann")
    run.trainer.wait_until_paused(desk.patience)
    shown = automode("status", run.path).output
    assert "paused (by ann at step 4: after 4 steps)" in shown
    assert "4 of 36" in shown
    assert "ctl" in shown
    assert "paused" in automode("ls", root).output
    run.trainer.resume(timeout=desk.patience)
    run.trainer.wait_until_paused(desk.patience)
    assert "held (finished at step 36)" in automode("status", run.path).output
    automode("ctl", run.path, "release")
    run.ended()
    assert "finished (max_epochs)" in automode("status", run.path).output
    assert "finished" in automode("ls", root).output
    assert "no sessions" in automode("ls", root / "nothing").output


def test_a_stopped_run_is_called_stopped(desk: Any) -> None:
    run = desk.run()
    automode("ctl", run.path, "stop", "--as", "ann")
    run.ended()
    assert "stopped (stopped by ann)" in automode("status", run.path).output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["paus"], "did you mean pause"),
        (["step", "many"], "step: n"),
        (["set", "max_epoch=3"], "did you mean max_epochs"),
        (["set", "lr=1", "lr=2"], "given twice"),
        (["pause", "now"], "write name=value"),
        (["pause", "--file", "card.yaml"], "is for fork and merge"),
        (["test"], "pass test_loader"),
        (["fork"], "mode is off"),
        (["release"], "not held"),
    ],
)
def test_what_cannot_be_done_ends_in_exit_code_1_and_the_run_goes_on(
    words: list[str], says: str, desk: Any
) -> None:
    run = desk.run({**desk.script(), "test_loader": None}, automode=False)
    assert says in automode("ctl", run.path, *words, code=1).output
    assert run.finish().steps == 36


def test_a_finished_run_hears_nothing(desk: Any) -> None:
    result = desk.fit()
    shown = automode("ctl", result.path, "pause", code=1).output
    assert "the run ended at step 36" in shown
    assert list((result.path / "inbox").iterdir()) == []


def test_a_killed_run_hears_nothing(desk: Any) -> None:
    from automode.session import SessionStore

    path = desk.folder / "killed"
    SessionStore.create(path, header={"project": "p"}).abandon()
    assert "no run is training this session" in automode("ctl", path, "pause", code=1).output
    shown = automode("status", path).output
    assert "killed" in shown
    assert "last event  none" in shown
    assert "killed" in automode("ls", path.parent).output


def test_a_run_that_does_not_answer_in_time_is_told_of(desk: Any) -> None:
    from automode.session import SessionStore

    with SessionStore.create(desk.folder / "busy", header={"project": "p"}) as store:
        assert (
            "has not answered within 0.1 s"
            in automode("ctl", store.path, "pause", "--wait", 0.1, code=1).output
        )
        assert "is posted" in automode("ctl", store.path, "pause", "--wait", 0).output


def test_a_file_that_is_no_order_is_set_aside_and_the_run_goes_on(desk: Any) -> None:
    run = desk.run()
    for body in (
        {"control": "explode", "actor": "ann"},
        {"control": "step", "actor": "ann", "arguments": {"n": -3}},
        {"control": "pause", "actor": ""},
    ):
        post(run.path, body)
    refused = run.path / "inbox" / "refused"
    until = time.monotonic() + desk.patience
    while not refused.is_dir() or len(list(refused.glob("*.txt"))) < 3:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert run.finish().steps == 36
