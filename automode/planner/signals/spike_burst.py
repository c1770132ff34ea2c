"""Several spikes in quick succession: one can be chance, three in a hundred steps are an unstable run."""

from __future__ import annotations

from bisect import bisect_right

from automode.errors import UsageError
from automode.planner.signals.wire import SignalState


class SpikeBurst:
    """Count the spikes of the last `window` observations.

    Args:
        count: Spikes that make a burst.
        window: Observations over which they are counted.

    Attributes:
        active: Whether a burst is going on; it ends when a whole window has passed without a spike.
    """

    __slots__ = ("_at", "_seen", "active", "count", "window")

    def __init__(self, *, count: int = 3, window: int = 100) -> None:
        if not 1 <= count <= window:
            raise UsageError(f"need 1 <= count <= window, but count is {count} and window is {window}")
        self.count = count
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget all spikes."""
        self._at: list[int] = []
        self._seen = 0
        self.active = False

    @property
    def recent(self) -> int:
        """Spikes among the last `window` observations."""
        return len(self._at) - bisect_right(self._at, self._seen - self.window)

    def update(self, fired: bool) -> bool:
        """Take one observation: whether it was a spike.

        Returns:
            True when `active` changed.
        """
        self._seen += 1
        if fired:
            self._at.append(self._seen)
            del self._at[: -self.window]
            if not self.active and self.recent >= self.count:
                self.active = True
                return True
        elif self.active and self._seen - self._at[-1] >= self.window:
            self.active = False
            return True
        return False

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {
            "count": self.count,
            "window": self.window,
            "at": list(self._at),
            "seen": self._seen,
            "active": self.active,
        }

    @classmethod
    def from_state(cls, state: SignalState) -> SpikeBurst:
        """Rebuild the signal from what `state` returned."""
        signal = cls(count=state["count"], window=state["window"])
        signal._at = list(state["at"])
        signal._seen = state["seen"]
        signal.active = state["active"]
        return signal
