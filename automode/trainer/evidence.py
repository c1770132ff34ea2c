"""Held-out evidence: utilities of candidates on val-A, paired differences on val-B, slices of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from automode.planner.events import Group, Validated
from automode.planner.metrics import Metric
from automode.planner.paired import PairedSummary
from automode.planner.pricing import choosing_samples
from automode.trainer.evaluation import Evaluator, Floats, Part, PerSampleScores
from automode.trainer.states import States

EVERYTHING = None
"""Both halves."""

Ids = np.ndarray[Any, np.dtype[np.int64]]


class Evidence:
    """Scores networks on the two held-out halves.

    Args:
        evaluator: Scores a network on a half, sample by sample.
        states: Loads candidates.
        slices: Named subsets of the held-out samples, by id.
    """

    def __init__(self, evaluator: Evaluator, states: States, slices: Mapping[str, Ids]) -> None:
        self._evaluator = evaluator
        self._states = states
        self._slices = dict(slices)

    def settled(self) -> dict[str, Any]:
        """What scoring has settled so far, as plain data for :meth:`settle_as`."""
        return self._evaluator.state()

    def settle_as(self, state: Mapping[str, Any]) -> None:
        """Score on as another run did from here."""
        self._evaluator.load(state)

    def scores(self, model: nn.Module, part: Part | None) -> PerSampleScores:
        """Per-sample scores of a network on one half, or on both (:data:`EVERYTHING`), in a fixed order."""
        return self._evaluator.scores(model, part)

    def choose(
        self,
        model: nn.Module,
        candidates: Mapping[str, Mapping[str, Tensor]],
        metric: Metric = "utility",
    ) -> tuple[str, float, float]:
        """Return (name, mean of the metric on val-A, sample passes) of the best candidate; the earlier one wins a tie.

        Where val-A is large, the choice is made on some of it (:func:`automode.planner.pricing.choosing_samples`). ``model`` is loaded
        with each candidate in turn, and left with one of them.
        """
        n_a = self._evaluator.n_a
        part: Part = "A" if choosing_samples(len(candidates), n_a) == n_a else "few"
        best, value, passes = "raw", -np.inf, 0.0
        for name, state in candidates.items():
            passes += self._states.put(model, state, averaged=name != "raw")
            scores = self.scores(model, part)
            passes += scores.n
            mean = float(np.mean(scores.by(metric))) if scores.n else np.nan
            if mean > value:
                best, value = name, mean
        if part != "A":
            passes += self._states.put(model, candidates[best], averaged=best != "raw")
            value, spent = self.value(model, metric=metric)
            passes += spent
        return best, float(value), passes

    def value(
        self, model: nn.Module, part: Part | None = "A", *, metric: Metric = "utility"
    ) -> tuple[float, float]:
        """Return (mean of the metric on val-A or another part, sample passes)."""
        scores = self.scores(model, part)
        return float(np.mean(scores.by(metric))), float(scores.n)

    def paired(
        self, candidate: PerSampleScores, control: PerSampleScores, metric: Metric = "utility"
    ) -> tuple[Group, dict[str, Group]]:
        """Return paired differences, candidate minus control, over all samples and over each slice.

        A control that has no finite score on a sample counts there as the worst of all finite scores, where the candidate is
        finite everywhere: it fared worse than that. A candidate's own scores are left as they are, and NaN adopts nothing.
        """
        scored, against = candidate.by(metric), control.by(metric)
        if np.isfinite(scored).all():
            against = _at_worst(against, scored)
        difference = scored - against
        groups = {name: _group(difference[np.isin(candidate.ids, ids)]) for name, ids in self._slices.items()}
        return _group(difference), {name: group for name, group in groups.items() if group.n > 0}

    @staticmethod
    def otherwise(candidate: PerSampleScores, control: PerSampleScores, metric: Metric) -> Group | None:
        """Return paired differences by what must agree with a metric: being right, or the log score; None where there are no classes."""
        if candidate.correct is None or control.correct is None:
            return None
        if metric == "log_score":
            return _group(candidate.by("accuracy") - control.by("accuracy"))
        return _group(candidate.by("log_score") - control.by("log_score"))

    def validated(self, step: int, scores: PerSampleScores) -> Validated:
        """Put the trunk's scores on val-A into an event; each slice as the difference of its mean from the rest's."""
        slices: dict[str, Group] = {}
        for name, ids in self._slices.items():
            inside = np.isin(scores.ids, ids)
            if 1 < inside.sum() < scores.n - 1:
                slices[name] = _contrast(scores.utility[inside], scores.utility[~inside])
        return Validated(
            step=step,
            loss=float(np.mean(scores.loss)),
            value=float(np.mean(scores.utility)),
            n=scores.n,
            slices=slices,
        )


def metrics_of(scores: PerSampleScores) -> dict[str, float]:
    """Mean utility and loss; for classes also accuracy and negative log likelihood, for values the squared error."""
    found = {"utility": float(np.mean(scores.utility)), "loss": float(np.mean(scores.loss))}
    if scores.correct is not None:
        found["accuracy"] = float(np.mean(scores.correct))
    if scores.p_true is not None:
        found["nll"] = -float(np.mean(scores.by("nll")))
    if scores.squared is not None:
        found["mse"] = float(np.mean(scores.squared))
    return found


def _at_worst(control: Floats, candidate: Floats) -> Floats:
    finite = np.isfinite(control)
    if finite.all() or candidate.size == 0:
        return control
    worst = min(float(candidate.min()), float(control[finite].min(initial=np.inf)))
    return np.where(finite, control, worst)


def _group(difference: Floats) -> Group:
    summary = PairedSummary.of(difference)
    return Group(n=summary.n, mean=summary.mean, variance=summary.variance, effective_n=summary.effective_n)


def _contrast(inside: Floats, rest: Floats) -> Group:
    """Two independent means as one group: the variance is such that variance / n is the difference's (Welch)."""
    n = inside.size
    variance = float(inside.var(ddof=1)) + float(rest.var(ddof=1)) * n / rest.size
    return Group(n=n, mean=float(inside.mean() - rest.mean()), variance=variance)
