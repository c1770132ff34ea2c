"""The evidence test: is the candidate better than its control on held-out samples, and is no slice worse for it?

Everything is judged on paired differences, candidate minus control utility of the same sample, so z > 0 means better.
The verdict is a function of sums (n, mean, variance of the whole and of each slice), which the log holds: whoever reads it
comes to the same verdict.

Two corrections keep the false acceptance rate at alpha. Bonferroni over the candidates that one look may choose from; and
the degrees of freedom: where few samples differ at all (two nearly equal models), a mean of a thousand differences
rests on a handful of them. The t quantile is then taken at the effective number (sum d^2)^2 / sum d^4, which is the number
of differing samples when these differ equally, instead of at n. Where a few outweigh many that agree, that asks for more than chance can
explain: then what random signs of these very sizes could reach is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, nan, pi
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from automode.errors import UsageError
from automode.planner.paired import PairedSummary
from automode.planner.student_t import sign_tail, t_tail, upper_sign_quantile, upper_t_quantile

__all__ = [
    "AlphaSpending",
    "Evidence",
    "Guard",
    "PairedSummary",
    "SliceEvidence",
    "Verdict",
    "judge",
    "judge_moments",
    "judge_summary",
    "utility_classification",
]

Verdict: TypeAlias = Literal["accepted", "rejected", "inconclusive"]

REJECT_Z = 1.64
ROUNDING = 1e-9
CORRECT_WEIGHT = 0.8


def utility_classification(correct: ArrayLike, p_true: ArrayLike) -> NDArray[np.float64]:
    """Return 0.8 * correct + 0.2 * p(y) for each sample: a bounded utility that a few wrong labels cannot dominate.

    Args:
        correct: Whether the prediction equals the label, shape (n,), 0 or 1.
        p_true: Probability that the model gives to the label, shape (n,), in [0, 1]; NaN stays NaN.

    Raises:
        UsageError: If the shapes differ or a value lies outside its range.
    """
    hit = np.asarray(correct, dtype=np.float64)
    p = np.asarray(p_true, dtype=np.float64)
    if hit.ndim != 1 or hit.shape != p.shape:
        raise UsageError(
            f"`correct` has shape {hit.shape} and `p_true` {p.shape}; both must be (n,) with the same n"
        )
    if not np.isin(hit, (0.0, 1.0)).all():
        raise UsageError("`correct` must hold only 0 and 1, one for each sample")
    # Softmax sums of single precision exceed 1 by rounding.
    if np.any((p < -1e-6) | (p > 1.0 + 1e-6)):
        raise UsageError("`p_true` must lie in [0, 1]: it is a probability, not a log-probability or a loss")
    return CORRECT_WEIGHT * hit + (1.0 - CORRECT_WEIGHT) * np.clip(p, 0.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceEvidence:
    """How one slice fares under the candidate: z < 0 means worse; NaN where it cannot be judged."""

    z: float
    mean: float
    n: int
    worse: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A second metric, which forbids what the first one would accept.

    Attributes:
        differences: Candidate minus control by it.
        name: Of the metric, for the card.
        least_z: Smallest z that passes.
        least_mean: Smallest mean difference that passes.
    """

    differences: PairedSummary
    name: str
    least_z: float = -REJECT_Z
    least_mean: float = -inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A verdict and everything it rests on.

    Attributes:
        verdict: ``accepted`` (z >= threshold and no slice worse), ``rejected`` (z <= -1.64), else ``inconclusive``.
        n: Paired samples.
        mean: Mean difference, candidate minus control.
        se: Its standard error.
        z: (mean + delta) / se; NaN for evidence that cannot be judged.
        lower, upper: Bounds of the mean, each one-sided at alpha / candidates.
        p_value: One-sided probability of such a z or a larger one if the candidate is no better.
        alpha: False acceptance rate of this look, before Bonferroni.
        threshold: Smallest z that is accepted.
        slices: By name.
        guard: The second metric, where there is one.
        why: One sentence for the card.
    """

    verdict: Verdict
    n: int
    mean: float
    se: float
    z: float
    lower: float
    upper: float
    p_value: float
    alpha: float
    threshold: float
    slices: Mapping[str, SliceEvidence] = field(default_factory=dict)
    guard: SliceEvidence | None = None
    why: str

    @property
    def accepted(self) -> bool:
        """Whether the candidate may be adopted."""
        return self.verdict == "accepted"


def judge(
    differences: ArrayLike,
    *,
    alpha: float,
    slices: Mapping[str, ArrayLike] | None = None,
    n_candidates: int = 1,
    slice_z: float = 1.64,
    delta: float = 0.0,
    least_z: float = 0.0,
) -> Evidence:
    """Judge per-sample differences, candidate minus control utility.

    Args:
        differences: Shape (n,).
        alpha: False acceptance rate of this look, in (0, 0.5).
        slices: By name, the slice's indices into `differences` or a boolean mask over them.
        n_candidates: Candidates of which this one was chosen by looking at the same samples (Bonferroni).
        slice_z: A slice with z below minus this is significantly worse, and nothing is accepted.
        delta: Tolerated loss of utility: the null hypothesis is mean <= -delta. Negative: a gain that is demanded.
        least_z: Lower limit of the acceptance threshold.

    Raises:
        UsageError: If a parameter is out of range, or a slice points outside of the samples.
    """
    d = np.asarray(differences, dtype=np.float64)
    whole = PairedSummary.of(d)
    parts = {
        name: PairedSummary.of(d[_indices(name, which, d.size)]) for name, which in (slices or {}).items()
    }
    return judge_summary(
        whole,
        alpha=alpha,
        slices=parts,
        n_candidates=n_candidates,
        slice_z=slice_z,
        delta=delta,
        least_z=least_z,
    )


def judge_moments(
    mean: float,
    variance: float,
    n: int,
    *,
    alpha: float,
    slices: Mapping[str, PairedSummary] | None = None,
    n_candidates: int = 1,
    slice_z: float = 1.64,
    delta: float = 0.0,
    least_z: float = 0.0,
) -> Evidence:
    """Judge from the sample variance, mean and number of the differences; see `judge`."""
    return judge_summary(
        PairedSummary(n=n, mean=mean, variance=variance),
        alpha=alpha,
        slices=slices,
        n_candidates=n_candidates,
        slice_z=slice_z,
        delta=delta,
        least_z=least_z,
    )


def judge_summary(
    whole: PairedSummary,
    *,
    alpha: float,
    slices: Mapping[str, PairedSummary] | None = None,
    guard: Guard | None = None,
    n_candidates: int = 1,
    slice_z: float = 1.64,
    delta: float = 0.0,
    least_z: float = 0.0,
) -> Evidence:
    """Judge from summaries, as the log holds them; see `judge` for the arguments.

    ``guard``: another metric, and what it must show at the least; it turns an acceptance into inconclusive and nothing else.
    """
    if n_candidates < 1:
        raise UsageError(
            f"the value of `n_candidates` is {n_candidates}, but at least one candidate is judged"
        )
    if not (isfinite(slice_z) and slice_z >= 0.0 and isfinite(least_z) and isfinite(delta)):
        raise UsageError(
            f"slice_z={slice_z}, least_z={least_z}, delta={delta}: all must be finite, and slice_z not negative"
        )
    quantile = _needed(whole, alpha / n_candidates)
    threshold = max(quantile, least_z)
    parts = {name: _judge_slice(part, slice_z) for name, part in (slices or {}).items()}
    z = whole.z(delta)
    se = whole.standard_error
    if whole.sound:
        lower, upper = whole.mean - quantile * se, whole.mean + quantile * se
        p_value = min(t_tail(z, whole.degrees_of_freedom), sign_tail(z, whole.n))
    else:
        lower, upper, p_value = -inf, inf, nan
    held = None if guard is None else _guarded(guard)
    verdict, why = _decide(whole, z, threshold, parts)
    if verdict == "accepted" and guard is not None and held is not None and held.worse:
        verdict, why = (
            "inconclusive",
            f"{why}; but {_held_against(guard, held)}; the control is kept",
        )
    return Evidence(
        verdict=verdict,
        n=whole.n,
        mean=whole.mean,
        se=se,
        z=z,
        lower=lower,
        upper=upper,
        p_value=p_value,
        alpha=alpha,
        threshold=threshold,
        slices=parts,
        guard=held,
        why=why,
    )


def _needed(whole: PairedSummary, alpha: float) -> float:
    """The z that chance exceeds with probability alpha: Student's, or that of random signs where a few differences outweigh the rest."""
    student = upper_t_quantile(alpha, whole.degrees_of_freedom)
    return student if whole.n < 2 else min(student, upper_sign_quantile(alpha, whole.n))


