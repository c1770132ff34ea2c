"""Pairwise slopes of a short series, and the Theil-Sen bounds that Kendall's variance gives (Sen 1968)."""

from __future__ import annotations

from functools import lru_cache
from math import floor, inf, sqrt
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from automode.errors import UsageError

Vector: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Places: TypeAlias = dict[float, tuple[int, int]]


@lru_cache(maxsize=8)
def _pairs(m: int) -> tuple[Indices, Indices, Vector]:
    """Index pairs i < j below m and 1 / (j - i), ordered by j: the pairs of the first w points are a prefix."""
    j, i = np.tril_indices(m, k=-1)
    return i.astype(np.intp), j.astype(np.intp), 1.0 / (j - i).astype(np.float64)


@lru_cache(maxsize=1024)
def kendall_sigma(w: int) -> float:
    """Standard deviation of Kendall's S of `w` exchangeable points without ties."""
    return sqrt(w * (w - 1) * (2 * w + 5) / 18.0)


@lru_cache(maxsize=1024)
def _ranks(w: int, levels: tuple[float, ...]) -> tuple[Indices, Places, tuple[int, int]]:
    """Positions among the sorted slopes of `w` points.

    Returns:
        All that are needed, in order, between the two that the next window's are looked for between; and as positions in that
        array, (lower, upper) by confidence, and the two of the median.
    """
    n = w * (w - 1) // 2
    bounds = {}
    for z in levels:
        # Order statistics are counted from 1, positions from 0.
        low = max(0, floor((n - z * kendall_sigma(w)) / 2.0) - 1)
        bounds[z] = (low, n - 1 - low)
    needed = sorted({(n - 1) // 2, n // 2}.union(*bounds.values()))
    # A point that leaves and one that comes change the rank of a value by less than w each, and mostly by far less.
    spare = 3 * w // 2
    ends = (max(0, needed[0] - spare), min(n - 1, needed[-1] + spare))
    at = {rank: index for index, rank in enumerate(needed, 1)}
    places = {z: (at[low], at[high]) for z, (low, high) in bounds.items()}
    return np.array([ends[0], *needed, ends[1]], np.intp), places, (at[(n - 1) // 2], at[n // 2])


class PairSlopes:
    """Compute all slopes between pairs of equally spaced points, into memory that is allocated once.

    Only the order statistics that are asked for are found, and looked for where the last window had them: the windows of a run
    follow each other a point or two apart, and all but a fifth of the slopes are ruled out by two comparisons. Where that fails,
    all are looked through, so that the last window changes the time taken and nothing else.

    Args:
        capacity: Largest number of points.
        levels: The one-sided confidences z at which `lower` and `upper` may be asked for.

    Attributes:
        w: Points of the last `compute`.
        slopes: Slopes of the last `compute`, shape (w (w - 1) / 2,), in y-units per point, pairs (i, j) ordered by j;
            overwritten by the next.
    """

    __slots__ = (
        "_between",
        "_i",
        "_inverse_gap",
        "_j",
        "_left",
        "_middle",
        "_order",
        "_places",
        "_right",
        "capacity",
        "levels",
        "slopes",
        "w",
    )

    def __init__(self, capacity: int, levels: tuple[float, ...]) -> None:
        if capacity < 3:
            raise UsageError(f"the value of `capacity` is {capacity}, but slopes need at least 3 points")
        self.capacity = capacity
        self.levels = levels
        self._i, self._j, self._inverse_gap = _pairs(capacity)
        self._left = np.empty(self._i.size)
        self._right = np.empty(self._i.size)
        self._places: Places = {}
        self._middle = (0, 0)
        self._order: list[float] = []
        self._between = (-inf, inf)
        self.slopes: Vector = self._right[:0]
        self.w = 0

    def compute(self, y: Vector) -> None:
        """Compute the slopes of `y`, shape (w,), finite, oldest first, 2 <= w <= capacity."""
        w = y.size
        n = w * (w - 1) // 2
        left, right = self._left[:n], self._right[:n]
        # mode="clip" lets numpy write into `out` directly; the indices are in range by construction.
        y.take(self._i[:n], out=left, mode="clip")
        y.take(self._j[:n], out=right, mode="clip")
        np.subtract(right, left, out=right)
        np.multiply(right, self._inverse_gap[:n], out=right)
        self.slopes = right
        self.w = w
        ranks, self._places, self._middle = _ranks(w, self.levels)
        self._order = order = self._statistics(right, ranks)
        self._between = (order[0], order[-1])

    def _statistics(self, slopes: Vector, ranks: Indices) -> list[float]:
        """Give the order statistics at these ranks, which rise."""
        low, high = self._between
        below = int(np.count_nonzero(slopes < low))
        inside = slopes.compress((slopes >= low) & (slopes <= high))  # a third of what indexing costs
        if below > ranks[1] or below + inside.size <= ranks[-2]:
            inside, below = slopes.copy(), 0
        found = np.minimum(np.maximum(ranks - below, 0), inside.size - 1)
        inside.partition(found)
        return cast("list[float]", inside[found].tolist())

    @property
    def median(self) -> float:
        """The Theil-Sen slope."""
        low, high = self._middle
        return 0.5 * (self._order[low] + self._order[high])

    def lower(self, z: float) -> float:
        """The one-sided lower bound of the slope at confidence `z`: s_(floor((N - z sigma_S) / 2))."""
        return self._order[self._places[z][0]]

    def upper(self, z: float) -> float:
        """The one-sided upper bound of the slope at confidence `z`, the mirror image of `lower`."""
        return self._order[self._places[z][1]]

    def kendall_z(self, slope: float) -> float:
        """Mann-Kendall's z (without continuity correction) of the series y - slope * t: positive when it still rises.

        `lower(z)` and `upper(z)` are this test inverted: the slopes it does not reject.
        """
        below = int(np.count_nonzero(self.slopes < slope))
        above = int(np.count_nonzero(self.slopes > slope))
        return (above - below) / kendall_sigma(self.w)
