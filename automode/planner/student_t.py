"""Student's t distribution without scipy: distribution function and quantile, for evidence from few samples."""

from __future__ import annotations

from math import erfc, exp, inf, isfinite, lgamma, log, log1p, pi, sqrt
from statistics import NormalDist
from typing import Final

from automode.errors import UsageError

_NORMAL = NormalDist()
_LARGE_DF = 1e5
"""Above this the expansions in 1 / df are exact to 1e-10, and lgamma would cost more digits than they do."""


def t_tail(t: float, df: float) -> float:
    """Return P(T > `t`) for Student's T with `df` > 0 degrees of freedom (need not be whole).

    Args:
        t: Any float; infinities are allowed.
        df: Degrees of freedom.

    Raises:
        UsageError: If `df` is not above 0 or `t` is NaN.
    """
    if not df > 0.0:
        raise UsageError(f"the value of `df` is {df!r}, but degrees of freedom must be above 0")
    if t != t:
        raise UsageError("the value of `t` is NaN")
    if t < 0.0:
        return 1.0 - t_tail(-t, df)
    if t == inf:
        return 0.0
    if df > _LARGE_DF:
        # Abramowitz and Stegun 26.7.8.
        z = t * (1.0 - 0.25 / df) / sqrt(1.0 + 0.5 * t * t / df)
        return 0.5 * erfc(z / sqrt(2.0))
    return 0.5 * _incomplete_beta(0.5 * df, 0.5, df / (df + t * t), t * t / (df + t * t))


SIGNS: Final = 3.1787
"""1 / (4 P(Z >= sqrt 2)): no weighted sum of random signs exceeds x times its standard deviation more often than so many times P(Z >= x)."""


def upper_sign_quantile(alpha: float, n: int) -> float:
    """Return a t that mean / standard error of n differences exceeds with probability ``alpha`` at most, if their signs are random.

    Whatever their sizes: a few may outweigh all others, where Student's distribution would ask for the degrees of freedom of a few. It holds
    where each difference is as likely to be d as -d (Bentkus and Dzindzalieta 2015, doi:10.3150/14-BEJ603). Infinite where n is too small for any.

    Args:
        alpha: Tail probability in (0, 0.5).
        n: Differences, at least 2.

    Raises:
        UsageError: If ``alpha`` or ``n`` is out of range.
    """
    if not 0.0 < alpha < 0.5:
        raise UsageError(f"the value of `alpha` is {alpha!r}, but it must lie strictly between 0 and 0.5")
    if n < 2:
        raise UsageError(f"the value of `n` is {n!r}, but at least 2 differences have a standard error")
    x = -_NORMAL.inv_cdf(alpha / SIGNS)
    # The sum over the root of the sum of squares, in units of the centred standard error.
    return inf if n <= x * x else x * sqrt((n - 1.0) / (n - x * x))


def sign_tail(t: float, n: int) -> float:
    """Return a bound on P(mean / standard error of n differences with random signs >= ``t``): the inverse of :func:`upper_sign_quantile`."""
    if n < 2 or t <= 0.0:
        return 1.0
    x = sqrt(n) if t == inf else t * sqrt(n / (n - 1.0 + t * t))
    return min(1.0, SIGNS * 0.5 * erfc(x / sqrt(2.0)))


def upper_t_quantile(alpha: float, df: float) -> float:
    """Return t with P(T > t) = `alpha` for Student's T with `df` degrees of freedom.

    Args:
        alpha: Tail probability in (0, 0.5); it may be far smaller than 1 - alpha could hold.
        df: Degrees of freedom above 0 (need not be whole).

    Raises:
        UsageError: If `alpha` or `df` is out of range.
    """
    if not 0.0 < alpha < 0.5:
        raise UsageError(f"the value of `alpha` is {alpha!r}, but it must lie strictly between 0 and 0.5")
    if not df > 0.0:
        raise UsageError(f"the value of `df` is {df!r}, but degrees of freedom must be above 0")
    if df > _LARGE_DF:
        # Cornish-Fisher to the second order (Abramowitz and Stegun 26.7.5).
        z = -_NORMAL.inv_cdf(alpha)
        return z + (z**3 + z) / (4.0 * df) + (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / (96.0 * df * df)
    return _upper_quantile(alpha, df)


def _upper_quantile(alpha: float, df: float) -> float:
    """Solve t_tail(t) = alpha for 0 < alpha < 0.5: Newton's steps, halved whenever they leave the bracket."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > alpha:
        low, high = high, 2.0 * high
        if not isfinite(high):
            return inf
    log_density_at_0 = lgamma(0.5 * (df + 1.0)) - lgamma(0.5 * df) - 0.5 * log(df * pi)
    t = high
    for _ in range(200):
        error = t_tail(t, df) - alpha
        if error > 0.0:
            low = t
        else:
            high = t
        density = exp(log_density_at_0 - 0.5 * (df + 1.0) * log1p(t * t / df))
        following = t + error / density if density > 0.0 else low
        if not low < following < high:
            following = 0.5 * (low + high)
        if abs(following - t) <= 1e-14 * t:
            return following
        t = following
    return t


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """Regularised incomplete beta function I_x(a, b), with y = 1 - x given apart so that it keeps its digits."""
    if x <= 0.0:
        return 0.0
    if y <= 0.0:
        return 1.0
    log_x = log1p(-y) if y < 0.5 else log(x)
    log_y = log1p(-x) if x < 0.5 else log(y)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log_x + b * log_y)
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, y) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function by Lentz's method (DLMF 8.17.22)."""
    tiny = 1e-300
    c = 1.0
    d = 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0), tiny)
    total = d
    for m in range(1, 10_000):
        step = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        d = 1.0 / _away_from_zero(1.0 + step * d, tiny)
        c = _away_from_zero(1.0 + step / c, tiny)
        total *= d * c
        step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        d = 1.0 / _away_from_zero(1.0 + step * d, tiny)
        c = _away_from_zero(1.0 + step / c, tiny)
        change = d * c
        total *= change
        if abs(change - 1.0) < 1e-15:
            return total
    raise ArithmeticError(f"the continued fraction did not converge for a={a}, b={b}, x={x}")


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