def _guarded(guard: Guard) -> SliceEvidence:
    found = _judge_slice(guard.differences, -guard.least_z)
    return SliceEvidence(
        z=found.z, mean=found.mean, n=found.n, worse=found.worse or found.mean < guard.least_mean - ROUNDING
    )


def _held_against(guard: Guard, held: SliceEvidence) -> str:
    least = "" if guard.least_mean == -inf else f" and {guard.least_mean:+.4f}"
    return f"the {guard.name} shows {held.mean:+.4f} on {held.n} (z {held.z:+.2f}), where {guard.least_z:+.2f}{least} is the least"


def _judge_slice(part: PairedSummary, slice_z: float) -> SliceEvidence:
    z = part.z()
    if part.n == 0 or part.sound:
        worse = z < -slice_z
    elif part.n == 1:
        # One sample proves nothing, unless it could not be computed at all.
        worse = not isfinite(part.mean)
    else:
        # Not computable, or every sample of the slice changed by the same amount: worse unless that is no loss.
        worse = not part.mean >= 0.0
    return SliceEvidence(z=z, mean=part.mean, n=part.n, worse=worse)


def _decide(
    whole: PairedSummary, z: float, threshold: float, slices: Mapping[str, SliceEvidence]
) -> tuple[Verdict, str]:
    if whole.n == 0:
        return "inconclusive", "no held-out samples to judge by; the control is kept"
    if not (isfinite(whole.mean) and isfinite(whole.variance)):
        return "inconclusive", f"the differences of {whole.n} samples are not all finite; the control is kept"
    if not whole.sound:
        return "inconclusive", (
            f"all {whole.n} differences are equal ({whole.mean:.4g}): that is no evidence; the control is kept"
        )
    figures = f"mean difference {whole.mean:+.4g} on {whole.n} held-out samples, z {z:+.2f}"
    if z <= -REJECT_Z:
        return "rejected", f"worse than the control: {figures} (<= -{REJECT_Z}); the control is kept"
    if z < threshold:
        return (
            "inconclusive",
            f"not shown to be better: {figures}, {threshold:.2f} needed; the control is kept",
        )
    worse = sorted(name for name, part in slices.items() if part.worse)
    if worse:
        told = ", ".join(f"{name} (z {slices[name].z:+.2f}, n {slices[name].n})" for name in worse)
        return "inconclusive", f"better on the whole ({figures}) but worse on {told}; the control is kept"
    held = f"; none of {len(slices)} slices is worse" if slices else ""
    return "accepted", f"better than the control: {figures}, {threshold:.2f} needed{held}"


