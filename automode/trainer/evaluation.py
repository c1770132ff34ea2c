"""Scoring a network on held-out samples, one by one, without leaving a trace in it or in the random state.

Utility is what acceptance compares, higher is better: 0.8 accuracy + 0.2 p(y) for classes, which stays
bounded where labels may be wrong; minus Huber loss for values; minus the loss itself for sequences and all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from automode.errors import DataError, UsageError
from automode.merges.batches import training_flags_kept
from automode.planner.acceptance import utility_classification
from automode.planner.metrics import NAMES, Metric, log_likelihood, noise_at_most, utility_log_score
from automode.trainer.per_sample import PerSampleLoss
from automode.trainer.random_state import forked_rng
from automode.trainer.tasks import Task
from automode.trainer.trunk import StepFn

Part = Literal["A", "B", "few"]
"""val-A, val-B, or some samples of val-A, to choose among states of one trajectory on."""

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
See = Callable[[Any, Any], None]
HUBER_SIGMAS = 1.0

_Scored = tuple[Floats, Floats, Floats | None, Floats | None, Floats | None, Floats | None, Floats | None]
"""Loss, utility, whether right, p(y), p of the most probable class, squared error, weight of the class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerSampleScores:
    """Scores of held-out samples, in the order in which they were read.

    Attributes:
        ids: Sample ids [n].
        loss: Loss of each sample [n]; the batch's mean where per-sample losses are not exact.
        utility: Utility of each sample [n], higher is better.
        correct: 1 where the class is right [n]; None where there are no classes.
        p_true: Probability of the true class [n]; None likewise.
        p_top: Probability of the most probable class [n]; None likewise.
        squared: Squared error [n], the mean over a sample's values; None where there are no values.
        weight: How much the training loss weighs each sample's class [n]; None: all alike.
    """

    ids: Ids
    loss: Floats
    utility: Floats
    correct: Floats | None = None
    p_true: Floats | None = None
    p_top: Floats | None = None
    squared: Floats | None = None
    weight: Floats | None = None

    @property
    def n(self) -> int:
        """How many samples."""
        return int(self.ids.size)

    def where(self, mask: npt.NDArray[np.bool_]) -> PerSampleScores:
        """The scores of some samples."""
        return PerSampleScores(
            ids=self.ids[mask],
            loss=self.loss[mask],
            utility=self.utility[mask],
            correct=None if self.correct is None else self.correct[mask],
            p_true=None if self.p_true is None else self.p_true[mask],
            p_top=None if self.p_top is None else self.p_top[mask],
            squared=None if self.squared is None else self.squared[mask],
            weight=None if self.weight is None else self.weight[mask],
        )

    def by(self, metric: Metric) -> Floats:
        """What this metric makes of each sample [n], higher is better; samples of a class count as the training loss weighs it.

        Raises:
            UsageError: The metric is of classes or of values, and these samples have none.
        """
        values = self._alike(metric)
        if self.weight is None or not self.weight.sum() > 0.0:
            return values
        return np.asarray(values * (self.weight / self.weight.mean()), dtype=np.float64)

    def _alike(self, metric: Metric) -> Floats:
        match metric:
            case "utility":
                return self.utility
            case "accuracy" if self.correct is not None:
                return self.correct
            case "nll" if self.p_true is not None:
                return log_likelihood(self.p_true)
            case "log_score" if self.p_true is not None:
                return utility_log_score(np.clip(self.p_true, 0.0, 1.0))
            case "huber" if self.squared is not None:  # as the utility of values is
                return self.utility
            case "mse" if self.squared is not None:
                return -self.squared
            case _:
                of = "values" if metric in ("huber", "mse") else "classes"
                raise UsageError(f"the {NAMES[metric]} is of {of}, and these samples have none")

    @property
    def noise_at_most(self) -> float | None:
        """Upper limit on the share of wrong labels; None where there are no classes."""
        if self.correct is None or self.p_top is None:
            return None
        return noise_at_most(self.correct, self.p_top)


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Scores networks on fixed held-out batches.

    Attributes:
        step_fn: Model and batch to (loss, outputs, targets).
        batches: A fresh pass over a part's batches on the device, each with its sample ids.
        per_sample: The loss's per-sample twin.
        autocast: Makes the context that forward passes run in.
        n_a: Samples of val-A; 0 where choices are made on all of it.
        delta: Where the Huber loss turns linear: one standard deviation of the targets first seen, then fixed.
    """

    step_fn: StepFn
    batches: Callable[[Part | None], Iterable[tuple[Any, Ids]]]
    per_sample: PerSampleLoss
    autocast: Callable[[], Any]
    n_a: int = 0
    delta: float | None = None
    task: Task | None = field(default=None)

    def scores(self, model: nn.Module, part: Part | None, see: See | None = None) -> PerSampleScores:
        """Score a network on one half, or on the whole set for ``None``; evaluation mode, no gradients.

        Args:
            model: The network.
            part: The half, or None.
            see: Shown each batch's outputs and targets.

        Raises:
            DataError: The part holds no sample.
        """
        found: list[tuple[Ids, _Scored]] = []
        with forked_rng(), training_flags_kept(model), torch.no_grad():
            model.eval()
            for batch, ids in self.batches(part):
                with self.autocast():
                    loss, outputs, targets = self.step_fn(model, batch)
                if see is not None:
                    see(outputs, targets)
                found.append((ids, self._batch(loss, outputs, targets, len(ids))))
        if not found:
            raise DataError(
                f"the held-out {'set' if part is None else f'half val-{part}'} holds no sample to judge by"
            )
        return PerSampleScores(
            ids=np.concatenate([ids for ids, _ in found]),
            loss=np.concatenate([row[0] for _, row in found]),
            utility=np.concatenate([row[1] for _, row in found]),
            correct=_joined([row[2] for _, row in found]),
            p_true=_joined([row[3] for _, row in found]),
            p_top=_joined([row[4] for _, row in found]),
            squared=_joined([row[5] for _, row in found]),
            weight=_joined([row[6] for _, row in found]),
        )

    def state(self) -> dict[str, Any]:
        """What has been settled so far, as plain data for :meth:`load`."""
        return {"delta": self.delta, "task": self.task, "per_sample": self.per_sample.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Measure as :meth:`state` found it."""
        self.delta, self.task = state["delta"], state["task"]
        self.per_sample.load(state["per_sample"])

    def settle(self, model: nn.Module) -> None:
        """Fix the task and the scale of the Huber loss on the first batch of val-A, where scoring has not fixed them yet.

        Evaluators that go on from there measure alike, in whichever process, whatever they happen to score first.

        Raises:
            DataError: val-A holds no sample.
        """
        if self.task is not None and (self.task != "regression" or self.delta is not None):
            return
        with forked_rng(), training_flags_kept(model), torch.no_grad():
            model.eval()
            for batch, ids in self.batches("A"):
                with self.autocast():
                    loss, outputs, targets = self.step_fn(model, batch)
                self._batch(loss, outputs, targets, len(ids))
                return
        raise DataError("the held-out half val-A holds no sample to judge by")

    def _batch(self, loss: Tensor, outputs: Any, targets: Any, n: int) -> _Scored:
        losses = self._losses(loss, outputs, targets, n)
        if self.task is None:
            self.task = self.per_sample.task(outputs, targets)
        match self.task:
            case "classification" | "binary":
                p, right, top = _probabilities(
                    outputs, targets, self.task, probabilities=self.per_sample.probabilities
                )
                utility = utility_classification(right, np.clip(np.nan_to_num(p), 0.0, 1.0))
                weight = self.per_sample.class_weights(targets)
                return losses, utility, right, p, top, None, weight
            case "regression":
                squared = _squared(outputs, targets)
                return losses, -self._huber(outputs, targets), None, None, None, squared, None
            case _:
                return losses, -losses, None, None, None, None, None

    def _losses(self, loss: Tensor, outputs: Any, targets: Any, n: int) -> Floats:
        if self.per_sample.exact or self.per_sample.check(outputs, targets, loss):
            values = self.per_sample(outputs, targets)
            return np.asarray(values.double().cpu().numpy(), dtype=np.float64)
        return np.full(n, float(loss), dtype=np.float64)

    def _huber(self, outputs: Tensor, targets: Tensor) -> Floats:
        targets = targets.reshape(outputs.shape).to(outputs.dtype)
        if self.delta is None:
            spread = float(targets.double().std()) if targets.numel() > 1 else 1.0
            self.delta = HUBER_SIGMAS * spread if spread > 0.0 else 1.0
        error = torch.nn.functional.huber_loss(
            outputs.double(), targets.double(), reduction="none", delta=self.delta
        )
        return np.asarray(error.reshape(error.shape[0], -1).mean(dim=1).cpu().numpy(), dtype=np.float64)


