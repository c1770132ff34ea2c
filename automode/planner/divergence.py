"""When a run has certainly diverged by its loss: the level stands far above where it was, and stays there.

Certainty is wanted here and not speed, because going back throws away what was trained since: spikes, bumps that decay and
losses that are noisy or nearly zero must not look like a divergence. The window is raw and short, since the signals' windows
are protected against outliers and follow a level that has gone up only slowly.
"""

from __future__ import annotations

from collections import deque
from math import exp, inf, isfinite, log
from typing import Final

from automode.planner.policy import SafeguardPolicy

WIDTH: Final = 20
"""Losses whose median is the level."""

SPREADS: Final = 2.0
"""Least distance from the lowest level, in standard deviations of single losses: seven of a median of 20."""

MEMORY: Final = 0.1
"""Weight of the latest look in the spread."""

REMEMBERED: Final = 512
"""Looks whose level is remembered, for a run that goes back to one of them."""

REACH: Final = 2.5
"""Least distance from a single first loss, in distances between the median and the least of the recent losses."""

SHARE: Final = 0.25
"""Least part of the way back up from the lowest level to the first loss: a loss near 0 may multiply without any harm."""

LEARNT: Final = 0.8
"""A run has learnt something once its level was below this share of its first loss."""

LOST: Final = 0.9
"""Part of the way back up, in logarithms, on which all that was learnt counts as lost."""

LARGEST_LOG: Final = 700.0


def patience_of(policy: SafeguardPolicy, budget: int) -> int:
    """Steps that a level must stay far above before it counts; ``budget`` is B in steps."""
    return policy.rewind_patience or max(WIDTH, budget // 8)


def keep_every_of(policy: SafeguardPolicy, budget: int) -> int:
    """Steps between two good states; ``budget`` is B in steps."""
    return policy.keep_every or max(WIDTH, budget // 4)


class LevelWatch:
    """Follow the level of the loss, in logarithms.

    The run has diverged when, at every look for ``patience`` steps, either the level is more than ``above`` times and some
    spreads over the lowest one, and a quarter of the way back to the first loss; or all that was learnt is lost, and the level
    is some spreads over the lowest one or the trend's test says that it rises. A run with a loss at or below 0 has no such level and never counts.

    Args:
        above: Multiple of the lowest level.
        patience: Steps.

    Attributes:
        recent: The last losses; the caller appends each one.
        first: The first finite loss since the last :meth:`restart`; the caller gives it to :meth:`begin`.
        top: The run's first loss, which going back does not change.
        since: Step of the first look at which the level was far above, without a break until now; else None.
        sound_at: Step of the last look at which the level was near its lowest.
        level: Logarithm of the median of the recent losses at the last look.
        lowest: Its lowest value.
    """

    __slots__ = (
        "_begun",
        "_levels",
        "_spread",
        "above",
        "first",
        "level",
        "lowest",
        "patience",
        "recent",
        "signed",
        "since",
        "sound_at",
        "top",
    )

    def __init__(self, *, above: float, patience: int) -> None:
        self.above = above
        self.patience = patience
        self.recent: deque[float] = deque(maxlen=WIDTH)
        self.top: float | None = None
        self.signed = False
        self._levels: deque[tuple[int, float]] = deque(maxlen=REMEMBERED)
        self._spread: float | None = None
        self.restart(0)

    def restart(self, step: int, *, at: int | None = None) -> None:
        """Begin anew.

        Args:
            step: Of now.
            at: Step whose weights the run has again, which is then measured by the level of then; None: others, or none yet.
        """
        known = [level for when, level in self._levels if at is not None and when <= at]
        self.lowest = known[-1] if known else inf
        if not known:
            self._spread = None
        self.recent.clear()
        self.first: float | None = None
        self.level = inf
        self._begun = step
        self.since: int | None = None
        self.sound_at = step

    def begin(self, loss: float) -> None:
        """Take the first loss."""
        if not isfinite(loss):
            return
        if loss <= 0.0:
            self.signed = True
            return
        self.first = loss
        if self.lowest == inf:
            self.lowest = log(loss)
        if self.top is None:
            self.top = loss

    def look(self, step: int, *, rising: bool) -> None:
        """Compare the level of now with the lowest.

        Args:
            step: Of now; does not fall.
            rising: Whether the trend says so at the confidence for acting.
        """
        if self.signed or self.first is None or len(self.recent) < WIDTH:
            return
        if min(self.recent) <= 0.0:
            self.signed, self.since = True, None
            return
        whole = isfinite(sum(self.recent))  # the usual case, in a third of the time
        ordered = sorted(self.recent if whole else (x if isfinite(x) else inf for x in self.recent))
        self.level = level = (_log(ordered[WIDTH // 2 - 1]) + _log(ordered[WIDTH // 2])) / 2
        upper = _log(ordered[-(WIDTH // 4) - 1])
        # Of the upper half alone: losses near 0 have a long tail downwards.
        spread = (upper - level) / 0.6745 if isfinite(upper) else inf
        if self._spread is not None and self.since is None and isfinite(spread):
            self._spread += MEMORY * (spread - self._spread)
        if level < self.lowest:
            self.lowest = level
            self._spread = spread if self._spread is None else self._spread
        least = self._least(level, _log(ordered[0]), spread)
        room = max(log(self.above), least) if isfinite(least) else log(self.above)
        rise = level - self.lowest
        if rise <= room / 4:
            self.sound_at = step
        far = rise > room and self._on_the_way_back(level)
        if far or (self._lost(level) and (rising or least < rise < inf)):
            if self.since is None:
                self.since = step
            return
        self.since = None
        self._levels.append((step, level))
        if self._spread is None and step - self._begun >= 2 * self.patience:
            self.lowest, self._spread = level, spread  # the level that it has, in place of one loss

    def diverged(self, step: int) -> bool:
        """Whether the level has been far above for long enough."""
        return self.since is not None and step - self.since >= self.patience

    def _least(self, level: float, smallest: float, spread: float) -> float:
        if self._spread is not None:
            return SPREADS * self._spread
        # A run that was never below its first loss is compared with that one loss, which may have been a lucky one.
        return max(REACH * (level - smallest), 3.0 * SPREADS * spread)

    def _on_the_way_back(self, level: float) -> bool:
        assert self.top is not None
        low = exp(self.lowest)
        return level > LARGEST_LOG or exp(level) >= low + SHARE * max(0.0, self.top - low)

    def _lost(self, level: float) -> bool:
        assert self.top is not None
        top = log(self.top)
        return self.lowest <= top + log(LEARNT) and level >= self.lowest + LOST * (top - self.lowest)


def _log(x: float) -> float:
    return log(x) if x < inf else inf