def _indices(name: str, which: ArrayLike, n: int) -> NDArray[Any]:
    chosen = np.asarray(which)
    if chosen.dtype == np.bool_:
        if chosen.shape != (n,):
            raise UsageError(
                f"the mask of slice {name!r} has shape {chosen.shape}, but there are {n} samples"
            )
        return chosen
    if chosen.size == 0:
        return np.empty(0, dtype=np.intp)
    if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
        raise UsageError(
            f"slice {name!r} must be a boolean mask or a list of indices, not {chosen.dtype} {chosen.shape}"
        )
    if chosen.min() < 0 or chosen.max() >= n:
        raise UsageError(
            f"slice {name!r} points outside of the {n} samples (indices {chosen.min()} to {chosen.max()})"
        )
    if np.unique(chosen).size != chosen.size:
        raise UsageError(f"slice {name!r} names a sample twice, which would count its evidence twice")
    return chosen


class AlphaSpending:
    """Spend a session's false acceptance rate over its looks at held-out data: alpha_i = total * 6 / (pi^2 i^2).

    The sum over infinitely many looks is `total`, so that however many cards a session judges, the probability that it accepts
    any that is no better stays below it (union bound; no independence is needed).

    Args:
        total: The session's false acceptance rate, in (0, 0.5).

    Attributes:
        looks: Looks taken so far.
    """

    __slots__ = ("looks", "total")

    def __init__(self, total: float = 0.05) -> None:
        if not 0.0 < total < 0.5:
            raise UsageError(f"the value of `total` is {total}, but it must lie strictly between 0 and 0.5")
        self.total = total
        self.looks = 0

    def alpha(self, look: int) -> float:
        """Return what the `look`-th look may spend, counted from 1."""
        if look < 1:
            raise UsageError(f"looks are counted from 1, but {look} came")
        return self.total * 6.0 / (pi * pi * look * look)

    @property
    def spent(self) -> float:
        """What the looks so far have spent together."""
        return sum(self.alpha(look) for look in range(1, self.looks + 1))

    def spend(self) -> float:
        """Take the next look and return its alpha."""
        self.looks += 1
        return self.alpha(self.looks)

    def state(self) -> dict[str, Any]:
        """Return what `from_state` needs: a JSON object."""
        return {"total": self.total, "looks": self.looks}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> AlphaSpending:
        """Rebuild from what `state` returned."""
        spending = cls(state["total"])
        spending.looks = state["looks"]
        return spending
