"""The step of torch's own Adam and AdamW on the CPU: the same operations on the same numbers, in fewer calls.

``torch.optim.AdamW`` goes through the parameters one by one, with ten small operations each. On a small model that is a quarter of the
training step, and nearly all of it is calling. Here each operation is called once for many parameters (``torch._foreach_*``, which on
the CPU loops over the operation itself), and what does not change within a stretch of steps is looked up once. Large parameters
stay on their own, since a cache holds only so much. Weights, moments and step counts are torch's bit by bit. That is not believed
but tried out, once a process, on the torch that is there; where a bit differs, and wherever the optimizer is not torch's class as it
comes, its own ``step`` is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from automode.trainer.torchs_steps import (
    DTYPES,
    TOGETHER_BYTES,
    TRIED_SIZES,
    TRIED_STEPS,
    Call,
    heard,
    is_torchs,
)

_KINDS = (torch.optim.Adam, torch.optim.AdamW)
_OTHERWISE = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")
_ONE = torch.ones((), device="cpu")


class _Chunk(NamedTuple):
    """Parameters that step together, with their moments and step counts."""

    parameters: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]
    steps: list[Tensor]


def update_of(optimizer: torch.optim.Optimizer) -> Call:
    """What makes the optimizer's step, for as long as nobody changes its groups or its state.

    Learning rate, betas, eps and weight decay are read at each call. The optimizer's own ``step`` is called all the same where a hook
    or the profiler has begun to listen, and where a parameter that had a gradient has none, or the other way round.

    Args:
        optimizer: Any.

    Returns:
        ``optimizer.step``, or a function without arguments that leaves the same bits behind.
    """
    own, kind = optimizer.step, type(optimizer)
    if kind not in _KINDS or len(optimizer.param_groups) != 1 or heard(optimizer) or not is_torchs(own):
        return own
    found = _stepped(optimizer)
    if found is None or not _agrees(kind):
        return own
    return _together(optimizer, *found)


def _together(optimizer: torch.optim.Optimizer, chunks: list[_Chunk], idle: list[Tensor]) -> Call:
    own, state, count = optimizer.step, optimizer.state, chunks[0].steps[0]
    sizes = [len(chunk.parameters) for chunk in chunks]
    decoupled = bool(optimizer.param_groups[0].get("decoupled_weight_decay", type(optimizer) is _KINDS[1]))
    scheduled = hasattr(own, "_wrapped_by_lr_sched")
    allow = torch._C._set_grad_enabled  # noqa: SLF001  # the public one is an object more
    fits = True

    def update() -> None:
        nonlocal fits
        gradients: list[Any] = [[parameter.grad for parameter in chunk.parameters] for chunk in chunks]
        group = optimizer.param_groups[0]
        rate, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        if (
            not fits
            or [list(map(type, given)).count(Tensor) for given in gradients] != sizes
            or (idle and any(parameter.grad is not None for parameter in idle))
            or not type(rate) is type(beta1) is type(beta2) is float
            or optimizer.state is not state
            or heard(optimizer)
        ):
            fits = False  # counts may differ from now on
            own()
            return
        if scheduled:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001  # as its wrapper does
        graded = torch.is_grad_enabled()
        allow(False)
        try:
            # In double precision and in torch's order.
            step = count.item() + 1
            size = rate / (1 - beta1**step)
            root = (1 - beta2**step) ** 0.5
            for (parameters, firsts, seconds, steps), given in zip(chunks, gradients, strict=True):
                wanted = given
                torch._foreach_add_(steps, _ONE)
                if decay != 0 and decoupled:
                    torch._foreach_mul_(parameters, 1 - rate * decay)
                elif decay != 0:
                    wanted = torch._foreach_add(given, parameters, alpha=decay)  # noqa: SLF001
                torch._foreach_lerp_(firsts, wanted, 1 - beta1)
                torch._foreach_mul_(seconds, beta2)
                torch._foreach_addcmul_(seconds, wanted, wanted, 1 - beta2)
                roots = torch._foreach_sqrt(seconds)  # noqa: SLF001
                torch._foreach_div_(roots, root)
                torch._foreach_add_(roots, eps)
                torch._foreach_addcdiv_(parameters, firsts, roots, -size)
        finally:
            allow(graded)

    return update


def _stepped(optimizer: torch.optim.Optimizer) -> tuple[list[_Chunk], list[Tensor]] | None:
    """The parameters that step, and those that do not; None where the optimizer's own way is the only one known."""
    group = optimizer.param_groups[0]
    if any(group.get(name) for name in _OTHERWISE):
        return None
    chunks: list[_Chunk] = []
    idle: list[Tensor] = []
    storages, counts, size, total = set(), set(), TOGETHER_BYTES, 0
    for parameter in group["params"]:
        kept = optimizer.state.get(parameter)
        if not kept:
            idle.append(parameter)
            continue
        first, second, step = kept.get("exp_avg"), kept.get("exp_avg_sq"), kept.get("step")
        if (
            type(parameter) not in (nn.Parameter, Tensor)
            or not type(first) is type(second) is type(step) is Tensor
            or not parameter.is_cpu
            or not step.is_cpu
            or not parameter.dtype is first.dtype is second.dtype
            or parameter.dtype not in DTYPES
        ):
            return None
        if size + parameter.nbytes > TOGETHER_BYTES:
            chunks.append(_Chunk([], [], [], []))
            size = 0
        size += parameter.nbytes
        for kind, tensor in zip(chunks[-1], (parameter, first, second, step), strict=True):
            kind.append(tensor)
        storages.add(parameter.untyped_storage().data_ptr())
        counts.add(step.item())
        total += 1
    # Those that share memory must step one after the other, and those that were left out at times have counts of their own.
    return (chunks, idle) if len(storages) == total and len(counts) == 1 else None


@functools.cache
def _agrees(kind: type[torch.optim.Optimizer]) -> bool:
    """Try out whether this torch's own step comes to the same bits."""
    return all(
        _bits(kind, dtype, decay, together=True) == _bits(kind, dtype, decay, together=False)
        for dtype in DTYPES
        for decay in (0.0, 0.03)
    )


def _bits(
    kind: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, decay: float, *, together: bool
) -> list[bytes]:
    """Everything that a few steps leave behind, on numbers of many sizes."""
    parameters = [
        nn.Parameter(torch.linspace(-3, 3, size, dtype=dtype, device="cpu").sin_()) for size in TRIED_SIZES
    ]
    optimizer = kind(parameters, lr=3e-3, weight_decay=decay)
    update: Call = optimizer.step
    for turn in range(TRIED_STEPS):
        for parameter in parameters:
            start = torch.linspace(turn, 9, parameter.numel(), dtype=dtype, device="cpu")
            parameter.grad = start.cos_().mul_(10.0 ** (turn - 3))
        if together and turn == 1:
            found = _stepped(optimizer)
            if found is None:
                return []
            update = _together(optimizer, *found)
        update()
    kept: Iterable[Tensor] = (tensor for state in optimizer.state.values() for tensor in state.values())
    return [tensor.detach().numpy().tobytes() for tensor in (*parameters, *kept)]
