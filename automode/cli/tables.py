"""Plain tables and times for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from automode.planner.yaml_text import shown

_UNITS: Final = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lay out rows in columns as wide as their widest cell; control characters are shown as escapes.

    Args:
        head: Titles of the columns.
        rows: Cells, as many a row as there are titles.
        right: Columns that are set flush right, from 0.
    """
    cells = [[shown(cell, limit=200) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def safe(text: str) -> str:
    """Return text of several lines with control characters shown as escapes: it may quote what anybody typed."""
    return "\n".join(shown(line, limit=len(line) * 10 + 1) for line in text.split("\n"))


def duration(seconds: float) -> str:
    """Say a time span in its largest fitting unit: ``40 s``, ``3 min``, ``2 d``."""
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def local_time(seconds: float) -> str:
    """Say a time since the epoch by the clock on this machine's wall."""
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
