"""The user's validation and test: the whole set, without a trace in the run, with the slices that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from automode.trainer.evaluation import PerSampleScores

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationResult:
    """One look at a held-out set.

    Attributes:
        loss: Mean loss over samples.
        metric: Accuracy where there are classes, else mean utility; higher is better.
        metrics: Every metric by name.
        slices: The metric of each slice, by name.
        scores: Scores of every sample.
        members: Sample ids of each slice.
    """

    loss: float
    metric: float
    metrics: Mapping[str, float]
    slices: dict[str, float]
    scores: PerSampleScores
    members: Mapping[str, Ids]


class Validation:
    """Evaluates the trunk on one held-out set.

    Args:
        scores: Scores every sample of the set with the model as it is, leaving random states and ``training`` flags
            as they were.
        slices: Sample ids of named subsets.
    """

    def __init__(self, scores: Callable[[], PerSampleScores], slices: Mapping[str, Ids]) -> None:
        self._scores = scores
        self._slices = dict(slices)

    def run(self) -> ValidationResult:
        """Look once."""
        scores = self._scores()
        metrics = _metrics(scores)
        name = "accuracy" if "accuracy" in metrics else "utility"
        per_sample = scores.utility if scores.correct is None else scores.correct
        return ValidationResult(
            loss=metrics["loss"],
            metric=metrics[name],
            metrics=metrics,
            slices={
                slice_: _mean(per_sample[np.isin(scores.ids, ids)]) for slice_, ids in self._slices.items()
            },
            scores=scores,
            members=self._slices,
        )


def _metrics(scores: PerSampleScores) -> dict[str, float]:
    found = {"loss": _mean(scores.loss), "utility": _mean(scores.utility)}
    if scores.correct is not None:
        found["accuracy"] = _mean(scores.correct)
    return found


def _mean(values: npt.NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