def _squared(outputs: Tensor, targets: Tensor) -> Floats:
    error = (outputs.double() - targets.reshape(outputs.shape).double()) ** 2
    return np.asarray(error.reshape(error.shape[0], -1).mean(dim=1).cpu().numpy(), dtype=np.float64)


def _probabilities(
    outputs: Tensor, targets: Tensor, task: Task, *, probabilities: bool
) -> tuple[Floats, Floats, Floats]:
    """Return (probability of the true class, 1 where the most probable class is right, probability of the most probable one)."""
    if task == "classification":
        p = torch.softmax(outputs.double(), dim=1)
        known = (targets >= 0) & (targets < outputs.shape[1])
        true = p.gather(1, targets.clamp(0, outputs.shape[1] - 1)[:, None])[:, 0] * known
        right = (p.argmax(dim=1) == targets) & known
        top = p.amax(dim=1)
    else:
        score = outputs.double().reshape(targets.shape[0], -1)[:, 0]
        one = score if probabilities else torch.sigmoid(score)
        label = targets.double().reshape(targets.shape[0], -1)[:, 0]
        true = torch.where(label > 0.5, one, 1.0 - one)
        right = true > 0.5
        top = torch.maximum(one, 1.0 - one)
    return (
        np.asarray(true.cpu().numpy(), dtype=np.float64),
        np.asarray(right.double().cpu().numpy(), dtype=np.float64),
        np.asarray(top.cpu().numpy(), dtype=np.float64),
    )


def _joined(parts: list[Floats | None]) -> Floats | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None
