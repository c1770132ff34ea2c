"""Page-Hinkley on standardised residuals (Page 1954; Hinkley 1971).

The usual test on raw loss is useless here: its tolerance is in absolute loss units, and a loss that falls as it should is
permanent drift to a running mean. On residuals that are already centred and scaled the reference mean is 0, the
tolerance is in sigmas, and neither depends on the run.
"""

from __future__ import annotations

from automode.planner.signals.wire import SignalState, require_positive

CLIP = 4.0
"""A single residual counts for this much at most."""


class PageHinkley:
    """Detect an upward drift of standardised residuals.

    m_t = sum of (clip(z, -4, 4) - delta); the statistic is m_t - min m, an alarm above `threshold`. It starts anew after an alarm
    has ended, that is once the statistic has come back to 0.

    Args:
        delta: Drift that is tolerated, in sigmas per step.
        threshold: Alarm above this cumulative excess, in sigmas.

    Attributes:
        value: m_t - min m, never negative.
        active: Whether the statistic has exceeded the threshold and not come back to 0 since.
    """

    __slots__ = ("active", "delta", "threshold", "value")

    def __init__(self, *, delta: float = 0.5, threshold: float = 20.0) -> None:
        require_positive("delta", delta)
        require_positive("threshold", threshold)
        self.delta = delta
        self.threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forget the past."""
        self.value = 0.0
        self.active = False

    def update(self, z: float) -> bool:
        """Take one standardised residual.

        Returns:
            True when `active` changed.
        """
        if z > CLIP:
            z = CLIP
        elif z < -CLIP:
            z = -CLIP
        value = self.value + z - self.delta
        if value > 0.0:
            # Bounded, so that a long excursion does not take as long to be forgotten.
            cap = 2.0 * self.threshold
            self.value = min(value, cap)
            if value > self.threshold and not self.active:
                self.active = True
                return True
            return False
        self.value = 0.0
        if self.active:
            self.active = False
            return True
        return False

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {
            "delta": self.delta,
            "threshold": self.threshold,
            "value": self.value,
            "active": self.active,
        }

    @classmethod
    def from_state(cls, state: SignalState) -> PageHinkley:
        """Rebuild the signal from what `state` returned."""
        signal = cls(delta=state["delta"], threshold=state["threshold"])
        signal.value = state["value"]
        signal.active = state["active"]
        return signal
