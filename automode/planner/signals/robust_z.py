"""S1: a robust z in log space that neither a spike nor a NaN can poison.

The reference window holds what was ordinary: each value is pushed after being cut at median + 3 sigma, and non-finite
values are never pushed, so one NaN cannot blind the detector for a whole window as it does where a windowed mean is
used. The threshold follows the run's own tail, because at small batch sizes an ordinary step reaches z = 6.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from math import asinh, exp, inf, log, nan, sinh

from automode.errors import UsageError
from automode.planner.signals.nonfinite import FINITE_LIMIT
from automode.planner.signals.wire import SignalState, from_wire, require_positive, to_wire

SIGMA_PER_IQR = 1.0 / 1.349
"""Of a normal distribution: sigma over the interquartile range."""

SIGMA_FLOOR = 0.02
"""Smallest sigma, in log units: a window of nearly equal values must not turn rounding into an alarm."""

LARGEST_LOG = 700.0
"""Just below the largest argument that exp and sinh take."""

PUSH_CAP_SIGMA = 3.0
TAIL_FACTOR = 1.3
TAIL_HALF_LIFE = 3000.0


class RobustZ:
    """Score each value against the median and the interquartile range of the window before it.

    z = (v - median) / max(IQR / 1.349, 0.02) with v = ln x; an alarm when z > max(base, 1.3 m), where m is the run's own
    largest z, decaying with a half-life of 3000 values. What enters m is cut at the threshold in force and once per
    event, so that a real spike raises the bar by 30 % at most.

    Where a signed quantity (a loss that may be 0 or negative) is first seen at or below 0, v becomes asinh(x / s) with
    s the median magnitude of the warm-up values, for good: about linear below s and logarithmic above. An unsigned quantity
    (a norm) that is exactly 0 says nothing about spikes and is passed over.

    Args:
        base: Lowest threshold, in robust sigmas.
        signed: Whether values at or below 0 are legitimate.
        window: Length of the reference window in values.
        warm: Values before the first score.
        hold: Ordinary values in a row that end an event.

    Attributes:
        z: Score of the last value, before it was pushed; 0 during warm-up, inf for a non-finite value.
        threshold: What `z` was compared with.
        fired: Whether the last value exceeded the threshold.
        active: Whether an event is going on: it begins with a value that fires and ends after `hold` that do not.
        scale: The warm-up scale s once asinh(x / s) is in use, else 0.
    """

    __slots__ = (
        "_calm",
        "_cursor",
        "_decay",
        "_i_mid",
        "_i_q1",
        "_i_q3",
        "_ring",
        "_sorted",
        "_tail",
        "_warm_scale",
        "_warming",
        "active",
        "base",
        "fired",
        "hold",
        "scale",
        "signed",
        "threshold",
        "warm",
        "window",
        "z",
    )

    def __init__(
        self, *, base: float, signed: bool = True, window: int = 101, warm: int = 25, hold: int = 12
    ) -> None:
        require_positive("base", base)
        if not 8 <= warm <= window:
            raise UsageError(f"need 8 <= warm <= window, but warm is {warm} and window is {window}")
        if hold < 1:
            raise UsageError(f"the value of `hold` is {hold}, but it must be at least 1")
        self.base = base
        self.signed = signed
        self.window = window
        self.warm = warm
        self.hold = hold
        self._decay = 0.5 ** (1.0 / TAIL_HALF_LIFE)
        self._tail = 0.0
        self._warm_scale = 0.0
        self.scale = 0.0
        self.reset()

    def reset(self) -> None:
        """Start a new warm-up. The warm-up scale and the run's own tail are kept: they belong to the run."""
        self._warming: list[float] = []
        self._ring: list[float] = []
        self._sorted: list[float] = []
        self._cursor = 0
        self._calm = 0
        self._i_mid = self._i_q1 = self._i_q3 = 0
        self.z = 0.0
        self.threshold = max(self.base, TAIL_FACTOR * self._tail)
        self.fired = False
        self.active = False

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over."""
        return bool(self._ring)

    @property
    def ceiling(self) -> float | None:
        """The largest ordinary value in its own unit: median + 3 sigma, as in the push; None during the warm-up."""
        ordered = self._sorted
        if not self._ring:
            return None
        sigma = max((ordered[self._i_q3] - ordered[self._i_q1]) * SIGMA_PER_IQR, SIGMA_FLOOR)
        v = ordered[self._i_mid] + PUSH_CAP_SIGMA * sigma
        return self._original(v)

    @property
    def median(self) -> float:
        """Median of the reference window in the unit of the values; NaN during warm-up."""
        if not self._ring:
            return nan
        return self._original(self._sorted[self._i_mid])

    def _original(self, v: float) -> float:
        v = min(v, LARGEST_LOG)
        return sinh(v) * self.scale if self.scale else exp(v)

    def update(self, x: float) -> bool:
        """Score `x` and push it.

        Args:
            x: The raw value of this step.

        Returns:
            True when `active` changed.
        """
        if not -FINITE_LIMIT < x < FINITE_LIMIT:
            self.z = inf
            return self._fire()
        ring = self._ring
        if not ring:
            return self._warm_up(x)
        if self.scale:
            v = asinh(x / self.scale)
        elif x > 0.0:
            v = log(x)
        elif self.signed:
            v = self._switch_to_asinh(x)
            ring = self._ring
        else:
            return self._ordinary(0.0)
        ordered = self._sorted
        middle = ordered[self._i_mid]
        sigma = (ordered[self._i_q3] - ordered[self._i_q1]) * SIGMA_PER_IQR
        if sigma < SIGMA_FLOOR:
            sigma = SIGMA_FLOOR
        z = (v - middle) / sigma
        if z > PUSH_CAP_SIGMA:
            v = middle + PUSH_CAP_SIGMA * sigma
        cursor = self._cursor
        if len(ring) == self.window:
            del ordered[bisect_left(ordered, ring[cursor])]
            ring[cursor] = v
            self._cursor = cursor + 1 if cursor + 1 < self.window else 0
            insort(ordered, v)
        else:
            ring.append(v)
            insort(ordered, v)
            self._place_quantiles()
        tail = self._tail * self._decay
        threshold = TAIL_FACTOR * tail
        if threshold < self.base:
            threshold = self.base
        self.threshold = threshold
        self.z = z
        if z > threshold:
            self._tail = tail if self.active else max(tail, threshold)
            return self._fire()
        self._tail = max(tail, z)
        if self.active:
            return self._ordinary(z)
        return False

    def _fire(self) -> bool:
        self.fired = True
        self._calm = 0
        began = not self.active
        self.active = True
        return began

    def _ordinary(self, z: float) -> bool:
        self.z = z
        self.fired = False
        if not self.active:
            return False
        self._calm += 1
        if self._calm < self.hold:
            return False
        self.active = False
        return True

    def _warm_up(self, x: float) -> bool:
        changed = self._ordinary(0.0)
        if x <= 0.0 and not self.signed:
            return changed
        self._warming.append(x)
        if len(self._warming) == self.warm:
            self._begin()
        return changed

    def _begin(self) -> None:
        """Choose the transformation, once, and open the window with the warm-up's values."""
        raw = self._warming
        if self._warm_scale == 0.0:
            self._warm_scale = _warm_up_scale(raw)
        if min(raw) <= 0.0:
            self.scale = self._warm_scale
        self._ring = [asinh(x / self.scale) if self.scale else log(x) for x in raw]
        self._sorted = sorted(self._ring)
        self._warming = []
        self._place_quantiles()

    def _switch_to_asinh(self, x: float) -> float:
        self.scale = scale = self._warm_scale
        self._ring = [asinh(exp(v) / scale) for v in self._ring]
        self._sorted = sorted(self._ring)
        return asinh(x / scale)

    def _place_quantiles(self) -> None:
        last = len(self._ring) - 1
        self._i_mid, self._i_q1, self._i_q3 = last // 2, last // 4, 3 * last // 4

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {
            "base": self.base,
            "signed": self.signed,
            "window": self.window,
            "warm": self.warm,
            "hold": self.hold,
            "warming": list(self._warming),
            "ring": list(self._ring),
            "cursor": self._cursor,
            "calm": self._calm,
            "tail": self._tail,
            "warm_scale": self._warm_scale,
            "scale": self.scale,
            "z": to_wire(self.z),
            "threshold": self.threshold,
            "fired": self.fired,
            "active": self.active,
        }

    @classmethod
    def from_state(cls, state: SignalState) -> RobustZ:
        """Rebuild the signal from what `state` returned."""
        signal = cls(
            base=state["base"],
            signed=state["signed"],
            window=state["window"],
            warm=state["warm"],
            hold=state["hold"],
        )
        signal._warming = list(state["warming"])
        signal._ring = list(state["ring"])
        signal._sorted = sorted(signal._ring)
        signal._cursor = state["cursor"]
        signal._calm = state["calm"]
        signal._tail = state["tail"]
        signal._warm_scale = state["warm_scale"]
        signal.scale = state["scale"]
        if signal._ring:
            signal._place_quantiles()
        signal.z = from_wire(state["z"])
        signal.threshold = state["threshold"]
        signal.fired = state["fired"]
        signal.active = state["active"]
        return signal


def _warm_up_scale(raw: list[float]) -> float:
    """Median magnitude of the warm-up values; their mean, then 1, where that is 0."""
    magnitudes = sorted(abs(x) for x in raw)
    return magnitudes[len(magnitudes) // 2] or sum(magnitudes) / len(magnitudes) or 1.0
