"""A signal that comes at the last moment is heard all the same, and whoever waits for an order is told."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from automode import Session
from automode.errors import ConflictError
from automode.trainer.commanding import Commander
from automode.trainer.control import Ticket
from automode.trainer.stop_signals import StopSignals
from automode.trainer.switching import Switch

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("number", "left"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_after_the_last_step_stops_a_run_that_has_not_ended_yet(
    number: signal.Signals, left: type[BaseException], desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = StopSignals.__exit__

    def late(signals: StopSignals, *error: Any) -> None:
        os.kill(os.getpid(), number)
        leave(signals, *error)

    plain = desk.fit()
    trainer = desk.trainer(desk.folder / "late")
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "__exit__", late)
        with pytest.raises(left):
            trainer.fit(**desk.script())
    resumed = desk.fit(folder=desk.folder / "late", resume="auto")
    assert resumed.steps == 36
    desk.same(plain, resumed)


@pytest.mark.parametrize("hold", [False, True])
def test_a_signal_that_comes_while_a_run_is_about_to_go_back_ends_it_and_the_order_is_told(
    hold: bool, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Commander._load

    def interrupted(commander: Commander, ticket: Ticket) -> Switch:
        found = load(commander, ticket)
        os.kill(os.getpid(), signal.SIGINT)
        return found

    monkeypatch.setattr(Commander, "_load", interrupted)
    trainer = desk.trainer(start_paused=not hold, hold=hold)
    told: list[BaseException] = []

    def ask() -> None:
        assert trainer.wait_until_paused(desk.patience)
        try:
            if not hold:
                trainer.step(5, timeout=desk.patience)
                trainer.wait_until_paused(desk.patience)
                trainer.checkpoint(timeout=desk.patience)
            trainer.load(timeout=desk.patience)
        except ConflictError as error:
            told.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(**desk.script())
    asking.join(desk.patience)
    (error,) = told
    assert "load: the run was ended meanwhile" in str(error)
    (path,) = (desk.folder / "fits" / "default").iterdir()
    with Session.open(path) as session:
        assert not any(session.events("resumed"))
        stored = [(r.body["step"], r.body["why"]) for r in session.events("checkpointed")]
        ended = [r.body["why"] for r in session.events("run_ended")]
    assert (stored[-1], ended) == (((36, "end"), ["max_epochs"]) if hold else ((5, "signal"), ended))
