"""Rich's bar and the notebook's: what they show, that they start no thread, and where they are refused."""

from __future__ import annotations

import io
import sys
import threading
import types
from typing import Any

import pytest

from automode import Trainer
from automode.errors import UsageError
from automode.trainer import bars
from automode.trainer.progress import Console


def watched(progress: Any) -> None:
    """A run that is taken up at step 5, with a card that climbs."""
    console = Console(progress, description="demo <b>")
    console.start(100, done=5)
    console.step(40, total=90, loss=0.5)
    console.climb("abc", 3, 10, "rung 1")
    console.event("an event")
    console.validation(0.25)
    console.climbed("abc")
    console.step(90)
    console.close()
    console.close()


def test_richs_bar_shows_steps_numbers_and_cards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="the extra automode[rich]")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    before = set(threading.enumerate())  # of which some may end meanwhile
    watched("rich")
    assert set(threading.enumerate()) <= before
    said = stream.getvalue()
    for text in ("demo <b>", "40/90", "90/90", "loss=0.5", "val=0.25", "card abc", "3/10", "rung 1"):
        assert text in said, text
    assert "an event" in said + capsys.readouterr().out


def test_richs_bar_needs_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(UsageError, match=r"pip install 'automode\[rich\]'"):
        Console("rich")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A stand-in for a notebook's kernel; every display and what it came to show, in order."""
    shown: list[list[str]] = []

    class Handle:
        def __init__(self, text: str) -> None:
            self.texts = [text]
            shown.append(self.texts)

        def update(self, text: str) -> None:
            self.texts.append(text)

    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display.HTML = str  # type: ignore[attr-defined]
    display.display = lambda text, display_id: Handle(text)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


@pytest.mark.parametrize("progress", ["auto", "notebook"])
def test_a_notebook_gets_a_bar_of_html(
    progress: Any, pages: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars, "REFRESH_SECONDS", 0.0)
    watched(progress)
    run, card = pages
    assert run[0].startswith("<div>demo &lt;b&gt; <progress value")
    assert any('value="40" max="90"' in text and "40/90" in text for text in run)
    assert "val=0.25" in run[-1]
    assert 'value="90"' in run[-1]
    assert "rung 1" in card[-2]
    assert card[-1] == ""
    assert "an event" in capsys.readouterr().out


def test_a_bar_is_drawn_only_now_and_then(pages: list[list[str]]) -> None:
    console = Console("notebook")
    console.start(None)
    for step in range(1000):
        console.step(step, loss=1.0)
    # A second and more would have to pass for so many drawings.
    assert len(pages[0]) < 12
    console.close()
    assert "999" in pages[0][-1]


def test_a_notebooks_bar_is_refused_elsewhere() -> None:
    with pytest.raises(UsageError, match='"notebook" needs a notebook'):
        Console("notebook")


def test_a_kind_of_bar_is_one_of_a_few() -> None:
    with pytest.raises(
        UsageError, match="progress must be one of 'auto', 'tqdm', 'rich', 'notebook', True or False"
    ):
        Trainer(progress="bar")  # type: ignore[arg-type]
