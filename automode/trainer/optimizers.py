"""What a variant does to an optimizer, and the sharpness-aware step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

_RATES = ("base_lrs", "max_lrs")
"""Where schedulers keep the rates that they compute from."""


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
    # What belongs to the old kind stays behind; what a schedule keeps in the groups comes along.
    own = set(optimizer.defaults) - {"lr", "weight_decay"}
    groups = [{k: v for k, v in group.items() if k not in own} for group in optimizer.param_groups]
    extra: dict[str, Any] = (
        {"momentum": optimizer.defaults.get("momentum", 0.9)} if kind is torch.optim.SGD else {}
    )
    made: torch.optim.Optimizer = kind(groups, lr=float(optimizer.param_groups[0]["lr"]), **extra)
    return made


def scale_group(group: dict[str, Any], variant: Variant) -> None:
    """Scale a parameter group's rate and weight decay as the variant says, the schedule's starting rate included."""
    scale_rates(group, variant.lr_mul)
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


def scale_rates(group: dict[str, Any], factor: float) -> None:
    """Scale a parameter group's rate, and the rates that a schedule keeps beside it, in place."""
    for name in ("lr", "initial_lr", "max_lr", "min_lr"):
        if name in group:
            group[name] = group[name] * factor


def scale_schedule(scheduler: Any, factor: float) -> None:
    """Scale the rates that a scheduler computes from, those of nested schedulers too, so that the multiplied rate lasts."""
    if factor == 1.0:
        return
    for part in _parts(scheduler):
        for name in _RATES:
            rates = getattr(part, name, None)
            if rates is not None:
                setattr(part, name, [rate * factor for rate in rates])


def restore_rates(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Give a scheduler back the rates that it computed from, out of its state dict of then; its clock stays."""
    for name in _RATES:
        if name in state:
            setattr(scheduler, name, list(state[name]))
    for part, saved in zip(getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ()), strict=True):
        restore_rates(part, saved)


def drive(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Let a scheduler, and those nested in it, drive this optimizer.

    One that cycles momentum leaves it alone from then on if the optimizer is of another kind than the one it was made for.
    """
    for part in _parts(scheduler):
        if type(part.optimizer) is not type(optimizer) and hasattr(part, "cycle_momentum"):
            part.cycle_momentum = False
        part.optimizer = optimizer
    _let_schedules_see(optimizer)


def _let_schedules_see(optimizer: torch.optim.Optimizer) -> None:
    """Mark the optimizer as a scheduler marks the one that it is made for.

    Schedulers warn of an optimizer without the mark at their first step, and a copy does not carry it.
    """
    step = optimizer.step

    def seen(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    vars(seen)["_wrapped_by_lr_sched"] = True
    vars(optimizer)["step"] = seen
    vars(optimizer)["_opt_called"] = True


def _parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _parts(part)


@torch.no_grad()
def _perturb(parameters: list[Tensor], rho: float) -> list[tuple[Tensor, Tensor]]:
    moved = [p for p in parameters if p.grad is not None]
    if not moved:
        return []
    grads = [p.grad for p in moved if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
    if not torch.isfinite(norm):
        return []
    scale = rho / (norm + 1e-12)
    steps = [g * scale for g in grads]
    torch._foreach_add_(moved, steps)
    return list(zip(moved, steps, strict=True))


def sharpness_aware_gradients(parameters: list[Tensor], loss_of: Callable[[], Tensor], rho: float) -> float:
    """Fill ``.grad`` with the gradient at the worst point within ``rho`` (Foret et al. 2021, arXiv:2010.01412).

    Two forward and two backward passes. Returns the loss at the unperturbed weights. Where loss or gradient are not finite there is no worst
    point: the weights stay, and so does their own gradient.
    """
    for p in parameters:
        p.grad = None
    loss = loss_of()
    loss.backward()  # type: ignore[no-untyped-call]
    value = float(loss.detach())
    moved = _perturb(parameters, rho)
    if not moved:
        return value
    for p in parameters:
        p.grad = None
    second = loss_of()
    second.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for p, step in moved:
            p.sub_(step)
    return value
