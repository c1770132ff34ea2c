"""An alarm on scores whose bar follows the run's own tail, because at small batch sizes an ordinary step reaches z = 6."""

from __future__ import annotations

from math import inf

from automode.errors import UsageError
from automode.planner.signals.wire import SignalState, from_wire, require_positive, to_wire

TAIL_FACTOR = 1.3
TAIL_HALF_LIFE = 3000.0


class TailAlarm:
    """Fire on z > max(base, 1.3 m), where m is the run's own largest z, decaying with a half-life of 3000 scores.

    What enters m is cut at the threshold in force and once per event, so that a real spike raises the bar by 30 % at most.

    Args:
        base: Lowest threshold, in sigmas.
        hold: Ordinary scores in a row that end an event.
        most: Highest threshold, where scores are bounded.

    Attributes:
        z: The last score; inf for a value that was not finite.
        threshold: What `z` was compared with.
        fired: Whether the last score exceeded the threshold.
        active: Whether an event is going on: it begins with a score that fires and ends after `hold` that do not.
    """

    __slots__ = ("_calm", "_decay", "_tail", "active", "base", "fired", "hold", "most", "threshold", "z")

    def __init__(self, *, base: float, hold: int = 12, most: float = inf) -> None:
        require_positive("base", base)
        if hold < 1:
            raise UsageError(f"the value of `hold` is {hold}, but it must be at least 1")
        self.base = base
        self.hold = hold
        self.most = most
        self._decay = 0.5 ** (1.0 / TAIL_HALF_LIFE)
        self._tail = 0.0
        self.end_event()

    def end_event(self) -> None:
        """End what is going on. The run's own tail is kept: it belongs to the run."""
        self._calm = 0
        self.z = 0.0
        self.threshold = min(max(self.base, TAIL_FACTOR * self._tail), self.most)
        self.fired = False
        self.active = False

    def judge(self, z: float) -> bool:
        """Compare a finite score with the bar, and let it count for the bar.

        Returns:
            True when `active` changed.
        """
        tail = self._tail * self._decay
        threshold = TAIL_FACTOR * tail
        if threshold < self.base:
            threshold = self.base
        elif threshold > self.most:
            threshold = self.most
        self.threshold = threshold
        self.z = z
        if z > threshold:
            self._tail = tail if self.active else max(tail, threshold)
            return self._fire()
        self._tail = max(tail, z)
        if self.active:
            return self.pass_over(z)
        self.fired = False
        return False

    def judge_non_finite(self) -> bool:
        """Fire on a value that has no score; it says nothing about the tail.

        Returns:
            True when `active` changed.
        """
        self.z = inf
        return self._fire()

    def pass_over(self, z: float = 0.0) -> bool:
        """Take a value as ordinary and leave the bar as it is.

        Returns:
            True when `active` changed.
        """
        self.z = z
        self.fired = False
        if not self.active:
            return False
        self._calm += 1
        if self._calm < self.hold:
            return False
        self.active = False
        return True

    def _fire(self) -> bool:
        self.fired = True
        self._calm = 0
        began = not self.active
        self.active = True
        return began

    def alarm_state(self) -> SignalState:
        """Return everything that `restore_alarm` needs."""
        return {
            "base": self.base,
            "hold": self.hold,
            "calm": self._calm,
            "tail": self._tail,
            "z": to_wire(self.z),
            "threshold": self.threshold,
            "fired": self.fired,
            "active": self.active,
        }

    def restore_alarm(self, state: SignalState) -> None:
        """Go on from what `alarm_state` returned."""
        self.base = state["base"]
        self.hold = state["hold"]
        self._calm = state["calm"]
        self._tail = state["tail"]
        self.z = from_wire(state["z"])
        self.threshold = state["threshold"]
        self.fired = state["fired"]
        self.active = state["active"]
