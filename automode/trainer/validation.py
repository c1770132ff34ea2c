"""The user's validation and test: the whole set, without a trace in the run, with the slices that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from automode.errors import DataError, UsageError
from automode.trainer.evaluation import Evaluator, Ids, PerSampleScores, See
from automode.trainer.heldout import HeldOut
from automode.trainer.random_state import forked_rng

SliceFn = Callable[[Any, Any], Any]
"""Inputs and targets of a batch to a boolean mask over its samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationResult:
    """One look at a held-out set.

    Attributes:
        loss: Mean loss over samples.
        metric: Accuracy where there are classes, else mean utility; higher is better.
        metrics: Every metric by name.
        slices: The metric of each slice, by name.
        scores: Scores of every sample.
    """

    loss: float
    metric: float
    metrics: Mapping[str, float]
    slices: dict[str, float]
    scores: PerSampleScores


class Validation:
    """Looks at one held-out set; the model, the random states and the user's loader stay as they are.

    Args:
        model: What is judged.
        evaluator: Scores it, sample by sample.
        slices: Sample ids of named subsets.
    """

    def __init__(self, model: nn.Module, evaluator: Evaluator, slices: Mapping[str, Ids]) -> None:
        self._model = model
        self._evaluator = evaluator
        self._slices = dict(slices)

    def run(self, see: See | None = None) -> ValidationResult:
        """Look once.

        Args:
            see: Shown each batch's outputs and targets.

        Raises:
            DataError: The set holds no sample.
        """
        scores = self._evaluator.scores(self._model, None, see)
        metrics = _metrics(scores)
        name = "accuracy" if "accuracy" in metrics else "utility"
        values = scores.utility if scores.correct is None else scores.correct
        return ValidationResult(
            loss=metrics["loss"],
            metric=metrics[name],
            metrics=metrics,
            slices={name: _mean(values[np.isin(scores.ids, ids)]) for name, ids in self._slices.items()},
            scores=scores,
        )


def check_batches(held_out: HeldOut, name: str) -> None:
    """Refuse a held-out set that the default forward pass cannot read, before anything is trained.

    Args:
        held_out: The set; its first batch is read.
        name: What the user calls the loader.

    Raises:
        DataError: It is empty, or its batches are no ``(inputs, targets)``.
    """
    with forked_rng():
        first = next(iter(held_out.batches(None)), None)
    if first is None:
        raise DataError(f"{name} is empty")
    if not isinstance(first[0], list | tuple) or len(first[0]) != 2:
        of = f" of {len(first[0])}" if isinstance(first[0], list | tuple) else ""
        raise DataError(
            f"{name} yields a {type(first[0]).__name__}{of}, but must yield (inputs, targets), which evaluation reads "
            "also where you train with a step of your own; give it a collate_fn that makes such pairs (inputs may be a dict "
            f"or a tuple, as the model takes them), or leave {name} out"
        )


def resolve_slices(slices: Mapping[str, Any], held_out: HeldOut) -> dict[str, Ids]:
    """Find the sample ids of each slice.

    Args:
        slices: By name, a function of a batch's (inputs, targets) that gives a boolean mask over its samples, or
            sample ids. Functions are called once, over one pass of the set.
        held_out: The validation set.

    Returns:
        Ascending sample ids by name.

    Raises:
        UsageError: A slice is neither, holds no validation sample or others, or the samples have no ids.
    """
    if slices and held_out.reason is not None:
        raise UsageError(f"slices need to know the validation samples by id, but {held_out.reason}")
    for name in slices:
        if not isinstance(name, str) or not name:
            raise UsageError(f"a slice is named by a non-empty string, got {name!r}")
    functions = {name: part for name, part in slices.items() if callable(part)}
    found = {
        name: _listed(name, part, held_out.ids) for name, part in slices.items() if name not in functions
    }
    if functions:
        found |= _masked(functions, held_out)
    for name, ids in found.items():
        if not ids.size:
            raise UsageError(f"the slice {name!r} holds none of the {held_out.ids.size} validation samples")
    return {name: found[name] for name in slices}


def _masked(functions: Mapping[str, SliceFn], held_out: HeldOut) -> dict[str, Ids]:
    parts: dict[str, list[Ids]] = {name: [] for name in functions}
    with forked_rng(), torch.no_grad():
        for (inputs, targets), ids in held_out.batches(None):
            for name, function in functions.items():
                parts[name].append(ids[_mask(name, function(inputs, targets), len(ids))])
    return {name: np.sort(np.concatenate(found)) for name, found in parts.items()}


def _mask(name: str, value: Any, n: int) -> npt.NDArray[np.bool_]:
    mask = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if mask.shape != (n,) or mask.dtype != np.bool_:
        raise UsageError(
            f"the slice {name!r} gave {mask.dtype} values of shape {mask.shape} for a batch of {n} samples; "
            f"it must give a boolean mask of shape ({n},)"
        )
    return mask


def _listed(name: str, given: Any, known: Ids) -> Ids:
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise UsageError(
            f"the slice {name!r} is a {type(given).__name__}; it must be a function of (inputs, targets) that gives a "
            "boolean mask, or a list of sample ids"
        )
    values = given.cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(list(given))
    if values.size and (values.ndim != 1 or values.dtype.kind not in "iu"):
        raise UsageError(
            f"the slice {name!r} holds {values.dtype} values of shape {values.shape}; sample ids are a flat list of integers"
        )
    ids = np.unique(values.astype(np.int64))
    strangers = ids[~np.isin(ids, known)]
    if strangers.size:
        raise UsageError(
            f"the slice {name!r} names {strangers.size} samples that are not in the validation set, {strangers[0]} for one; "
            "an id is a position in the dataset under every Subset"
        )
    return ids


def _metrics(scores: PerSampleScores) -> dict[str, float]:
    found = {"loss": _mean(scores.loss), "utility": _mean(scores.utility)}
    if scores.correct is not None:
        found["accuracy"] = _mean(scores.correct)
    return found


def _mean(values: npt.NDArray[Any]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
