"""Ways to get unreduced losses from a user's loss function, none of which touches it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automode.errors import DataError
from automode.trainer.trees import map_tensors

LossFn = Callable[[Any, Any], Any]

_FEW_CLASSES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """One way to get unreduced losses.

    Attributes:
        how: ``module``, ``function`` or ``vmap``.
        call: (outputs, targets) to elements [n] or [n, ...].
        weigh: For class-index losses, targets to (weight of each element, which elements count).
    """

    how: str
    call: LossFn
    weigh: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


def base_of(loss_fn: Any) -> Any:
    """Give the type of a loss module, or the function inside partials."""
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    return type(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn


def twins_of(loss_fn: LossFn) -> list[Twin]:
    """Give the ways to get unreduced losses, the one closest to the user's own code first.

    Args:
        loss_fn: (outputs, targets) to a scalar loss; not called here, and not changed.

    Returns:
        Candidates, of which any may turn out not to work or not to be exact.
    """
    twins = []
    unreduced: dict[str, Any] = {"reduction": "none"}
    if isinstance(loss_fn, nn.Module) and isinstance(getattr(loss_fn, "reduction", None), str):
        twin: Any = copy.copy(loss_fn)
        twin.reduction = "none"
        _drop_hooks(twin)
        rows_last = type(loss_fn) in (nn.CrossEntropyLoss, nn.NLLLoss)
        call = _with_rows_last(twin) if rows_last else twin
        twins.append(Twin(how="module", call=call, weigh=_weigher(loss_fn)))
    elif _takes_reduction(loss_fn):
        call = functools.partial(loss_fn, **unreduced)
        weigh = _weigher(loss_fn)
        twins.append(Twin(how="function", call=_with_rows_last(call) if weigh else call, weigh=weigh))
    twins.append(Twin(how="vmap", call=_vectorised(loss_fn)))
    return twins


def _drop_hooks(module: nn.Module) -> None:
    """Leave a copy of a module without hooks: the user's are for the user's calls."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(module, name, OrderedDict())


def _with_rows_last(call: LossFn) -> LossFn:
    """Lay few classes of many rows out as one sample with the rows as positions: up to 8 times faster on a CPU."""

    def losses(outputs: Any, targets: Any) -> Any:
        if (
            outputs.ndim != 2
            or targets.ndim != 1
            or not outputs.is_cpu
            or not 1 < outputs.shape[1] < _FEW_CLASSES
        ):
            return call(outputs, targets)
        return call(outputs.t().contiguous().unsqueeze(0), targets.unsqueeze(0)).squeeze(0)

    return losses


def _takes_reduction(loss_fn: Any) -> bool:
    if isinstance(loss_fn, nn.Module):
        return False
    try:
        return "reduction" in inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):
        return False


def _reader(loss_fn: Any) -> Callable[[str, Any], Any] | None:
    """What reads an option (or its default) of a loss over class indices; None for other losses."""
    if isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return functools.partial(getattr, loss_fn)
    if base_of(loss_fn) in (F.cross_entropy, F.nll_loss):
        return (loss_fn.keywords if isinstance(loss_fn, functools.partial) else dict[str, Any]()).get
    return None


def _weigher(loss_fn: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """For losses over class indices, how much each target adds to the divisor of their mean."""
    read = _reader(loss_fn)
    if read is None:
        return None

    def weigh(targets: Tensor) -> tuple[Tensor, Tensor]:
        if targets.is_floating_point():
            raise DataError("class probabilities as targets have no class weights to divide by")
        counted = targets != read("ignore_index", -100)
        weight = read("weight", None)
        if weight is None:
            return counted.float(), counted
        return weight[targets.clamp(0, len(weight) - 1)] * counted, counted

    return weigh


def class_weights(loss_fn: Any, targets: Tensor) -> Tensor | None:
    """How much a loss of torch's weighs each target's class; None where it weighs all alike.

    Args:
        loss_fn: The loss.
        targets: Classes [n], or one 0 or 1 a sample.
    """
    if isinstance(loss_fn, nn.BCEWithLogitsLoss):
        more = loss_fn.pos_weight
        if more is None or more.numel() != 1:
            return None
        return torch.where(targets.reshape(-1) > 0.5, more.detach().reshape(()), 1.0)
    read = _reader(loss_fn)
    weight = None if read is None else read("weight", None)
    if weight is None or targets.is_floating_point():
        return None
    found: Tensor = weight.detach()[targets.clamp(0, len(weight) - 1)]
    return found


def _vectorised(loss_fn: LossFn) -> LossFn:
    @functools.cache
    def shell() -> nn.Module:
        copied: nn.Module = copy.deepcopy(loss_fn)  # type: ignore[assignment]  # called for modules only
        for module in copied.modules():
            _drop_hooks(module)
        return copied

    def single(output: Any, target: Any) -> Any:
        output, target = map_tensors(lambda tensor: tensor.unsqueeze(0), (output, target))
        if isinstance(loss_fn, nn.Module):
            # A loss that keeps state may change it here; it changes the shell's, from the user's live values.
            live = {**dict(loss_fn.named_parameters()), **dict(loss_fn.named_buffers())}
            value = torch.func.functional_call(shell(), live, (output, target))
        else:
            value = loss_fn(output, target)
        return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value

    return torch.func.vmap(single, randomness="error")
