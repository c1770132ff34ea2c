"""What a gate is fitted on: the parent's features and every frozen expert's log-likelihood, each sample read once.

This is the one pass over held-out data that fitting costs; :func:`automode.merges.gate.fit_gate` then works on the cached
numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.batches import Batch, device_of, move, training_flags_kept
from automode.merges.gate import gaussian_log_likelihood
from automode.merges.moe import Task, features_and_outputs

IGNORED_TARGET = -100
"""Class targets of this value take no part, as in ``torch.nn.functional.cross_entropy``."""

_SMALLEST_LOG_LIKELIHOOD = -100.0  # a probability of 0 says "never", but one sample must not decide the gate


@dataclass(frozen=True, slots=True, kw_only=True)
class GateEvidence:
    """Cached values, one row for each sample (or each position of a sequence).

    Attributes:
        features: ``[n, d]``, single precision, on the CPU.
        log_lik: ``[n, k]``, nats, likewise.
        samples: samples read (rows of the batches).
        passes: forward-equivalents spent: one for each sample and expert.
    """

    features: Tensor
    log_lik: Tensor
    samples: int
    passes: int


def gather_evidence(
    experts: Sequence[nn.Module], batches: Iterable[Batch], *, feature_layer: str, task: Task, parent: int = 0
) -> GateEvidence:
    """Run every expert once over held-out batches.

    Args:
        experts: ``k`` networks, at least 2; they run in evaluation mode and are left as they were.
        batches: ``(inputs, targets, ...)`` of samples that trained no expert: class indices for classification, 0 or 1
            for binary, real numbers for regression.
        feature_layer: module of the parent whose first input is the feature.
        task: what targets mean.
        parent: index of the expert whose features are taken.

    Raises:
        MergeError: no sample came, a batch is no pair, or features, outputs and targets do not line up.
    """
    if len(experts) < 2 or not 0 <= parent < len(experts):
        raise MergeError(
            f"{len(experts)} experts came with parent {parent}: pass at least 2, the parent among them"
        )
    features: list[Tensor] = []
    values: list[Tensor] = []
    samples = 0
    width = 1
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise MergeError(
                f"a batch of type {type(batch).__name__} came; (inputs, targets) is needed to fit a gate"
            )
        columns: list[Tensor] = []
        kept: Tensor | None = None
        for index, expert in enumerate(experts):
            inputs, targets = move((batch[0], batch[1]), device_of(expert))
            outputs, seen = _run(expert, feature_layer if index == parent else None, inputs)
            score, kept, width = _score(outputs, targets, task)
            columns.append(score.float().cpu())
            if seen is not None:
                features.append(_rows_of(seen, outputs, task)[kept].float().cpu())
        values.append(torch.stack(columns, dim=1))
        samples += int(batch[1].shape[0])
    if samples == 0:
        raise MergeError("no sample came to fit the gate on: pass held-out batches")
    table = torch.cat(values)
    if task == "regression":
        table = gaussian_log_likelihood(table, dimensions=width)
    log_lik = table.clamp_min(_SMALLEST_LOG_LIKELIHOOD)
    return GateEvidence(
        features=torch.cat(features), log_lik=log_lik, samples=samples, passes=samples * len(experts)
    )


def _run(expert: nn.Module, layer: str | None, inputs: Any) -> tuple[Tensor, Tensor | None]:
    with training_flags_kept(expert), torch.no_grad():
        expert.eval()
        if layer is None:
            return expert(inputs), None
        return features_and_outputs(expert, layer, inputs)


def _score(outputs: Tensor, targets: Tensor, task: Task) -> tuple[Tensor, Tensor, int]:
    """Return a number for each row that counts (log-likelihood or squared error), which rows count, and their width."""
    match task:
        case "classification":
            flat = targets.reshape(-1)
            if outputs.shape[:-1] != targets.shape:
                raise MergeError(_mismatch(outputs, targets, "one class index for each row of outputs"))
            kept = flat != IGNORED_TARGET
            log_p = outputs.reshape(-1, outputs.shape[-1])[kept].log_softmax(dim=-1)
            return log_p.gather(1, flat[kept].long()[:, None]).squeeze(1), kept, 1
        case "binary":
            if outputs.shape != targets.shape:
                raise MergeError(_mismatch(outputs, targets, "a target for each output"))
            loss = nn.functional.binary_cross_entropy_with_logits(
                outputs, targets.to(outputs.dtype), reduction="none"
            )
            summed = -_by_row(loss)
            return summed, torch.ones_like(summed, dtype=torch.bool), loss.numel() // max(len(summed), 1)
        case "regression":
            if outputs.shape != targets.shape:
                raise MergeError(_mismatch(outputs, targets, "a target for each output"))
            error = _by_row((outputs - targets).square())
            return error, torch.ones_like(error, dtype=torch.bool), outputs.numel() // max(len(error), 1)


def _by_row(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.reshape(-1, values.shape[-1]).sum(dim=1)


def _rows_of(features: Tensor, outputs: Tensor, task: Task) -> Tensor:
    scalar = task != "classification" and outputs.dim() == features.dim() - 1
    if features.shape[:-1] != (outputs.shape if scalar else outputs.shape[:-1]):
        raise MergeError(
            f"features {tuple(features.shape)} and outputs {tuple(outputs.shape)} do not line up: "
            f"all dimensions but the last must agree"
        )
    return features.reshape(-1, features.shape[-1])


def _mismatch(outputs: Tensor, targets: Tensor, needed: str) -> str:
    return f"targets {tuple(targets.shape)} came for outputs {tuple(outputs.shape)}; {needed} is needed"
