"""Streaming Mann-Kendall: the exact statistic S over a sliding window, ties included (Mann 1945; Kendall 1975).

Adding a value costs two bisections, O(log w) comparisons and one memmove, where recomputing costs O(w^2). Feed it raw losses or
non-overlapping block means, never a smoothed loss: smoothing turns a 5 % test into a 58 to 84 % one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import sqrt

from automode.errors import UsageError
from automode.planner.signals.wire import SignalState


class MannKendall:
    """Keep S = sum over i < j of sign(y_j - y_i) for the last `window` values.

    Args:
        window: Number of values; at least 4.

    Attributes:
        s: The statistic; positive when values rise.
    """

    __slots__ = ("_cursor", "_ring", "_sorted", "_ties", "s", "window")

    def __init__(self, *, window: int) -> None:
        if window < 4:
            raise UsageError(f"the value of `window` is {window}, but Mann-Kendall needs at least 4 values")
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self._ring: list[float] = []
        self._sorted: list[float] = []
        self._cursor = 0
        self._ties = 0
        self.s = 0

    def __len__(self) -> int:
        return len(self._ring)

    def update(self, y: float) -> None:
        """Push a finite value, dropping the oldest when the window is full."""
        ring = self._ring
        ordered = self._sorted
        if len(ring) == self.window:
            cursor = self._cursor
            oldest = ring[cursor]
            low = bisect_left(ordered, oldest)
            high = bisect_right(ordered, oldest)
            # Every later value counted sign(later - oldest): those above minus those below.
            self.s -= (len(ordered) - high) - low
            self._ties -= _tie_term(high - low) - _tie_term(high - low - 1)
            del ordered[low]
            ring[cursor] = y
            self._cursor = cursor + 1 if cursor + 1 < self.window else 0
        else:
            ring.append(y)
        low = bisect_left(ordered, y)
        high = bisect_right(ordered, y)
        self.s += low - (len(ordered) - high)
        self._ties += _tie_term(high - low + 1) - _tie_term(high - low)
        ordered.insert(high, y)

    @property
    def variance(self) -> float:
        """Var(S) under exchangeability, corrected for ties: (n(n-1)(2n+5) - sum t(t-1)(2t+5)) / 18."""
        n = len(self._ring)
        return (n * (n - 1) * (2 * n + 5) - self._ties) / 18.0

    @property
    def z(self) -> float:
        """S with continuity correction in standard deviations; 0 when S or its variance is 0."""
        variance = self.variance
        if self.s == 0 or variance <= 0.0:
            return 0.0
        return (self.s - 1 if self.s > 0 else self.s + 1) / sqrt(variance)

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {"window": self.window, "values": self._ring[self._cursor :] + self._ring[: self._cursor]}

    @classmethod
    def from_state(cls, state: SignalState) -> MannKendall:
        """Rebuild the signal from what `state` returned."""
        signal = cls(window=state["window"])
        for value in state["values"]:
            signal.update(value)
        return signal


def _tie_term(t: int) -> int:
    return t * (t - 1) * (2 * t + 5)
