"""S3 and S4: is the loss still improving enough to wait for, standing still, or getting worse?

Block means of the *raw* loss (b = B / 40 steps) are compared pair by pair. Kendall's variance bounds the Theil-Sen slope from both
sides, and the bounds, carried forward as a logarithm of time, answer the question in the user's units: in the best case that the data
allow, how much would another B steps bring? "No significant trend" is never taken for a plateau: when neither
bound decides, the answer is UNKNOWN, and UNKNOWN never acts.

    h       = (k - w/2) ln((k + B/b) / k)          blocks ahead, discounted as ln t flattens
    best    = -lower(z) h / level                  PLATEAU when best <= rho
    worst   = -upper(z) h / level                  IMPROVING when worst >= rho
    rise    = lower(z) w / level over the last B   REGRESSING when rise >= 10 % at two looks in a row

with k blocks since the reset, w = min(k, 2 B / b) of them in the window, and level the median of the last w / 4. Where that
leaves it open and its middle estimate is below rho, the last min(k, 4 B / b) blocks, two by two, may settle that it is a
plateau: a noisy loss needs a longer look. The rise is
judged over the last B and over the last B / 2 steps, whichever shows more: a run that diverges faster than B is still falling
or flat in most pairs of the longer window. A loss that has
jumped or crept up and is coming down again is not standing still: an excursion, and the end of REGRESSING, start the plateau's
window anew, while the window of the rise goes on.
"""

from __future__ import annotations

from enum import StrEnum
from math import ceil, hypot, inf, isfinite, log, nan

import numpy as np

from automode.errors import UsageError
from automode.planner.signals.mann_kendall import MannKendall
from automode.planner.signals.nonfinite import FINITE_LIMIT
from automode.planner.signals.slopes import PairSlopes, Vector, kendall_sigma
from automode.planner.signals.wire import SignalState, from_wire, require_positive, to_wire

BLOCKS_PER_BUDGET = 40
MIN_BLOCKS = 10
LOOK_EVERY_STEPS = 20
"""With small budgets blocks are short; they are looked at together, so that the cost per step stays bounded."""

REGRESS_LOOKS = 2
"""Looks in a row that must show the rise: one look in some four hundred shows one by chance."""

_PARAMETERS = ("budget", "gain", "z_advise", "z_execute", "z_rise", "regress_rise")
_NUMBERS = (
    "level",
    "best_advise",
    "best_execute",
    "worst_advise",
    "worst_execute",
    "slope",
    "z_against_gain",
    "rise",
)


class TrendState(StrEnum):
    """What the evidence says about the next B steps."""

    IMPROVING = "IMPROVING"
    PLATEAU = "PLATEAU"
    REGRESSING = "REGRESSING"
    UNKNOWN = "UNKNOWN"


