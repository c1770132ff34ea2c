"""What a loss of the user's own takes outputs for, asked of the loss itself: shapes alone do not tell scores from embeddings.

Outputs [n, C] with integer targets [n] are class scores where the loss falls as the target's column rises, and embeddings where it
does not care which column is which (contrastive losses, losses that hold the class weights). Outputs and targets of one shape are
values where the loss is least at the targets and rises alike to both sides, and logits or quantiles where it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from automode.trainer.tasks import Task

Ask = Callable[[Tensor, Any], Tensor]
"""(made-up outputs, targets) to losses [k]: one for each sample, or the whole batch's as the only one."""

_MOST_OTHERS: Final = 8
_SHARE: Final = 0.9
_NOTICED: Final = 1e-3
_ALIKE: Final = 0.75
_SURE: Final = 0.9


def is_meant(ask: Ask, found: Task, outputs: Tensor, targets: Tensor) -> bool:
    """Tell whether a loss takes outputs for what their shape says.

    Args:
        ask: The loss; it may be called a dozen times.
        found: ``classification`` or ``regression``; anything else is taken as it is.
        outputs: What the model gave; only shape and kind count.
        targets: Targets of the same samples.

    Returns:
        False where the loss is certainly of something else.
    """
    match found:
        case "classification":
            return _of_scores(ask, outputs, targets)
        case "regression":
            return _of_values(ask, outputs, targets)
        case _:
            return True


def _of_scores(ask: Ask, outputs: Tensor, targets: Tensor) -> bool:
    """Whether outputs that are sure of the target lose less than outputs that are as sure of another class."""
    classes = outputs.shape[1]
    column = targets.long().clamp(0, classes - 1)

    def sure_of(chosen: Tensor) -> Tensor:
        # A probability, a logit and a log-probability all the same, whose order is what counts.
        hot = F.one_hot(chosen, classes).to(outputs.dtype)
        return hot * _SURE + (1.0 - hot) * ((1.0 - _SURE) / (classes - 1))

    right = ask(sure_of(column), targets)
    less = [
        _less(right, ask(sure_of((column + by) % classes), targets))
        for by in range(1, min(classes - 1, _MOST_OTHERS) + 1)
    ]
    return float(torch.stack(less).double().mean()) >= _SHARE


def _less(low: Tensor, high: Tensor) -> Tensor:
    return low < high - _NOTICED * high.abs().nan_to_num(posinf=0.0)


def _of_values(ask: Ask, outputs: Tensor, targets: Tensor) -> bool:
    """Whether outputs that are the targets lose least, and as much more on either side."""
    there = targets.to(outputs.dtype).reshape(outputs.shape)
    spread = there.double().std().item() if there.numel() > 1 else 0.0
    away = spread if spread > 0.0 else 1.0
    least = ask(there, targets).double().mean()
    above, below = (float(ask(there + by, targets).double().mean() - least) for by in (away, -away))
    return min(above, below) > 0.0 and min(above, below) >= _ALIKE * max(above, below)
