"""S1: a robust z in log space that neither a spike nor a NaN can poison.

The reference window holds what was ordinary: each value is pushed after being cut at median + 3 sigma, and non-finite
values are never pushed, so one NaN cannot blind the detector for a whole window as it does where a windowed mean is
used.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from math import asinh, copysign, exp, log, nan, sinh

from automode.errors import UsageError
from automode.planner.signals.nonfinite import FINITE_LIMIT
from automode.planner.signals.tail_alarm import TailAlarm
from automode.planner.signals.wire import SignalState

SIGMA_PER_IQR = 1.0 / 1.349
"""Of a normal distribution: sigma over the interquartile range."""

SIGMA_PER_UPPER = 1.0 / 1.2816
"""Of a normal distribution: sigma over what lies between the median and the 90th percentile."""

SIGMA_FLOOR = 0.02
"""Smallest sigma, in log units: a window of nearly equal values must not turn rounding into an alarm."""

SIGMA_HALF_LIFE = 300.0
"""Values after which half of the slow sigma is from newer windows."""

LARGEST_LOG = 700.0
"""Just below the largest argument that exp and sinh take."""

PUSH_CAP_SIGMA = 3.0


class RobustZ(TailAlarm):
    """Score each value against the median and the spread of the window before it.

    z = (v - median) / sigma with v = ln x; the bar is that of `TailAlarm`. Sigma is the largest of three: IQR / 1.349; (90th
    percentile - median) / 1.2816, because what an alarm is compared with is the upper tail, which is often longer; and the
    slow average of these over windows before, because 101 values know their spread to a fifth at best, and a window that
    happens to be quiet made most of the false alarms. All at least 0.02.

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
        scale: The warm-up scale s once asinh(x / s) is in use, else 0.
    """

    __slots__ = (
        "_cursor",
        "_i_mid",
        "_i_q1",
        "_i_q3",
        "_i_upper",
        "_keep",
        "_ring",
        "_slow",
        "_sorted",
        "_warm_scale",
        "_warming",
        "scale",
        "signed",
        "warm",
        "window",
    )

    def __init__(
        self, *, base: float, signed: bool = True, window: int = 101, warm: int = 25, hold: int = 12
    ) -> None:
        if not 8 <= warm <= window:
            raise UsageError(f"need 8 <= warm <= window, but warm is {warm} and window is {window}")
        super().__init__(base=base, hold=hold)
        self.signed = signed
        self.window = window
        self.warm = warm
        self._keep = 0.5 ** (1.0 / SIGMA_HALF_LIFE)
        self._warm_scale = 0.0
        self.scale = 0.0
        self.reset()

    def reset(self) -> None:
        """Start a new warm-up. The warm-up scale and the run's own tail are kept: they belong to the run."""
        self._warming: list[float] = []
        self._ring: list[float] = []
        self._sorted: list[float] = []
        self._cursor = 0
        self._i_mid = self._i_q1 = self._i_q3 = self._i_upper = 0
        self._slow = 0.0
        self.end_event()

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
        middle = ordered[self._i_mid]
        half = (ordered[self._i_q3] - ordered[self._i_q1]) * SIGMA_PER_IQR
        sigma = max(half, (ordered[self._i_upper] - middle) * SIGMA_PER_UPPER, SIGMA_FLOOR, self._slow)
        return self._original(middle + PUSH_CAP_SIGMA * sigma)

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
            return self.judge_non_finite()
        ring = self._ring
        if not ring:
            return self._warm_up(x)
        if self.scale:
            v = _asinh(x / self.scale)
        elif x > 0.0:
            v = log(x)
        elif self.signed:
            v = self._switch_to_asinh(x)
            ring = self._ring
        else:
            return self.pass_over()
        ordered = self._sorted
        middle = ordered[self._i_mid]
        sigma = (ordered[self._i_q3] - ordered[self._i_q1]) * SIGMA_PER_IQR
        upper = (ordered[self._i_upper] - middle) * SIGMA_PER_UPPER
        if sigma < upper:
            sigma = upper
        if sigma < SIGMA_FLOOR:
            sigma = SIGMA_FLOOR
        self._slow = slow = sigma + self._keep * (self._slow - sigma) if self._slow else sigma
        if sigma < slow:
            sigma = slow
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
        return self.judge(z)

    def _warm_up(self, x: float) -> bool:
        changed = self.pass_over()
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
        self._ring = [_asinh(x / self.scale) if self.scale else log(x) for x in raw]
        self._sorted = sorted(self._ring)
        self._warming = []
        self._place_quantiles()

    def _switch_to_asinh(self, x: float) -> float:
        self.scale = scale = self._warm_scale
        self._ring = [_asinh(exp(v) / scale) for v in self._ring]
        self._sorted = sorted(self._ring)
        self._slow = 0.0
        return _asinh(x / scale)

    def _place_quantiles(self) -> None:
        last = len(self._ring) - 1
        self._i_mid, self._i_q1, self._i_q3 = last // 2, last // 4, 3 * last // 4
        self._i_upper = 9 * last // 10

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {
            **self.alarm_state(),
            "signed": self.signed,
            "window": self.window,
            "warm": self.warm,
            "warming": list(self._warming),
            "ring": list(self._ring),
            "cursor": self._cursor,
            "slow": self._slow,
            "warm_scale": self._warm_scale,
            "scale": self.scale,
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
        signal._slow = state["slow"]
        signal._warm_scale = state["warm_scale"]
        signal.scale = state["scale"]
        if signal._ring:
            signal._place_quantiles()
        signal.restore_alarm(state)
        return signal


def _asinh(quotient: float) -> float:
    """asinh, held where sinh can take it back: a value may be so many times the scale that even the quotient overflows."""
    v = asinh(quotient)
    return v if -LARGEST_LOG < v < LARGEST_LOG else copysign(LARGEST_LOG, quotient)


def _warm_up_scale(raw: list[float]) -> float:
    """Median magnitude of the warm-up values; their mean, then 1, where that is 0."""
    magnitudes = sorted(abs(x) for x in raw)
    return magnitudes[len(magnitudes) // 2] or sum(magnitudes) / len(magnitudes) or 1.0
