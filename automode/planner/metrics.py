"""What the states of one run are compared by at its end: the task's own utility, or a clipped log score where labels are shown to be clean.

The utility of a class, 0.8 accuracy + 0.2 p(y), is what a few wrong labels cannot dominate, and it pays for that: of two hundred
samples a handful differ in accuracy at all, and how sure a wrong answer was is not seen. A log score sees both, and is dominated
by the labels that contradict sure answers: by wrong labels, where there are any. So these are counted first. A label
that is wrong whatever the network thinks contradicts its surest answers as often as its others, while its own mistakes
are among the others. The share contradicted among the surest half of held-out answers is therefore at least the share of wrong labels
(but for those that the network was taught), and its upper confidence limit is what the labels' noise is at the most.
"""

from __future__ import annotations

from math import exp, lgamma, log, log1p
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from automode.errors import UsageError

Metric: TypeAlias = Literal["utility", "accuracy", "nll", "huber", "mse", "log_score"]
"""What a card may ask to be compared by, and what the finish may choose."""

NAMES: Final[dict[str, str]] = {
    "utility": "utility",
    "log_score": "log score",
    "accuracy": "accuracy",
    "nll": "log likelihood",
    "huber": "minus Huber loss",
    "mse": "minus squared error",
}
"""What each metric's values are, higher being better."""

TASKS: Final[dict[str, str]] = {
    "accuracy": "classification",
    "nll": "classification",
    "log_score": "classification",
    "huber": "regression",
    "mse": "regression",
}
"""The task that a metric is of; the utility is of any."""

LEAST_LIKELIHOOD: Final = 1e-12
"""Probability below which a log likelihood falls no further, so that one sample cannot make it infinite."""

FLOOR: Final = 0.001
"""Probability below which a log score falls no further."""

GIVEN_UP: Final = 0.005
"""Accuracy that a better log score may cost: half a point."""

LEAST_GAIN: Final = 0.15
"""Share of the log score's shortfall that an earlier state must take to be chosen over a last one of higher utility."""

CONFIDENCE: Final = 0.95
"""Of the upper limit on the share of wrong labels."""


def utility_log_score(p_true: ArrayLike) -> NDArray[np.float64]:
    """Return 1 - log(p(y)) / log(0.001) for each sample, p(y) not below 0.001: from 0 to 1, higher is better.

    Args:
        p_true: Probability that the model gives to the label, shape (n,), in [0, 1]; NaN counts as 0.

    Raises:
        UsageError: If a value lies outside its range.
    """
    p = np.nan_to_num(np.asarray(p_true, dtype=np.float64), nan=0.0)
    # Softmax sums of single precision exceed 1 by rounding.
    if np.any((p < -1e-6) | (p > 1.0 + 1e-6)):
        raise UsageError("`p_true` must lie in [0, 1]: it is a probability, not a log-probability or a loss")
    return np.asarray(1.0 - np.log(np.clip(p, FLOOR, 1.0)) / log(FLOOR), dtype=np.float64)


def log_likelihood(p_true: ArrayLike) -> NDArray[np.float64]:
    """Return log p(y) of each sample, p(y) not below 1e-12; NaN stays NaN.

    Args:
        p_true: Probability that the model gives to the label, shape (n,).
    """
    return np.asarray(
        np.log(np.clip(np.asarray(p_true, dtype=np.float64), LEAST_LIKELIHOOD, 1.0)), dtype=np.float64
    )


def noise_at_most(correct: ArrayLike, p_top: ArrayLike) -> float:
    """Bound the share of wrong labels from above, at 95 %, by the answers that a network is surest of.

    Exact for one network that never saw these labels (Clopper and Pearson 1934, one-sided), where a label is wrong independently of how
    sure the network is. Labels that are wrong only where it is unsure anyway do not count; they contradict nothing that is sure.

    Args:
        correct: Whether each answer equals its label, shape (n,).
        p_top: Probability of the most probable class, shape (n,).

    Returns:
        In (0, 1]; 1 where there are fewer than two samples, or a probability is not finite.
    """
    right, sure = np.asarray(correct, dtype=np.float64), np.asarray(p_top, dtype=np.float64)
    half = right.size // 2
    if half < 1 or not np.isfinite(sure).all():
        return 1.0
    surest = np.argsort(-sure, kind="stable")[:half]
    return upper_limit(int(half - right[surest].sum()), half, CONFIDENCE)


def upper_limit(found: int, n: int, confidence: float) -> float:
    """Upper confidence limit of a share, one-sided and exact: ``found`` of ``n``.

    Raises:
        UsageError: If the counts or the confidence are out of range.
    """
    if not (0 <= found <= n and n >= 1 and 0.0 < confidence < 1.0):
        raise UsageError(
            f"found={found}, n={n}, confidence={confidence}: a share of at least one, and a confidence in (0, 1)"
        )
    if found == n:
        return 1.0
    low, high = found / n, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _at_most(found, n, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def finishing_metric(at_most: float | None, clean_below: float) -> Metric:
    """Choose what the end of a run is judged by: the log score where labels are shown to be clean, else the utility.

    Args:
        at_most: What :func:`noise_at_most` gave; None where there are no classes.
        clean_below: ``policy.averages.clean_below``.
    """
    return "log_score" if at_most is not None and at_most <= clean_below else "utility"


def other_of(metric: Metric) -> str:
    """Name the metric that must agree where states of one run are compared by this one."""
    return "log score" if metric == "utility" else "accuracy"


def too_dear(*, log_score: float, utility: float, last_log_score: float, last_utility: float) -> bool:
    """Say whether an earlier state of a run buys too little of the log score with utility, against the best of its last states.

    A network grows too sure of itself long before it is wrong more often, so that an earlier state is often the better by the log score
    and the worse by accuracy. Where it is behind by utility, it has to take :data:`LEAST_GAIN` of what the last state falls short of 1.

    Args:
        log_score: Mean log score of the earlier state, 0 to 1.
        utility: Its mean utility.
        last_log_score: Mean log score of the best last state.
        last_utility: Its mean utility.
    """
    if not utility < last_utility:
        return False
    return not 1.0 - log_score <= (1.0 - LEAST_GAIN) * (1.0 - last_log_score)


def _at_most(found: int, n: int, share: float) -> float:
    """Probability of ``found`` or fewer of ``n``."""
    if share <= 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    return sum(
        exp(lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * log(share) + (n - k) * log1p(-share))
        for k in range(found + 1)
    )
