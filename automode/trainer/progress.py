"""What a person sees while a run trains: one progress bar, and lines above it for cards and events."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from tqdm import tqdm

from automode.trainer.bars import Bar, NotebookBar, RichBars, check_notebook, in_notebook

Progress = Literal["auto", "tqdm", "rich", "notebook"] | bool


class _Bar(tqdm):  # type: ignore[type-arg]  # generic only in the stubs
    """A bar without tqdm's monitor thread, which would outlive the run."""

    monitor_interval = 0


def _maker(progress: Progress) -> Callable[..., Any] | None:
    """What makes the bars; None: there are to be none.

    Raises:
        UsageError: Such bars cannot be shown here.
    """
    match progress:
        case "auto" if in_notebook():
            return NotebookBar
        case "auto":
            return _Bar if sys.stderr.isatty() else None
        case "rich":
            return RichBars()
        case "notebook":
            check_notebook()
            return NotebookBar
        case "tqdm" | True:
            return _Bar
        case _:
            return None


class Console:
    """Prints for people, and keeps a progress bar below what it prints.

    Cards and events go to standard output, the bar to standard error, so that a log file gets the one without the other.

    Args:
        progress: Show the bar, by ``"tqdm"`` (True is the same), ``"rich"`` or ``"notebook"``; ``"auto"``: in a notebook its own,
            else by tqdm, and only where standard error is a terminal.
        speak: Print cards and events at all.
        description: Stands before the bar.
    """

    def __init__(self, progress: Progress = "auto", *, speak: bool = True, description: str = "") -> None:
        self._make = _maker(progress)
        self._speak = speak
        self._description = description
        self._bar: Bar | None = None
        self._climbs: dict[str, Bar] = {}
        self._known: dict[str, str] = {}

    @property
    def shown(self) -> bool:
        """Whether there is a bar to be shown."""
        return self._make is not None

    def start(self, total: int | None, done: int = 0) -> None:
        """Show the bar.

        Args:
            total: Steps of the whole run; None where that is not known.
            done: Steps done already, by a run that is taken up again.
        """
        if self._make is None or self._bar is not None:
            return
        with self._drawing():
            self._bar = self._make(
                total=total, initial=done, desc=self._description or None, unit="step", dynamic_ncols=True
            )

    def step(self, step: int, *, total: int | None = None, loss: float | None = None) -> None:
        """Move the bar; called once a block of steps.

        Args:
            step: Steps done.
            total: Steps of the whole run where that has changed.
            loss: Mean training loss of late.
        """
        bar = self._bar
        if bar is None:
            return
        if total is not None and total != bar.total:
            bar.total = total
        with self._drawing():
            self._postfix("loss", loss)
            bar.update(step - bar.n)

    def waits(self, how: str | None) -> None:
        """Show that the run waits.

        Args:
            how: ``paused`` or ``held``; None: it trains on.
        """
        bar = self._bar
        if bar is None:
            return
        shown = [part for part in (self._description, how and f"[{how}]") if part]
        with self._drawing():
            bar.set_description(" ".join(shown) or None)
            bar.unpause() if how is None else None

    def validation(self, loss: float | None) -> None:
        """Show the validation loss beside the training loss."""
        if self._bar is not None:
            with self._drawing():
                self._postfix("val", loss)
                self._bar.refresh()

    def climb(self, card: str, done: int, total: int, text: str) -> None:
        """Show how far a card's trials have come on their ladder, in a bar below the run's.

        Args:
            card: Id of the card.
            done: Resource steps trained.
            total: Resource steps of the whole ladder.
            text: Rungs and leader.
        """
        if self._bar is None or self._make is None:
            return
        with self._drawing():
            bar = self._climbs.get(card)
            if bar is None:
                bar = self._climbs[card] = self._make(
                    total=total,
                    desc=f"card {card}",
                    unit="step",
                    dynamic_ncols=True,
                    leave=False,
                    position=1 + len(self._climbs),
                )
            bar.total = total
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

    def climbed(self, card: str) -> None:
        """Take a card's bar away; without one, nothing happens."""
        bar = self._climbs.pop(card, None)
        if bar is not None:
            with self._drawing():
                bar.close()

    def card(self, text: str) -> None:
        """Print a plan card, set off by blank lines."""
        self._print(f"\n{text.rstrip()}\n")

    def event(self, text: str) -> None:
        """Print one line about what happened."""
        self._print(text)

    def close(self) -> None:
        """Leave the bar as it stands; calling it twice does no harm."""
        for card in list(self._climbs):
            self.climbed(card)
        bar, self._bar = self._bar, None
        if bar is not None:
            with self._drawing():
                bar.close()

    def _postfix(self, name: str, value: float | None) -> None:
        if value is None or self._bar is None:
            return
        self._known[name] = f"{value:.4g}" if math.isfinite(value) else str(value)
        self._bar.set_postfix(self._known, refresh=False)

    def _print(self, text: str) -> None:
        out: TextIO | Any = sys.stdout
        if not self._speak or out is None:  # no standard output: a process without a console
            return
        encoding = getattr(out, "encoding", None)
        if isinstance(encoding, str) and getattr(out, "errors", None) == "strict":
            text = text.encode(encoding, "backslashreplace").decode(
                encoding
            )  # a name that it has no letters for
        try:
            if self._bar is not None:
                self._bar.write(text, file=out)
            else:
                out.write(text + "\n")
            out.flush()
        except (OSError, ValueError):  # a disk is full, a pipe is broken, a file closed: training goes on
            self._speak = False

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """What cannot be drawn, on a terminal that has gone say, is drawn no more; training goes on."""
        try:
            yield
        except (OSError, ValueError):
            self._bar = self._make = None
            self._climbs.clear()
