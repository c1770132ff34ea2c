"""What a variant does to an optimizer, and the sharpness-aware step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from automode.errors import NotExecutableError
from automode.planner.recipes import Variant

CLASSES: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def apply_variant(optimizer: torch.optim.Optimizer, variant: Variant) -> torch.optim.Optimizer:
    """Return the optimizer that a variant trains with: the copy itself with other rates, or another kind over the same groups.

    Another kind starts with empty moments and the copy's (multiplied) rates; SGD takes momentum 0.9 where the copy has none to offer.
    """
    for group in optimizer.param_groups:
        scale_group(group, variant)
    if variant.optimizer in ("keep", "sam"):
        return optimizer
    kind = CLASSES[variant.optimizer]
    if type(optimizer) is kind:
        return optimizer
    shared = ("params", "lr", "weight_decay", "initial_lr")
    groups = [{k: v for k, v in group.items() if k in shared} for group in optimizer.param_groups]
    extra: dict[str, Any] = (
        {"momentum": optimizer.defaults.get("momentum", 0.9)} if kind is torch.optim.SGD else {}
    )
    made: torch.optim.Optimizer = kind(groups, lr=float(optimizer.param_groups[0]["lr"]), **extra)
    return made


def scale_group(group: dict[str, Any], variant: Variant) -> None:
    """Scale a parameter group's rate and weight decay as the variant says, the schedule's starting rate included."""
    group["lr"] = group["lr"] * variant.lr_mul
    if "initial_lr" in group:
        group["initial_lr"] = group["initial_lr"] * variant.lr_mul
    if variant.weight_decay is None and variant.weight_decay_mul == 1.0:
        return
    if "weight_decay" not in group:
        raise NotExecutableError(
            f"variant `{variant.name}` changes the weight decay, and this optimizer has none"
        )
    if variant.weight_decay is not None:
        group["weight_decay"] = variant.weight_decay
    else:
        group["weight_decay"] = group["weight_decay"] * variant.weight_decay_mul


def scale_schedule(scheduler: Any, factor: float) -> None:
    """Scale the base rates that a scheduler computes from, so that the multiplied rate lasts."""
    base = getattr(scheduler, "base_lrs", None)
    if base is not None and factor != 1.0:
        scheduler.base_lrs = [rate * factor for rate in base]


@torch.no_grad()
def _perturb(parameters: list[Tensor], rho: float) -> list[tuple[Tensor, Tensor]]:
    moved = [p for p in parameters if p.grad is not None]
    if not moved:
        return []
    grads = [p.grad for p in moved if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    scale = rho / (norm + 1e-12)
    steps = [g * scale for g in grads]
    torch._foreach_add_(moved, steps)
    return list(zip(moved, steps, strict=True))


def sharpness_aware_gradients(parameters: list[Tensor], loss_of: Callable[[], Tensor], rho: float) -> float:
    """Fill ``.grad`` with the gradient at the worst point within ``rho`` (Foret et al. 2021, arXiv:2010.01412).

    Two forward and two backward passes. Returns the loss at the unperturbed weights.
    """
    for p in parameters:
        p.grad = None
    loss = loss_of()
    loss.backward()  # type: ignore[no-untyped-call]
    value = float(loss.detach())
    moved = _perturb(parameters, rho)
    for p in parameters:
        p.grad = None
    second = loss_of()
    second.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p, step in moved:
            p.sub_(step)
    return value
