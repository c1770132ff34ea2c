"""S2: a level that has moved by more than single values show."""

from __future__ import annotations

from math import sqrt

from automode.errors import UsageError
from automode.planner.signals.wire import SignalState, require_positive

CLIP = 4.0
"""A single standardised value counts for this much at most: one spike is not a shift."""


class LevelShift:
    """Sum the last few clipped z scores: sum over 10 of clip(z, -4, 4) / sqrt(10), an alarm above 7.

    Args:
        threshold: Alarm above this value; it ends again below half of it.
        length: How many scores are summed.

    Attributes:
        value: The statistic after the last update.
        active: Whether the level counts as shifted.
    """

    __slots__ = ("_cursor", "_ring", "_root", "_sum", "active", "length", "threshold", "value")

    def __init__(self, *, threshold: float = 7.0, length: int = 10) -> None:
        require_positive("threshold", threshold)
        if length < 2:
            raise UsageError(f"the value of `length` is {length}, but a level shift needs at least 2 scores")
        if threshold >= CLIP * sqrt(length):
            raise UsageError(
                f"the threshold {threshold} is out of reach: {length} scores clipped at {CLIP} sum to at most "
                f"{CLIP * sqrt(length):.2f}; lower it or sum more scores"
            )
        self.threshold = threshold
        self.length = length
        self._root = 1.0 / sqrt(length)
        self.reset()

    def reset(self) -> None:
        """Forget all scores."""
        self._ring = [0.0] * self.length
        self._cursor = 0
        self._sum = 0.0
        self.value = 0.0
        self.active = False

    def update(self, z: float) -> bool:
        """Take one standardised score (of `RobustZ`; infinity counts as the clip).

        Returns:
            True when `active` changed.
        """
        if z > CLIP:
            z = CLIP
        elif z < -CLIP:
            z = -CLIP
        ring = self._ring
        cursor = self._cursor
        self._sum = total = self._sum + z - ring[cursor]
        ring[cursor] = z
        self._cursor = cursor + 1 if cursor + 1 < self.length else 0
        self.value = value = total * self._root
        if self.active:
            if value >= 0.5 * self.threshold:
                return False
        elif value <= self.threshold:
            return False
        self.active = not self.active
        return True

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {
            "threshold": self.threshold,
            "length": self.length,
            "ring": list(self._ring),
            "cursor": self._cursor,
            "sum": self._sum,
            "value": self.value,
            "active": self.active,
        }

    @classmethod
    def from_state(cls, state: SignalState) -> LevelShift:
        """Rebuild the signal from what `state` returned."""
        signal = cls(threshold=state["threshold"], length=state["length"])
        signal._ring = list(state["ring"])
        signal._cursor = state["cursor"]
        signal._sum = state["sum"]
        signal.value = state["value"]
        signal.active = state["active"]
        return signal