class BlockTrend:
    """Follow the trend of a raw loss in blocks.

    Args:
        budget: B, the steps that one would spend to find out, at least 10.
        gain: rho, the relative gain over B steps that would make waiting worthwhile, in (0, 1).
        z_advise: One-sided confidence at which `status` decides, in sigmas.
        z_execute: One-sided confidence at which `firm` decides; at least `z_advise`.
        z_rise: One-sided confidence of the smallest plausible rise, by which a slow divergence is judged.
        regress_rise: Relative rise over B or B / 2 steps, at its smallest plausible, that counts as slow divergence.

    Attributes:
        status: The state at `z_advise`.
        firm: The state at `z_execute`.
        looks: Looks taken since the last reset.
        blocks: Blocks closed since the last reset or excursion (k).
        used: Blocks in the window of the last look (w), or in the longer one where that gave the bound.
        level: Median of the last quarter of the window.
        best_advise, best_execute: Largest plausible relative gain over the next B steps at either confidence; NaN
            before the first look, as all numbers of a look are.
        worst_advise, worst_execute: Smallest plausible relative gain.
        slope: Theil-Sen slope in loss units per step.
        z_against_gain: Mann-Kendall z of the series with the slope that would just bring `gain` taken out: the plateau is
            declared at every confidence up to about this.
        rise: Smallest plausible relative rise over the last B or B / 2 steps, the larger of the two, and 0 where Mann-Kendall finds
            none at `z_rise`; NaN until B / 2 steps since the reset, because the first steps after a change of rate often rise.
        rise_window: Steps over which that rise took place.
        mann_kendall: Streaming Mann-Kendall over the block means of the last B steps.
    """

    __slots__ = (
        "_block_sum",
        "_buffer",
        "_capacity",
        "_end",
        "_half_kendall",
        "_held",
        "_in_block",
        "_long_best",
        "_long_slopes",
        "_look_blocks",
        "_rising",
        "_since_look",
        "_slopes",
        "_wide",
        "best_advise",
        "best_execute",
        "block_steps",
        "blocks",
        "budget",
        "firm",
        "gain",
        "level",
        "level_scale",
        "looks",
        "mann_kendall",
        "regress_rise",
        "rise",
        "rise_window",
        "slope",
        "status",
        "used",
        "worst_advise",
        "worst_execute",
        "z_advise",
        "z_against_gain",
        "z_execute",
        "z_rise",
    )

    def __init__(
        self,
        *,
        budget: int = 800,
        gain: float = 0.01,
        z_advise: float = 1.0,
        z_execute: float = 1.28,
        z_rise: float = 1.645,
        regress_rise: float = 0.10,
    ) -> None:
        if budget < MIN_BLOCKS:
            raise UsageError(f"the value of `budget` is {budget} steps, but it must be at least {MIN_BLOCKS}")
        if not 0.0 < gain < 1.0:
            raise UsageError(f"the value of `gain` is {gain}, but a relative gain lies between 0 and 1")
        for name, value in (("z_advise", z_advise), ("z_rise", z_rise), ("regress_rise", regress_rise)):
            require_positive(name, value)
        if not (isfinite(z_execute) and z_execute >= z_advise):
            raise UsageError(
                f"z_execute is {z_execute}, but acting needs at least the confidence of advising, {z_advise}"
            )
        self.budget = budget
        self.gain = gain
        self.z_advise = z_advise
        self.z_execute = z_execute
        self.z_rise = z_rise
        self.regress_rise = regress_rise
        self.block_steps = ceil(budget / BLOCKS_PER_BUDGET)
        self._wide = max(MIN_BLOCKS, round(budget / self.block_steps))
        self._capacity = 2 * self._wide
        self._look_blocks = max(1, LOOK_EVERY_STEPS // self.block_steps)
        self._slopes = PairSlopes(self._capacity, (z_advise, z_execute, z_rise))
        self._long_slopes = PairSlopes(self._capacity, (z_advise, z_execute))
        self._buffer: Vector = np.empty(6 * self._capacity)
        self.level_scale = 0.0
        self.mann_kendall = MannKendall(window=self._wide)
        self._half_kendall = MannKendall(window=max(4, self._wide // 2))
        self.reset()

    def reset(self) -> None:
        """Forget all blocks; `level_scale` stays, it belongs to the loss."""
        self._block_sum = 0.0
        self._in_block = 0
        self._end = 0
        self._held = 0
        self._since_look = 0
        self.mann_kendall.reset()
        self._half_kendall.reset()
        self.status = TrendState.UNKNOWN
        self.firm = TrendState.UNKNOWN
        self.looks = 0
        self.rise = nan
        self.rise_window = 0
        self._rising = 0
        self._forget_window()

    def excursion(self) -> bool:
        """Start the window of the plateau anew, because the level has jumped; the window of the rise goes on.

        Returns:
            True when `status` or `firm` changed.
        """
        self._forget_window()
        if self.status is TrendState.REGRESSING:
            return False
        before = (self.status, self.firm)
        self.status = self.firm = TrendState.UNKNOWN
        return (self.status, self.firm) != before

    def _forget_window(self) -> None:
        self.blocks = 0
        self.used = 0
        self.level = self.slope = self.z_against_gain = nan
        self.best_advise = self.best_execute = self.worst_advise = self.worst_execute = nan
        self._long_best = (inf, inf)

    @property
    def window(self) -> int:
        """Steps in the window of the last look."""
        return self.used * self.block_steps

    def update(self, loss: float) -> bool:
        """Take one raw loss; a non-finite one is passed over.

        Returns:
            True when `status` or `firm` changed.
        """
        if not -FINITE_LIMIT < loss < FINITE_LIMIT:
            return False
        self._block_sum += loss
        self._in_block += 1
        if self._in_block < self.block_steps:
            return False
        return self._close_block()

    def _close_block(self) -> bool:
        mean = self._block_sum / self.block_steps
        self._block_sum = 0.0
        self._in_block = 0
        buffer = self._buffer
        if self._end == buffer.size:
            keep = 2 * self._capacity - 1
            buffer[:keep] = buffer[self._end - keep :]
            self._end = keep
        buffer[self._end] = mean
        self._end += 1
        self.blocks += 1
        self._held += 1
        self.mann_kendall.update(mean)
        self._half_kendall.update(mean)
        self._since_look += 1
        if self._since_look < self._look_blocks or self._held < MIN_BLOCKS:
            return False
        self._since_look = 0
        return self._look()

    def _look(self) -> bool:
        before = (self.status, self.firm)
        self.looks += 1
        self._bound_rise()
        if self.blocks >= MIN_BLOCKS:
            self._bound_gain()
        self._rising = self._rising + 1 if self.rise >= self.regress_rise else 0
        if self._rising >= REGRESS_LOOKS:
            self.status = self.firm = TrendState.REGRESSING
        elif self.status is TrendState.REGRESSING:
            self._forget_window()
            self.status = self.firm = TrendState.UNKNOWN
        else:
            self.status = self._decide(self.best_advise, self.worst_advise)
            self.firm = self._decide(self.best_execute, self.worst_execute)
        return (self.status, self.firm) != before

    def _bound_gain(self) -> None:
        k = self.blocks
        w = min(k, self._capacity)
        y = self._buffer[self._end - w : self._end]
        slopes = self._slopes
        slopes.compute(y)
        self.used = w
        self.level, weight = self._level(y)
        ahead = (k - 0.5 * w) * log((k + self.budget / self.block_steps) / k)
        self.slope = slopes.median / self.block_steps
        self.best_advise = -slopes.lower(self.z_advise) * ahead / weight
        self.best_execute = -slopes.lower(self.z_execute) * ahead / weight
        self.worst_advise = -slopes.upper(self.z_advise) * ahead / weight
        self.worst_execute = -slopes.upper(self.z_execute) * ahead / weight
        self.z_against_gain = slopes.kendall_z(-self.gain * weight / ahead)
        open_yet = self.worst_advise < self.gain < self.best_execute
        if open_yet and k > self._capacity and -slopes.median * ahead / weight <= self.gain:
            self._look_longer(weight)

    def _look_longer(self, weight: float) -> None:
        """Bound the gain by the last 4 B as well, in blocks twice as long; every other block, for they must be whole."""
        k = self.blocks
        if k % 2 == 0:
            pairs = min(k, 2 * self._capacity) // 2
            y = self._buffer[self._end - 2 * pairs : self._end].reshape(pairs, 2).mean(axis=1)
            self._long_slopes.compute(y)
            ahead = (k - pairs) * log((k + self.budget / self.block_steps) / k) / weight
            advise, execute = (
                -0.5 * self._long_slopes.lower(z) * ahead for z in (self.z_advise, self.z_execute)
            )
            self._long_best = (advise, execute)
        self.best_advise = min(self.best_advise, self._long_best[0])
        if self._long_best[1] < self.best_execute:
            self.best_execute = self._long_best[1]
            self.used = min(k, 2 * self._capacity)

    def _bound_rise(self) -> None:
        half = self._wide // 2
        if self._held < half:
            self.rise = nan
            return
        w = min(self._held, self._wide)
        self.rise, self.rise_window = self._smallest_rise(w, self.mann_kendall), w * self.block_steps
        if w > half >= MIN_BLOCKS and (sooner := self._smallest_rise(half, self._half_kendall)) > self.rise:
            self.rise, self.rise_window = sooner, half * self.block_steps

    def _smallest_rise(self, w: int, kendall: MannKendall) -> float:
        # The lower bound is this test inverted: where it does not reject, the bound is at most 0, and needs no slopes.
        if kendall.s < self.z_rise * kendall_sigma(w):
            return 0.0
        y = self._buffer[self._end - w : self._end]
        self._slopes.compute(y)
        return max(0.0, self._slopes.lower(self.z_rise) * w / self._level(y)[1])

    def _level(self, y: Vector) -> tuple[float, float]:
        """The level, and what a change is relative to.

        d ln x = dx / x, and d asinh(x / s) = dx / sqrt(x^2 + s^2): with `level_scale` s set, losses at or below 0 have a relative
        change too.
        """
        tail: list[float] = sorted(y[-(y.size // 4) :].tolist())
        middle = len(tail) // 2
        level = tail[middle] if len(tail) % 2 else 0.5 * (tail[middle - 1] + tail[middle])
        return level, hypot(level, self.level_scale) or FINITE_LIMIT

    def _decide(self, best: float, worst: float) -> TrendState:
        if best <= self.gain:
            return TrendState.PLATEAU
        if worst >= self.gain:
            return TrendState.IMPROVING
        return TrendState.UNKNOWN

    def describe(self) -> str:
        """One sentence for a card: the best case at `z_execute`, what was asked for, and what it rests on."""
        if not self.used:
            return f"No look yet: {self.blocks} of {MIN_BLOCKS} blocks of {self.block_steps} steps."
        return (
            f"Best case (z {self.z_execute:g}, one-sided) another {100 * self.best_execute:.2g} % in the next "
            f"{self.budget} steps; you asked for >= {100 * self.gain:g} %. Window {self.window} steps, {self.used} blocks, "
            f"level {self.level:.4g}."
        )

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        kept = min(self._end, 2 * self._capacity)
        return {
            **{name: getattr(self, name) for name in _PARAMETERS},
            "level_scale": self.level_scale,
            "means": self._buffer[self._end - kept : self._end].tolist(),
            "block_sum": self._block_sum,
            "in_block": self._in_block,
            "since_look": self._since_look,
            "mann_kendall": self.mann_kendall.state(),
            "status": str(self.status),
            "firm": str(self.firm),
            "looks": self.looks,
            "blocks": self.blocks,
            "held": self._held,
            "rising": self._rising,
            "rise_window": self.rise_window,
            "used": self.used,
            "long_best": [to_wire(best) for best in self._long_best],
            "numbers": {name: to_wire(getattr(self, name)) for name in _NUMBERS},
        }

    @classmethod
    def from_state(cls, state: SignalState) -> BlockTrend:
        """Rebuild the signal from what `state` returned."""
        signal = cls(**{name: state[name] for name in _PARAMETERS})
        signal.level_scale = state["level_scale"]
        means = state["means"]
        signal._buffer[: len(means)] = means
        for mean in means[len(means) - min(len(means), state["held"], signal._half_kendall.window) :]:
            signal._half_kendall.update(mean)
        signal._end = len(means)
        signal._block_sum = state["block_sum"]
        signal._in_block = state["in_block"]
        signal._since_look = state["since_look"]
        signal.mann_kendall = MannKendall.from_state(state["mann_kendall"])
        signal.status = TrendState(state["status"])
        signal.firm = TrendState(state["firm"])
        signal.looks = state["looks"]
        signal.blocks = state["blocks"]
        signal._held = state["held"]
        signal._rising = state["rising"]
        signal.rise_window = state["rise_window"]
        signal.used = state["used"]
        signal._long_best = (from_wire(state["long_best"][0]), from_wire(state["long_best"][1]))
        for name in _NUMBERS:
            setattr(signal, name, from_wire(state["numbers"][name]))
        return signal
