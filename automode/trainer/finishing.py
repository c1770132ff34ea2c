"""The end of a run: which of the states that it went through it is to end with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor, nn

from automode.errors import SessionError
from automode.planner.cards import PlanCard
from automode.planner.events import Merge, Merged, Weights
from automode.planner.metrics import GIVEN_UP, Metric, finishing_metric, too_dear
from automode.trainer.evaluation import Part, PerSampleScores
from automode.trainer.evidence import EVERYTHING, Evidence
from automode.trainer.states import States

Candidates = dict[str, tuple[Weights, Mapping[str, Tensor]]]

EARLIER = "best:"
"""What the names of the best validated state's weights and averages begin with."""


class Finisher:
    """Chooses among the trunk's last weights, its averages, and the best state that it was in.

    Args:
        evidence: Held-out scores.
        states: Loads candidates.
        clean_below: ``policy.averages.clean_below``: share of wrong labels up to which classes are compared by the log score.
    """

    def __init__(self, evidence: Evidence, states: States, clean_below: float) -> None:
        self._evidence = evidence
        self._states = states
        self._clean_below = clean_below

    def merge_trunk(
        self,
        card: PlanCard,
        digest: str,
        candidates: Mapping[str, Mapping[str, Tensor]],
        step: int,
        best: str | None = None,
        best_step: int | None = None,
    ) -> Merged:
        """Choose among the trunk's raw weights, its averages and its best validated state on val-A; the raw weights are the control.

        By the metric that the card names, and without a second one that must agree; where it names none, by what the labels allow.

        Args:
            card: The finishing merge.
            digest: The trunk's own last state, durable.
            candidates: Its raw weights and averages.
            step: The trunk's.
            best: The best validated state, durable; None where there is none but the last.
            best_step: Its step.
        """
        states, why = self._gathered(digest, candidates, () if best is None else (best,))
        scores, passes = self._scored(states, "A")
        asked = card.acceptance.metric
        at_most = scores["raw"].noise_at_most if asked == "utility" else None
        metric = finishing_metric(at_most, self._clean_below) if asked == "utility" else asked
        values = {name: _mean(found, metric) for name, found in as_often_right(scores, metric).items()}
        values = worth_choosing(values, scores, metric)
        chosen = scores[_best_of(values)]
        return self._merged(card, "swa", states, values, why=why, step=step, passes=passes).model_copy(
            update={
                "metric": metric,
                "guard": None
                if asked != "utility"
                else self._evidence.otherwise(chosen, scores["raw"], metric),
                "noise_at_most": at_most,
                "best": best,
                "best_step": None if best is None else best_step,
            }
        )

    def keep_best(
        self,
        card: PlanCard,
        command: Merge,
        digest: str,
        candidates: Mapping[str, Mapping[str, Tensor]],
        step: int,
    ) -> Merged:
        """Choose among the trunk's last states and its best validated one, on all held-out data; the last raw weights are the control.

        Args:
            card: The card that ended the run.
            command: Names the best validated state, if one is stored.
            digest: The trunk's own last state, durable.
            candidates: Its raw weights and averages.
            step: The trunk's.
        """
        earlier = [member.checkpoint for member in command.members]
        states, why = self._gathered(digest, candidates, earlier)
        scores, passes = self._scored(states, EVERYTHING)
        return self._merged(
            card,
            command.method,
            states,
            {name: _mean(found, card.acceptance.metric) for name, found in scores.items()},
            why=why if earlier else "no validated state of before is stored",
            step=step,
            passes=passes,
        ).model_copy(update={"metric": card.acceptance.metric})

    def _gathered(
        self, digest: str, candidates: Mapping[str, Mapping[str, Tensor]], earlier: Iterable[str]
    ) -> tuple[Candidates, str]:
        """The last states, the raw one first, and those of earlier checkpoints; and what could not be read."""
        states: Candidates = {
            name: (Weights(checkpoint=digest, choice=name), state) for name, state in candidates.items()
        }
        why = ""
        for checkpoint in earlier:
            try:
                found = self._states.candidates(checkpoint)
            except SessionError as error:
                why = f"the best validated state could not be read, and the last ones alone were compared: {error}"
                continue
            states |= {
                f"{EARLIER}{name}": (Weights(checkpoint=checkpoint, choice=name), state)
                for name, state in found.items()
            }
        return states, why

    def _scored(self, states: Candidates, part: Part | None) -> tuple[dict[str, PerSampleScores], float]:
        model: nn.Module = self._states.shell()
        scores: dict[str, PerSampleScores] = {}
        passes = 0.0
        for name, (reference, state) in states.items():
            passes += self._states.put(model, state, averaged=reference.choice != "raw")
            scores[name] = self._evidence.scores(model, part)
            passes += scores[name].n
        return scores, passes

    @staticmethod
    def _merged(
        card: PlanCard,
        method: str,
        states: Candidates,
        values: Mapping[str, float],
        *,
        why: str,
        step: int,
        passes: float,
    ) -> Merged:
        best = _best_of(values)
        control = states["raw"][0]
        return Merged(
            card=card.id,
            method=method,
            members=tuple(states),
            weights=states[best][0],
            value=values[best],
            control=control,
            control_value=values["raw"],
            why=why,
            step=step,
            passes=passes,
        )


def as_often_right(scores: Mapping[str, PerSampleScores], metric: Metric) -> dict[str, PerSampleScores]:
    """Leave out what the log score would choose in vain: whoever is right less often, by more than chance explains, will not be adopted.

    Val-A is half of what the verdict goes by, so that twice as much is let pass.
    """
    if metric != "log_score":
        return dict(scores)
    least = _accuracy(scores["raw"]) - 2.0 * GIVEN_UP - 1e-9
    return {name: found for name, found in scores.items() if _accuracy(found) >= least}


def _accuracy(scores: PerSampleScores) -> float:
    return float(np.mean(scores.by("accuracy")))  # a log score is of classes


def _best_of(values: Mapping[str, float]) -> str:
    return max(values, key=lambda name: values[name])  # of equals, the first: the last raw weights


def worth_choosing(
    values: Mapping[str, float], scores: Mapping[str, PerSampleScores], metric: Metric
) -> dict[str, float]:
    """Leave out earlier states that buy a little of the log score with utility (:func:`~automode.planner.metrics.too_dear`).

    Args:
        values: Mean by the metric of each candidate, by name; those of earlier states begin with :data:`EARLIER`.
        scores: Of each candidate on val-A.
        metric: What is compared by; nothing is left out where that is the utility.
    """
    if metric != "log_score":
        return dict(values)
    last = _best_of({name: value for name, value in values.items() if not name.startswith(EARLIER)})
    utility = {name: _mean(found, "utility") for name, found in scores.items()}
    return {
        name: value
        for name, value in values.items()
        if not name.startswith(EARLIER)
        or not too_dear(
            log_score=value, utility=utility[name], last_log_score=values[last], last_utility=utility[last]
        )
    }


def _mean(scores: PerSampleScores, metric: Metric) -> float:
    value = float(np.mean(scores.by(metric)))
    return value if np.isfinite(value) else float("-inf")
