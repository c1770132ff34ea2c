"""The best validated state of a run, kept in host memory for its end: one copy of the weights and one of their averages."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import isfinite
from typing import Any, Final

import numpy as np
from torch import Tensor

from automode.merges.batches import map_tensors
from automode.planner.policy import Policy
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.stored_states import Checkpoints
from automode.trainer.trunk import Trunk

WINDOW: Final = 3
"""Validations that are averaged."""


def keeps_best(policy: Policy) -> bool:
    """Whether a run under this policy, if it keeps averages, keeps its best state for the finish."""
    return policy.averages.best_state and "merge_cadence" in policy.reasons


class BestState:
    """Keeps the trunk as it was at the validation that was best on val-A, with its averages of then.

    Classes are judged by the log score, which tells two states of one run apart where accuracy does not; all else by the utility.
    What counts is the mean over the latest three validations: of many states the one with the best single score is often only the
    luckiest. Where the trunk is replaced, the mean begins anew.
    What was kept before an adoption or a rewind stays: the trunk was in that state, val-A shows nothing better since, and only the one
    look at val-B brings it back. What was kept between an adoption and its rollback is dropped: somebody has left that trunk.
    Nothing of the trunk is written and no random number drawn.

    Args:
        trunk: The run.
        enabled: Whether anything is kept.

    Attributes:
        step: Applied optimizer steps at that state; None while none is kept.
    """

    def __init__(self, trunk: Trunk, *, enabled: bool) -> None:
        self._trunk = trunk
        self._enabled = enabled
        self._value: float | None = None
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._weights: dict[str, Tensor] = {}
        self._averages: dict[str, Any] | None = None
        self.step: int | None = None

    def note(self, step: int, scores: PerSampleScores) -> None:
        """Keep the trunk as it is, where these scores of it on val-A are the best so far."""
        if not self._enabled or self._trunk.averages is None:
            return
        value = float(np.mean(scores.by("utility" if scores.p_true is None else "log_score")))
        if not (isfinite(value) and np.isfinite(scores.loss).all()):
            self._recent.clear()
            return
        self._recent.append(value)
        smooth = sum(self._recent) / len(self._recent)
        if self._value is not None and smooth <= self._value:
            return
        averages = self._trunk.averages
        self.step, self._value = step, smooth
        self._weights = _copied(self._trunk.model.state_dict())
        self._averages = _copied(averages.state_dict()) if averages.updates else None

    def replaced(self) -> None:
        """Begin the mean anew: the trunk was replaced, and scores of two trunks are no mean of either."""
        self._recent.clear()

    def rolled_back(self, step: int | None) -> None:
        """Begin the mean anew, and keep nothing but what was kept at the adoption, of this step (None: nothing was)."""
        if self.step != step:
            self.clear()
        self.replaced()

    def clear(self) -> None:
        """Keep nothing; its memory is free."""
        self.step, self._value = None, None
        self._weights, self._averages = {}, None

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, and the rest of a checkpoint that they can be judged from."""
        rest: dict[str, Any] = {"step": self.step}
        return self._weights, rest if self._averages is None else rest | {"averages": self._averages}

    def store(self, checkpoints: Checkpoints, *, before: int) -> str | None:
        """Make the state durable; returns its digest, or None where there is none of before this step."""
        if self.step is None or self.step >= before:
            return None
        return checkpoints.save(*self.stored(), {"kind": "best", "step": self.step})

    def state(self) -> dict[str, Any]:
        """What is kept, for :meth:`load`: plain data and tensors."""
        return {
            "step": self.step,
            "value": self._value,
            "recent": list(self._recent),
            "weights": self._weights,
            "averages": self._averages,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Keep what :meth:`state` gave."""
        self.step, self._value = state["step"], state["value"]
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._weights, self._averages = dict(state["weights"]), state["averages"]


def _copied(value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), value)
