"""Sorted pairwise slopes of a short series, and the Theil-Sen bounds that Kendall's variance gives (Sen 1968)."""

from __future__ import annotations

from functools import lru_cache
from math import floor, sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from automode.errors import UsageError

Vector: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]


@lru_cache(maxsize=8)
def _pairs(m: int) -> tuple[Indices, Indices, Vector]:
    """Index pairs i < j below m and 1 / (j - i), ordered by j: the pairs of the first w points are a prefix."""
    j, i = np.tril_indices(m, k=-1)
    return i.astype(np.intp), j.astype(np.intp), 1.0 / (j - i).astype(np.float64)


def kendall_sigma(w: int) -> float:
    """Standard deviation of Kendall's S of `w` exchangeable points without ties."""
    return sqrt(w * (w - 1) * (2 * w + 5) / 18.0)


class PairSlopes:
    """Compute all slopes between pairs of equally spaced points, into memory that is allocated once.

    Args:
        capacity: Largest number of points.

    Attributes:
        w: Points of the last `compute`.
        slopes: Sorted slopes of the last `compute`, shape (w (w - 1) / 2,), in y-units per point; overwritten by the next.
    """

    __slots__ = ("_i", "_inverse_gap", "_j", "_left", "_right", "capacity", "slopes", "w")

    def __init__(self, capacity: int) -> None:
        if capacity < 3:
            raise UsageError(f"the value of `capacity` is {capacity}, but slopes need at least 3 points")
        self.capacity = capacity
        self._i, self._j, self._inverse_gap = _pairs(capacity)
        self._left = np.empty(self._i.size)
        self._right = np.empty(self._i.size)
        self.slopes: Vector = self._right[:0]
        self.w = 0

    def compute(self, y: Vector) -> None:
        """Sort the slopes of `y`, shape (w,), finite, oldest first, 2 <= w <= capacity."""
        w = y.size
        n = w * (w - 1) // 2
        left, right = self._left[:n], self._right[:n]
        # mode="clip" lets numpy write into `out` directly; the indices are in range by construction.
        y.take(self._i[:n], out=left, mode="clip")
        y.take(self._j[:n], out=right, mode="clip")
        np.subtract(right, left, out=right)
        np.multiply(right, self._inverse_gap[:n], out=right)
        right.sort()
        self.slopes = right
        self.w = w

    @property
    def median(self) -> float:
        """The Theil-Sen slope."""
        n = self.slopes.size
        middle = n // 2
        if n % 2:
            return float(self.slopes[middle])
        return 0.5 * (float(self.slopes[middle - 1]) + float(self.slopes[middle]))

    def lower(self, z: float) -> float:
        """The one-sided lower bound of the slope at confidence `z`: s_(floor((N - z sigma_S) / 2))."""
        n = self.slopes.size
        rank = floor((n - z * kendall_sigma(self.w)) / 2.0)
        return float(self.slopes[rank]) if rank > 0 else float(self.slopes[0])

    def upper(self, z: float) -> float:
        """The one-sided upper bound of the slope at confidence `z`, the mirror image of `lower`."""
        n = self.slopes.size
        rank = n - 1 - floor((n - z * kendall_sigma(self.w)) / 2.0)
        return float(self.slopes[rank]) if rank < n - 1 else float(self.slopes[n - 1])

    def kendall_z(self, slope: float) -> float:
        """Mann-Kendall's z (without continuity correction) of the series y - slope * t: positive when it still rises.

        `lower(z)` and `upper(z)` are this test inverted: the slopes it does not reject.
        """
        below = int(self.slopes.searchsorted(slope, side="left"))
        above = self.slopes.size - int(self.slopes.searchsorted(slope, side="right"))
        return (above - below) / kendall_sigma(self.w)
