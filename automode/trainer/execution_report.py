"""What running a card again has shown: each recorded result beside the one that came out now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One result.

    Attributes:
        what: In words.
        recorded: As the log has it.
        again: As it came out now.
        tolerance: How far apart two numbers may lie; 0: not at all.
    """

    what: str
    recorded: Any
    again: Any
    tolerance: float = 0.0

    @property
    def same(self) -> bool:
        """Whether they agree: bit by bit, or within the tolerance."""
        return _same(self.recorded, self.again, self.tolerance)


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        if math.isnan(a) or math.isnan(b):
            return math.isnan(a) and math.isnan(b)
        return a == b or abs(a - b) <= tolerance * max(1.0, abs(a))
    return bool(a == b)


@dataclass(slots=True, kw_only=True)
class Execution:
    """A card that was run again.

    Attributes:
        card: Its id.
        doubts: Why bits cannot be promised; empty where they are.
        rows: What was compared, in the order in which it came out.
        left_out: What could not be run again, each with the reason.
    """

    card: str
    doubts: Sequence[str] = ()
    rows: list[Compared] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether everything that was compared agrees."""
        return all(row.same for row in self.rows)

    def as_plain(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "card": self.card,
            "same": self.same,
            "compared": len(self.rows),
            "doubts": list(self.doubts),
            "left_out": list(self.left_out),
        }

    def text(self) -> str:
        """Return a table and a verdict, for people."""
        cells = [("WHAT", "RECORDED", "AGAIN", "SAME")]
        cells += [
            (row.what, _shown(row.recorded), _shown(row.again), "yes" if row.same else "NO")
            for row in self.rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
            for row in cells
        ]
        lines += [f"left out: {why}" for why in self.left_out]
        lines.append(self._verdict())
        return "\n".join(lines)

    def _verdict(self) -> str:
        wrong = sum(not row.same for row in self.rows)
        within = max((row.tolerance for row in self.rows), default=0.0)
        if not self.rows:
            return f"card {self.card}: nothing of it could be run again"
        how = f"within {within:.2g}, since {'; '.join(self.doubts)}" if self.doubts else "bit by bit"
        if not wrong:
            return f"card {self.card}: the outcome is the same ({len(self.rows)} results, {how})"
        return f"card {self.card}: {wrong} of {len(self.rows)} results differ (compared {how})"


def _shown(value: Any) -> str:
    match value:
        case float():
            return f"{value:.6g}"
        case str():
            return value[:22]
        case list() | tuple():
            return ", ".join(_shown(v) for v in value)
        case _:
            return str(value)
