"""When a trial stops before its rung, because it gains nothing any more."""

from __future__ import annotations

import math

from automode.planner.recipes import EarlyStopping

LOOKS_PER_RUNG = 10


class Patience:
    """Early stopping on the mean training loss of tenths of a rung."""

    def __init__(self, rule: EarlyStopping | None, steps: int) -> None:
        self._rule = rule
        self._size = max(1, steps // LOOKS_PER_RUNG)
        self._sum = 0.0
        self._n = 0
        self._best = math.inf
        self._stale = 0

    def see(self, loss: float) -> None:
        """Take one step's loss."""
        if self._rule is None:
            return
        self._sum += loss
        self._n += 1
        if self._n < self._size:
            return
        mean, self._sum, self._n = self._sum / self._n, 0.0, 0
        if mean < self._best - self._rule.min_delta:
            self._best, self._stale = mean, 0
        else:
            self._stale += 1

    @property
    def over(self) -> bool:
        """Whether the trial should stop here."""
        return self._rule is not None and self._stale >= self._rule.patience
