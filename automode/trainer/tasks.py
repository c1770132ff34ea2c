"""What kind of task a model is trained for, read off one batch, and how right each sample is."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from automode.trainer.trees import rows_in

Task = Literal["classification", "binary", "regression", "sequence", "unknown"]


def task_of(outputs: Any, targets: Any) -> Task:
    """Tell from one batch what kind of task this is.

    Args:
        outputs: Model outputs, samples along the first dimension.
        targets: Targets of the same samples.

    Returns:
        ``classification``: scores [n, C] with integer classes [n]. ``binary``: one score a sample with targets 0 and
        1. ``sequence``: scores with a class dimension beside others. ``regression``: floating outputs and targets of
        one shape. Otherwise ``unknown``.
    """
    if (
        not (isinstance(outputs, Tensor) and isinstance(targets, Tensor))
        or rows_in((outputs, targets)) is None
    ):
        return "unknown"
    if not outputs.is_floating_point() or targets.is_complex():
        return "unknown"
    n = outputs.shape[0]
    whole = not targets.is_floating_point()
    if whole and targets.ndim == 1 and outputs.ndim == 2 and outputs.shape[1] > 1:
        return "classification"
    if whole and outputs.ndim > 2 and targets.ndim == outputs.ndim - 1:
        class_second, class_last = (outputs.shape[:1] + outputs.shape[2:], outputs.shape[:-1])
        return "sequence" if targets.shape in (class_second, class_last) else "unknown"
    if outputs.numel() != targets.numel():
        return "unknown"
    if outputs.numel() == n and bool(((targets == 0) | (targets == 1)).all()):
        return "binary"
    return "regression" if outputs.shape == targets.shape or outputs.numel() == n else "unknown"


def margins(outputs: Tensor, targets: Tensor, *, probabilities: bool = False) -> Tensor:
    """Give the score of the true class minus the best other score; above 0 the sample is right, a tie is wrong.

    Args:
        outputs: Scores [n, C] (logits or log probabilities) with classes [n]; or one score a sample with targets 0
            and 1.
        targets: Integer classes [n], or 0 and 1.
        probabilities: Single scores are probabilities, which count from one half; otherwise logits, from 0.

    Returns:
        Float tensor [n], NaN where the class is outside [0, C) (an ignored target).
    """
    outputs, targets = outputs.detach(), targets.detach()
    if outputs.dtype in (torch.float16, torch.bfloat16):
        outputs = outputs.float()
    if outputs.ndim != 2 or outputs.shape[1] == 1:
        score = outputs.reshape(-1) - (0.5 if probabilities else 0.0)
        return torch.where(targets.reshape(-1) > 0.5, score, -score)
    classes = outputs.shape[1]
    if classes == 2:
        sign = targets.to(outputs.dtype)
        margin = (outputs[:, 1] - outputs[:, 0]) * (sign + sign - 1)
    else:
        column = targets.long().clamp(0, classes - 1).unsqueeze(1)
        true = outputs.gather(1, column).squeeze(1)
        margin = true - outputs.scatter(1, column, float("-inf")).amax(1)
    return margin.masked_fill_((targets < 0) | (targets >= classes), float("nan"))


def scores_are(
    outputs: Tensor, targets: Tensor, loss: float, mode: str
) -> Literal["logits", "probabilities", "values"]:
    """Tell from a loss of unknown kind how single scores with targets 0 and 1 are meant.

    Args:
        outputs: One score a sample.
        targets: 0 or 1 each.
        loss: The training loss on them.
        mode: ``sum`` where the loss is a sum, else a mean.

    Returns:
        ``values`` where the loss is a squared or absolute error, ``probabilities`` where it is closer to the
        cross-entropy of probabilities than of logits.
    """
    scores, labels = outputs.detach().reshape(-1).double(), targets.detach().reshape(-1).double()
    reduction = "sum" if mode == "sum" else "mean"
    for error in (F.mse_loss, F.l1_loss):
        if math.isclose(float(error(scores, labels, reduction=reduction)), loss, rel_tol=1e-4):
            return "values"
    if bool(((scores < 0) | (scores > 1)).any()):
        return "logits"
    as_probability = float(F.binary_cross_entropy(scores, labels, reduction=reduction))
    as_logit = float(F.binary_cross_entropy_with_logits(scores, labels, reduction=reduction))
    return "probabilities" if abs(as_probability - loss) < abs(as_logit - loss) else "logits"
