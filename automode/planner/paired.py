"""Sums of paired differences: all that a verdict needs to know of a group of held-out samples."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike

from automode.errors import UsageError

EQUAL_SPREAD = 1e-9
"""A standard deviation below this share of the mean is the rounding of equal values."""


@dataclass(frozen=True, slots=True)
class PairedSummary:
    """What a verdict needs to know of a group of paired differences.

    Attributes:
        n: Samples.
        mean: Mean difference; NaN if any difference is, or if there are none.
        variance: Sample variance of the differences (ddof 1); 0 for a single sample.
        effective_n: (sum d^2)^2 / sum d^4, between 1 and n; None where it is not known, which counts as n.
    """

    n: int
    mean: float
    variance: float
    effective_n: float | None = None

    def __post_init__(self) -> None:
        if self.n < 0:
            raise UsageError(f"a summary of n = {self.n} samples is impossible")
        if self.variance < 0.0:
            raise UsageError(f"a variance of {self.variance} is impossible")

    @classmethod
    def of(cls, differences: ArrayLike) -> PairedSummary:
        """Summarise differences of shape (n,).

        Raises:
            UsageError: If `differences` is not one-dimensional.
        """
        d = np.asarray(differences, dtype=np.float64)
        if d.ndim != 1:
            raise UsageError(
                f"`differences` has shape {d.shape}, but one difference for each sample is needed: (n,)"
            )
        if d.size == 0 or not np.isfinite(d).all():
            return cls(n=d.size, mean=nan, variance=nan)
        mean = float(d.mean())
        variance = float(d.var(ddof=1)) if d.size > 1 else 0.0
        # Scaled by the largest, so that fourth powers neither overflow nor vanish.
        largest = float(np.abs(d).max())
        if largest == 0.0:
            return cls(n=d.size, mean=mean, variance=variance)
        squares = (d / largest) ** 2
        return cls(
            n=d.size, mean=mean, variance=variance, effective_n=float(squares.sum() ** 2 / (squares**2).sum())
        )

    @classmethod
    def from_sums(cls, n: int, mean: float, m2: float) -> PairedSummary:
        """Build a summary from Welford's sums: `m2` is the sum of squared deviations from the mean."""
        return cls(n=n, mean=mean if n else nan, variance=m2 / (n - 1) if n > 1 else 0.0)

    def joined(self, other: PairedSummary) -> PairedSummary:
        """Summarise both groups as one; they share no sample. Effective samples add up, which is exact for groups alike."""
        if not self.n or not other.n:
            return other if not self.n else self
        n = self.n + other.n
        apart = other.mean - self.mean
        m2 = self.variance * (self.n - 1) + other.variance * (other.n - 1) + apart**2 * self.n * other.n / n
        known = (
            None
            if self.effective_n is None or other.effective_n is None
            else self.effective_n + other.effective_n
        )
        return PairedSummary(
            n=n, mean=self.mean + apart * other.n / n, variance=m2 / (n - 1), effective_n=known
        )

    @property
    def standard_error(self) -> float:
        """sqrt(variance / n); infinite without samples."""
        return sqrt(self.variance / self.n) if self.n else inf

    @property
    def degrees_of_freedom(self) -> float:
        """Effective samples minus 1, at least 1."""
        effective = self.n if self.effective_n is None else min(float(self.n), self.effective_n)
        return max(1.0, effective - 1.0)

    @property
    def sound(self) -> bool:
        """Whether a z can be computed from it: at least 2 samples, all finite, and not all equal but for rounding."""
        if self.n < 2 or not (isfinite(self.mean) and isfinite(self.variance)):
            return False
        return self.variance > 0.0 and sqrt(self.variance) > EQUAL_SPREAD * abs(self.mean)

    def z(self, delta: float = 0.0) -> float:
        """(mean + delta) in standard errors; NaN where the summary is not sound."""
        return (self.mean + delta) / self.standard_error if self.sound else nan
