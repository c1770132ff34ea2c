"""Progress bars besides tqdm's: rich's in a terminal, and one of HTML in a notebook. Neither starts a thread."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from automode.errors import UsageError

REFRESH_SECONDS = 0.1
"""Shortest time between two drawings of a bar."""


class Bar(Protocol):
    """What the console needs of a bar; tqdm's is one."""

    total: Any
    n: Any

    def update(self, n: float) -> Any:
        """Move on by so many."""
        ...

    def set_postfix(self, numbers: Mapping[str, Any], refresh: bool) -> None:
        """Show numbers behind the bar."""
        ...

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """Show text behind the bar."""
        ...

    def set_description(self, desc: str | None, refresh: bool = True) -> None:
        """Show text before the bar."""
        ...

    def unpause(self) -> Any:
        """Go on after a time in which nothing was to move."""
        ...

    def refresh(self) -> Any:
        """Draw it now."""
        ...

    def write(self, text: str, file: Any) -> None:
        """Print above the bar."""
        ...

    def close(self) -> None:
        """Leave it as it stands."""
        ...


class _Drawn:
    """What rich's bar and the notebook's have in common: counting, and drawing now and then."""

    def __init__(self, total: int | None, initial: int = 0, desc: str | None = None, **_: Any) -> None:
        self.total: int | None = total
        self.n: float = initial
        self._began = time.monotonic()
        self._at_first: float = initial
        self._description = desc or ""
        self._postfix = ""
        self._drawn_at = -float("inf")

    def update(self, n: float) -> None:
        """Move on by so many."""
        self.n += n
        if time.monotonic() - self._drawn_at >= REFRESH_SECONDS:
            self.refresh()

    def set_postfix(self, numbers: Mapping[str, Any], refresh: bool) -> None:
        """Show numbers behind the bar."""
        self.set_postfix_str(", ".join(f"{name}={value}" for name, value in numbers.items()), refresh)

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """Show text behind the bar."""
        self._postfix = text
        if refresh:
            self.refresh()

    def set_description(self, desc: str | None, refresh: bool = True) -> None:
        """Show text before the bar."""
        self._description = desc or ""
        if refresh:
            self.refresh()

    def unpause(self) -> None:
        """Go on after a time in which nothing was to move: the rate counts from here."""
        self._began, self._at_first = time.monotonic(), self.n

    def refresh(self) -> None:
        """Draw it now."""
        self._drawn_at = time.monotonic()
        self._draw()

    @property
    def _rate(self) -> str:
        seconds = time.monotonic() - self._began
        return (
            f"{(self.n - self._at_first) / seconds:.1f} steps/s"
            if seconds > 0 and self.n > self._at_first
            else ""
        )

    def _draw(self) -> None:
        raise NotImplementedError


class RichBars:
    """Rich's bars below one another, in one live display.

    Raises:
        UsageError: Rich is not installed.
    """

    def __init__(self) -> None:
        try:
            from rich import progress
            from rich.console import Console
        except ImportError as error:
            raise UsageError(
                "progress=\"rich\" needs the package rich: pip install 'automode[rich]'"
            ) from error
        self.live = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[postfix]}", markup=False),
            console=Console(file=sys.stderr),
            auto_refresh=False,
        )
        self.shown = 0

    def __call__(self, **given: Any) -> RichBar:
        """Begin a bar; arguments as tqdm's."""
        return RichBar(self, **given)


class RichBar(_Drawn):
    """One of rich's bars."""

    def __init__(self, bars: RichBars, *, leave: bool = True, **given: Any) -> None:
        super().__init__(**given)
        self._bars = bars
        self._leave = leave
        if not bars.shown:
            bars.live.start()
        bars.shown += 1
        self._task = bars.live.add_task(
            self._description, total=self.total, completed=int(self.n), postfix=""
        )
        self.refresh()

    def write(self, text: str, file: Any) -> None:
        """Print above the bar; rich catches what is printed while a bar is shown in a terminal."""
        file.write(text + "\n")

    def close(self) -> None:
        """Leave it as it stands, or take it away where it was not to stay."""
        self.refresh()
        if not self._leave:
            self._bars.live.remove_task(self._task)
        self._bars.shown -= 1
        if not self._bars.shown:
            self._bars.live.stop()

    def _draw(self) -> None:
        behind = " ".join(part for part in (self._rate, self._postfix) if part)
        self._bars.live.update(
            self._task, description=self._description, total=self.total, completed=self.n, postfix=behind
        )
        self._bars.live.refresh()


class NotebookBar(_Drawn):
    """A bar of plain HTML, shown by the notebook itself; no widgets are needed."""

    def __init__(self, *, leave: bool = True, **given: Any) -> None:
        super().__init__(**given)
        from IPython.display import HTML, display

        self._leave = leave
        self._html = HTML
        self._handle = display(HTML(self._text()), display_id=True)
        self._drawn_at = time.monotonic()

    def write(self, text: str, file: Any) -> None:
        """Print below the bar, as a notebook does."""
        file.write(text + "\n")

    def close(self) -> None:
        """Leave it as it stands, or take it away where it was not to stay."""
        if self._leave:
            self.refresh()
        else:
            self._handle.update(self._html(""))

    def _draw(self) -> None:
        self._handle.update(self._html(self._text()))

    def _text(self) -> str:
        of = "" if self.total is None else f' value="{self.n:g}" max="{self.total}"'
        count = f"{self.n:g}" if self.total is None else f"{self.n:g}/{self.total}"
        behind = " ".join(part for part in (count, self._rate, self._postfix) if part)
        return f"<div>{html.escape(self._description)} <progress{of}></progress> {html.escape(behind)}</div>"


def in_notebook() -> bool:
    """Tell whether a notebook's kernel runs this process."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def check_notebook() -> None:
    """Refuse a notebook's bar where no notebook would show it.

    Raises:
        UsageError: No notebook's kernel runs this process.
    """
    if not in_notebook():
        raise UsageError(
            'progress="notebook" needs a notebook, and this process is none; use "tqdm", "rich" or "auto"'
        )
