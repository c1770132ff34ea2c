"""What a person sees: a bar where there is a terminal or it was asked for, cards and events above it, or silence."""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import pytest

from automode.trainer.progress import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar_of(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **given: Any) -> Console:
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console(**given)
    console.start(100)
    console.step(10, loss=0.51234)
    console.close()
    return console


def test_the_bar_shows_in_a_terminal_and_where_it_is_asked_for_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for stream, progress, shown in (
        (Terminal(), "auto", True),
        (io.StringIO(), "auto", False),
        (io.StringIO(), True, True),
        (Terminal(), False, False),
    ):
        bar_of(monkeypatch, stream, progress=progress)
        assert ("10/100" in stream.getvalue()) == shown
        assert ("loss=0.5123" in stream.getvalue()) == shown


def test_the_bar_follows_a_limit_that_moves_and_shows_the_validation_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console(True, description="demo")
    console.start(100)
    console.step(40, total=90, loss=float("nan"))
    console.validation(0.25)
    console.close()
    console.close()
    said = stream.getvalue()
    assert "demo" in said
    assert "40/90" in said
    assert "loss=nan" in said
    assert "val=0.25" in said


def test_cards_and_events_go_to_standard_output_with_or_without_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for progress in (True, False):
        console = Console(progress)
        console.start(5)
        console.card("card: one\n")
        console.event("it happened")
        console.close()
        assert capsys.readouterr().out == "\ncard: one\n\nit happened\n"


def test_a_card_that_climbs_has_a_bar_of_its_own_until_its_trials_are_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console(True)
    console.climb("early", 1, 2, "before the run's own bar there is none")
    console.start(100)
    console.climb("c0ffee00", 0, 54, "0/6 at 3")
    console.climb("c0ffee00", 18, 60, "6/6 at 3, 0/2 at 9; trial 4 leads with 0.5000 at 3")
    console.climb("decade00", 3, 9, "1/3 at 3")
    console.climbed("c0ffee00")
    console.climbed("c0ffee00")
    console.close()
    said = stream.getvalue()
    assert "card c0ffee00" in said
    assert "18/60" in said
    assert "trial 4 leads" in said
    assert "3/9" in said
    assert "early" not in said


def test_a_quiet_console_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(False, speak=False)
    console.start(5)
    console.step(3, loss=1.0)
    console.validation(1.0)
    console.card("card")
    console.event("event")
    console.close()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_bar_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())  # of which some may end meanwhile
    bar_of(monkeypatch, Terminal(), progress=True)
    assert set(threading.enumerate()) <= before


class Gone(Terminal):
    """A terminal that has hung up, or a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_what_cannot_be_shown_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    for out in (Gone(), None):
        monkeypatch.setattr(sys, "stdout", out)
        console = Console(True)
        console.start(10)
        console.event("begun")
        console.step(5, loss=1.0)
        console.climb("c0ffee00", 1, 9, "rung 1")
        console.validation(0.5)
        console.waits("paused")
        console.climbed("c0ffee00")
        console.close()


def test_a_bar_that_breaks_on_its_way_is_drawn_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    console = Console(True)
    console.start(10)
    stream.close()
    console.step(5, loss=1.0)
    console.step(10, loss=1.0)
    console.close()


def test_letters_that_standard_output_has_not_are_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    Console(False).event("paused by Zo\xe9")
    assert written.getvalue().decode().splitlines() == ["paused by Zo\\xe9"]
