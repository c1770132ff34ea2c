"""What the epochs of a run came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(slots=True)
class History:
    """What each epoch came to: lists of one entry an epoch, the last epoch possibly cut short.

    ``metrics`` holds the user's own by name, ``train_`` or ``val_`` before it. ``train_loss`` is the mean over the epoch's applied steps; ``val_loss``, ``val_metric`` are NaN and ``slices`` is
    empty for an epoch without validation.
    """

    epoch: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_metric: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    slices: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def note(self, numbers: Mapping[str, float]) -> None:
        """Enter the user's metrics of the epoch entered last, or enter them anew; NaN where an epoch has none of a name."""
        for name in (*self.metrics, *numbers):
            values = self.metrics.setdefault(name, [])
            values += [math.nan] * (len(self.epoch) - len(values))
        for name, value in numbers.items():
            self.metrics[name][-1] = value

    def as_dict(self) -> dict[str, list[Any]]:
        """Give the lists by name, the user's metrics behind the others."""
        own = {name: list(getattr(self, name)) for name in self.__slots__ if name != "metrics"}
        return own | {name: list(values) for name, values in self.metrics.items()}

    @classmethod
    def from_dict(cls, lists: Mapping[str, Sequence[Any]]) -> Self:
        """Make a history of what :meth:`as_dict` gave."""
        given = {name: list(values) for name, values in lists.items()}
        own = {name: given.pop(name) for name in cls.__slots__ if name in given}
        return cls(**own, metrics=given)


class Mean:
    """The mean of what was added since the last look."""

    def __init__(self) -> None:
        self._sum, self._n = 0.0, 0

    def add(self, values: Sequence[float]) -> None:
        """Add values; the sum does not depend on how they are split over calls."""
        # One after the other, where numpy's ``sum`` adds in pairs and Python's carries what rounding lost.
        total = self._sum
        for value in values:
            total += value
        self._sum = total
        self._n += len(values)

    def state(self) -> list[float]:
        """Sum and number so far, for :meth:`load`."""
        return [self._sum, self._n]

    def load(self, state: Sequence[float]) -> None:
        """Go on from what :meth:`state` gave."""
        self._sum, self._n = state[0], int(state[1])

    def take(self) -> float:
        """Give the mean, NaN of nothing, and begin anew."""
        mean = self._sum / self._n if self._n else math.nan
        self._sum, self._n = 0.0, 0
        return mean
