"""Signals while a run trains: the first asks, the second ends, and nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from automode.trainer.stop_signals import StopSignals


@pytest.fixture(autouse=True)
def _handlers_of_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    found = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert found == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks_and_says_so(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received is number
    assert capfd.readouterr().err.startswith(f"\n{number.name}: stopping after this step")


def test_a_second_interrupt_is_raised_at_once_and_the_handlers_are_back_by_then() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="second signal"):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before


def test_leaving_after_an_interrupt_raises_one() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=r"^all is stored$"):
            signals.leave("all is stored")


def test_leaving_after_a_termination_calls_the_users_handler_and_exits_as_a_shell_expects() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(SystemExit) as left:
                signals.leave("all is stored")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143
    assert heard == [signal.SIGTERM]


def test_handlers_are_back_after_an_error() -> None:
    with pytest.raises(ArithmeticError), StopSignals():
        raise ArithmeticError


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_is_caught() -> None:
    found: list[Any] = []

    def enter() -> None:
        before = signal.getsignal(signal.SIGINT)
        with StopSignals():
            found.append(signal.getsignal(signal.SIGINT) == before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_forked_worker_outlives_an_interrupt_and_not_a_termination(
    number: signal.Signals, status: int
) -> None:
    with StopSignals() as signals:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(7 if signals.received is None else 8)
        _, ended = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(ended) == status
        assert signals.received is None
