"""A loss over steps with cards marked on it: as text for the terminal, as a page of its own, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from automode.cli.tables import safe
from automode.errors import UsageError

Floats = NDArray[np.float64]

LOG_RATIO: Final = 20.0
"""A loss whose largest median is so many times its smallest is drawn on a logarithmic axis."""

_COLUMNS: Final = 600
_WIDE, _HIGH = 960.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 16.0, 40.0, 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened at a step.

    Attributes:
        step: When.
        label: In a few words.
        about: In more words.
    """

    step: float
    label: str
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkRow:
    """Marks of one kind, in one row under the curve.

    Attributes:
        name: What they are.
        marks: In any order.
    """

    name: str
    marks: Sequence[Mark]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A loss in buckets of steps.

    Attributes:
        first: First step.
        last: Last step.
        low: Fifth percentile of each bucket, NaN where it holds no finite loss.
        middle: Median of each.
        high: 95th percentile of each.
        broken: Values that were not finite, in each.
    """

    first: float
    last: float
    low: Floats
    middle: Floats
    high: Floats
    broken: NDArray[np.int64]

    @property
    def logarithmic(self) -> bool:
        """Whether a logarithmic axis shows it better."""
        known = self.middle[np.isfinite(self.middle)]
        lowest = self.low[np.isfinite(self.low)]
        return bool(known.size and lowest.min() > 0 and known.max() / known.min() > LOG_RATIO)

    def place(self, step: float) -> float:
        """Where a step lies, from 0 to 1."""
        span = self.last - self.first
        return float(np.clip((step - self.first) / span, 0.0, 1.0)) if span > 0 else 0.0


def curve_of(steps: Floats, losses: Floats, columns: int) -> Curve:
    """Sort losses into buckets of equally many steps.

    Args:
        steps: Shape [n]; a run that went back has steps that fall.
        losses: Shape [n].
        columns: How many buckets, at the most.

    Raises:
        UsageError: There is nothing to draw.
    """
    if not steps.size:
        raise UsageError("the session has no steps yet, so there is nothing to draw")
    first, last = float(steps.min()), float(steps.max())
    columns = max(1, min(columns, int(last - first) + 1))
    place = np.minimum((steps - first) / max(last - first, 1.0) * columns, columns - 1).astype(np.int64)
    order = np.argsort(place, kind="stable")
    place, values = place[order], losses[order]
    edges = np.searchsorted(place, np.arange(columns + 1))
    bands = np.full((3, columns), np.nan)
    broken = np.zeros(columns, dtype=np.int64)
    for i in range(columns):
        part = values[edges[i] : edges[i + 1]]
        finite = part[np.isfinite(part)]
        broken[i] = part.size - finite.size
        if finite.size:
            bands[:, i] = np.percentile(finite, (5, 50, 95))
    return Curve(first=first, last=last, low=bands[0], middle=bands[1], high=bands[2], broken=broken)


# ---------------------------------------------------------------------------------------------------------------- text


def text_plot(
    steps: Floats, losses: Floats, rows: Sequence[MarkRow], *, width: int = 78, height: int = 14
) -> str:
    """Draw medians as text, the rows of marks beneath.

    Args:
        steps: Shape [n].
        losses: Shape [n].
        rows: Marks to stand under the axis; two in one column make a digit.
        width: Columns of the curve.
        height: Lines of the curve.

    Raises:
        UsageError: There is nothing to draw.
    """
    curve = curve_of(steps, losses, width)
    scale, ticks = _scale(curve)
    columns = curve.middle.size
    canvas = [[" "] * columns for _ in range(height)]
    for x, value in enumerate(curve.middle):
        if np.isfinite(value):
            canvas[height - 1 - round(scale(float(value)) * (height - 1))][x] = "*"
    head = max(len(ticks[0]), len(ticks[1]), *(len(row.name) for row in rows), 0)
    lines = []
    for y, cells in enumerate(canvas):
        tick = ticks[1] if y == 0 else ticks[0] if y == height - 1 else ""
        lines.append(f"{tick:>{head}} |{''.join(cells)}".rstrip())
    if curve.broken.any():
        lines.append(f"{'not finite':>{head}} |{''.join('x' if n else ' ' for n in curve.broken)}".rstrip())
    lines.append(f"{'':>{head}} +{'-' * columns}")
    for row in rows:
        counts = np.zeros(columns, dtype=np.int64)
        for mark in row.marks:
            counts[min(columns - 1, int(curve.place(mark.step) * columns))] += 1
        drawn = "".join(" " if n == 0 else "^" if n == 1 else str(min(n, 9)) for n in counts)
        lines.append(f"{row.name:>{head}}  {drawn}".rstrip())
    span = f"step {curve.first:g}"
    lines.append(f"{'':>{head}}  {span}{f'{curve.last:g}':>{max(1, columns - len(span))}}")
    return safe("\n".join(lines))


def _scale(curve: Curve) -> tuple[Any, tuple[str, str]]:
    """Return (value to 0..1, the two ends in words)."""
    known = curve.middle[np.isfinite(curve.middle)]
    if not known.size:
        return (lambda _: 0.0), ("no finite loss", "")
    low, high = float(known.min()), float(known.max())
    names = (f"{low:.4g}", f"{high:.4g}" + (" (log)" if curve.logarithmic else ""))
    if high <= low:
        return (lambda _: 0.5), names
    if curve.logarithmic:
        return (lambda v: float(np.clip(np.log(v / low) / np.log(high / low), 0.0, 1.0))), names
    return (lambda v: float(np.clip((v - low) / (high - low), 0.0, 1.0))), names


# ----------------------------------------------------------------------------------------------------------------- page


def write_plot(
    path: Path, title: str, steps: Floats, losses: Floats, rows: Sequence[MarkRow], notes: str = ""
) -> None:
    """Write a picture by the ending of its name: ``.html`` and ``.svg`` refer to nothing outside, ``.png`` needs matplotlib.

    Args:
        path: The file.
        title: Stands above it.
        steps: Shape [n].
        losses: Shape [n].
        rows: Marks.
        notes: What to know beside the picture, on the page.

    Raises:
        UsageError: The ending is another, the file cannot be written, matplotlib is missing, or there is nothing to draw.
    """
    match path.suffix.lower():
        case ".html" | ".htm":
            data = html_page(title, steps, losses, rows, notes).encode()
        case ".svg":
            data = svg(title, steps, losses, rows).encode()
        case ".png":
            _png(path, title, steps, losses, rows)
            return
        case other:
            raise UsageError(
                f"--plot writes .html, .svg or .png (with matplotlib), and not {other or path.name!r}"
            )
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def html_page(title: str, steps: Floats, losses: Floats, rows: Sequence[MarkRow], notes: str = "") -> str:
    """Return a page that holds the picture, its notes and a table of its marks; nothing in it comes from elsewhere."""
    cells = "".join(
        f"<tr><td>{mark.step:g}</td><td>{escape(row.name)}</td><td>{escape(mark.label)}</td><td>{escape(mark.about)}</td></tr>"
        for row in rows
        for mark in sorted(row.marks, key=lambda m: m.step)
    )
    table = (
        f"<table><tr><th>step</th><th>whose</th><th>card</th><th>what</th></tr>{cells}</table>"
        if cells
        else ""
    )
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in notes.splitlines() if line.strip())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>"
        ":root{color-scheme:light dark}body{font-family:sans-serif;max-width:62em;margin:2em auto;padding:0 1em}"
        "svg{width:100%;height:auto}table{border-collapse:collapse}td,th{padding:2px 12px 2px 0;text-align:left;vertical-align:top}"
        f"</style></head><body>{svg(title, steps, losses, rows)}{paragraphs}{table}</body></html>\n"
    )


def svg(title: str, steps: Floats, losses: Floats, rows: Sequence[MarkRow]) -> str:
    """Return the picture as SVG: the band holds nine losses in ten, the line is the median, a mark tells its card when pointed at."""
    curve = curve_of(steps, losses, _COLUMNS)
    scale, ticks = _scale(curve)
    wide, high = _WIDE - _LEFT - _RIGHT, _HIGH - _TOP - _BOTTOM
    columns = curve.middle.size
    xs = _LEFT + (np.arange(columns) + 0.5) / columns * wide

    def y(value: float) -> float:
        return _TOP + (1.0 - float(scale(value))) * high

    good = np.flatnonzero(np.isfinite(curve.middle))
    line = " ".join(f"{xs[i]:.1f},{y(float(curve.middle[i])):.1f}" for i in good)
    top = [f"{xs[i]:.1f},{y(float(curve.high[i])):.1f}" for i in good]
    bottom = [f"{xs[i]:.1f},{y(float(curve.low[i])):.1f}" for i in good[::-1]]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE:g} {_HIGH:g}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="currentColor"><title>{escape(title)}</title>'
    )
    parts = [
        head,
        f'<text x="{_LEFT}" y="20" font-size="15">{escape(title)}</text>',
        f'<g stroke="currentColor" stroke-opacity=".4"><path fill="none" d="M{_LEFT} {_TOP}V{_TOP + high}H{_LEFT + wide}"/></g>',
        f'<polygon points="{" ".join(top + bottom)}" fill="#3b82f6" fill-opacity=".22"/>',
        f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="1.5"/>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end">{escape(ticks[1])}</text>',
        f'<text x="{_LEFT - 6}" y="{_TOP + high + 4}" text-anchor="end">{escape(ticks[0])}</text>',
        f'<text x="{_LEFT}" y="{_TOP + high + 16}">step {curve.first:g}</text>',
        f'<text x="{_LEFT + wide}" y="{_TOP + high + 16}" text-anchor="end">{curve.last:g}</text>',
    ]
    parts += [_broken(float(xs[i]), int(curve.broken[i])) for i in np.flatnonzero(curve.broken)]
    for number, row in enumerate(rows):
        parts += _marks(curve, row, number, wide, high)
    return "".join([*parts, "</svg>"])


_COLOURS: Final = ("#059669", "#d97706", "#7c3aed", "#db2777")


def _broken(x: float, count: int) -> str:
    return f'<text x="{x:.1f}" y="{_TOP - 4}" fill="#dc2626" text-anchor="middle">x<title>not finite: {count}</title></text>'


def _marks(curve: Curve, row: MarkRow, number: int, wide: float, high: float) -> list[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    dash = "" if number == 0 else f' stroke-dasharray="{6 - 2 * min(number, 2)} 3"'
    below = _TOP + high + 34 + 16 * number
    name = f'<text stroke="none" x="{_LEFT - 6}" y="{below + 4}" text-anchor="end">{escape(row.name)}</text>'
    parts = [f'<g fill="{colour}" stroke="{colour}">{name}']
    for mark in row.marks:
        x = _LEFT + curve.place(mark.step) * wide
        told = f"step {mark.step:g}: {mark.label}" + (f": {mark.about}" if mark.about else "")
        parts.append(
            f'<g><title>{escape(told)}</title><path stroke-opacity=".7" d="M{x:.1f} {_TOP}V{_TOP + high}"{dash}/>'
            f'<path d="M{x:.1f} {below - 6}l5 9h-10z"/></g>'
        )
    return [*parts, "</g>"]


def _png(path: Path, title: str, steps: Floats, losses: Floats, rows: Sequence[MarkRow]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"{path.name}: pictures as .png need matplotlib (pip install matplotlib); .html and .svg need nothing"
        ) from error
    curve = curve_of(steps, losses, _COLUMNS)
    at = curve.first + (np.arange(curve.middle.size) + 0.5) / curve.middle.size * (curve.last - curve.first)
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, parse_math=False)
    axes.fill_between(at, curve.low, curve.high, alpha=0.22)
    axes.plot(at, curve.middle)
    for number, row in enumerate(rows):
        for i, mark in enumerate(row.marks):
            label = f"{row.name} ({len(row.marks)})" if i == 0 else None
            style = "-" if number == 0 else "--"
            axes.axvline(mark.step, color=_COLOURS[number % len(_COLOURS)], linestyle=style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if curve.logarithmic:
        axes.set_yscale("log")
    if any(row.marks for row in rows):
        axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
