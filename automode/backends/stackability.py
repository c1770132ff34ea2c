"""Which segments can be stacked, and with which others: everything that can be told without running a step.

Stacked members share one graph, so that they must agree in all that a graph holds: the network's modules and their
settings, which parameters train, the optimizer's kind and its constants. What may differ is what stands in a column beside
their weights: learning rate, weight decay, clipping, the weight of selected samples, schedules and averages.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from automode.backends.base import SegmentJob, StackableSegment

OPTIMIZERS: tuple[type[torch.optim.Optimizer], ...] = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
DTYPES = (torch.float32, torch.float64)
OWN_SETTINGS = (
    *("params", "lr", "initial_lr", "max_lr", "min_lr", "weight_decay"),
    *("betas", "momentum", "max_momentum", "base_momentum"),  # schedules may cycle them
    *("foreach", "fused"),  # speed alone
)
"""What members may have of their own in a parameter group."""

PLAIN = (bool, int, float, str, tuple, type(None))
"""Kinds of attributes that steer a network's forward pass."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
REFUSED_FLAGS = ("amsgrad", "maximize", "capturable", "differentiable")


def why_variant_alone(job: SegmentJob) -> str | None:
    """Tell why a job's variant cannot be stacked, from the job alone; None where nothing speaks against it."""
    if job.variant.optimizer == "sam":
        return "a sharpness-aware step takes two gradients at different weights"
    if job.variant.batches == "all":
        return "the samples that it weighs stand anywhere in a batch"
    if job.variant.batch_mul != 1.0:
        return "its batches are of a size of their own"
    if job.variant.updates != 1:
        return "it takes several steps on each batch"
    if job.variant.precision == "bf16":
        return "it trains in bf16"
    if job.variant.adapter is not None:
        return "it trains adapters"
    return None


def why_alone(segment: StackableSegment) -> str | None:
    """Tell why an open segment cannot be stacked; None where nothing speaks against it."""
    if segment.precision != "fp32":
        return f"it trains in {segment.precision}"
    return why_network_alone(segment.model) or _why_optimizer_alone(segment.model, segment.optimizer)


def why_network_alone(model: nn.Module) -> str | None:
    """Tell why copies of a network cannot be stacked; None where nothing speaks against it."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"`{name}` ({kind})" if name else kind
        if isinstance(module, _NormBase) and module.track_running_stats:
            return f"{where} updates running statistics as it trains"
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            return f"{where} is compiled already"
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return f"{where} spreads its batches over devices"
        if isinstance(module, nn.RNNBase):
            return f"{where} has no batched kernel"
        if any(getattr(module, hooks, None) for hooks in HOOKS):
            return f"{where} has hooks, which a stacked pass would call once for all members"
    parameters = list(model.parameters())
    if len({p.dtype for p in parameters}) > 1 or any(p.dtype not in DTYPES for p in parameters):
        return f"its parameters are {', '.join(sorted({str(p.dtype) for p in parameters}))}, not float32 or float64 alone"
    if len({p.device for p in parameters}) > 1:
        return "its parameters lie on several devices"
    return None


def _why_optimizer_alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    if type(optimizer) not in OPTIMIZERS:
        return f"{type(optimizer).__name__} is not one of {', '.join(kind.__name__ for kind in OPTIMIZERS)}"
    mine = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(p) not in mine for p in held):
        return "its optimizer holds parameters that are not the network's"
    if {id(p) for p in model.parameters() if p.requires_grad} - {id(p) for p in held}:
        return "parameters of the network gather gradients that no optimizer uses"
    for group in optimizer.param_groups:
        flag = next((name for name in REFUSED_FLAGS if group.get(name)), None)
        if flag is not None:
            return f"its optimizer is set to `{flag}`"
        if group.get("dampening"):
            return "its optimizer damps momentum"
    return None


def likeness(segment: StackableSegment) -> Hashable:
    """Everything in which stacked members must agree; equal values may share a graph."""
    model, optimizer = segment.model, segment.optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    groups = tuple(
        (
            tuple(names[id(p)] for p in group["params"]),
            tuple(sorted((key, repr(value)) for key, value in group.items() if key not in OWN_SETTINGS)),
        )
        for group in optimizer.param_groups
    )
    tensors = tuple(
        (name, tuple(t.shape), t.dtype, str(t.device), t.requires_grad)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    )
    return (settings_of(model), tensors, type(optimizer).__name__, groups)


def settings_of(model: nn.Module) -> Hashable:
    """Kind and plain attributes of every module: what a graph takes as fixed when it is made."""
    return tuple(
        (type(module).__qualname__, tuple(sorted((key, repr(value)) for key, value in plain.items())))
        for module, plain in plain_settings(model)
    )


def plain_settings(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The plain attributes of every module, by module."""
    return [
        (module, {key: value for key, value in vars(module).items() if isinstance(value, PLAIN)})
        for module in model.modules()
    ]
