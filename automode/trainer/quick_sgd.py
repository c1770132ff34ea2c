"""The step of torch's own SGD on the CPU: the same operations on the same numbers, in fewer calls; see :mod:`automode.trainer.quick_adam`."""

from __future__ import annotations

import functools
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

_OTHERWISE = ("foreach", "differentiable", "fused")
_TRIED: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.03, "maximize": True},
    {"momentum": 0.9, "dampening": 0.1},
    {"momentum": 0.9, "weight_decay": 0.03, "nesterov": True},
)


class _Chunk(NamedTuple):
    """Parameters that step together, with their momenta where there are any."""

    parameters: list[Tensor]
    momenta: list[Tensor]


def sgd_update_of(optimizer: torch.optim.Optimizer) -> Call:
    """What makes the step of an SGD, for as long as nobody changes its groups or its state.

    Rate, momentum, dampening, weight decay and direction are read at each call. The optimizer's own ``step`` is called all the same
    where a hook or the profiler has begun to listen, where a gradient is missing, and where momentum is switched on or off.

    Args:
        optimizer: Any.

    Returns:
        ``optimizer.step``, or a function without arguments that leaves the same bits behind.
    """
    own = optimizer.step
    if type(optimizer) is not torch.optim.SGD or len(optimizer.param_groups) != 1:
        return own
    if heard(optimizer) or not is_torchs(own):
        return own
    chunks = _stepped(optimizer)
    return own if not chunks or not _agrees() else _together(optimizer, chunks)


def _together(optimizer: torch.optim.Optimizer, chunks: list[_Chunk]) -> Call:
    own, state = optimizer.step, optimizer.state
    sizes = [len(chunk.parameters) for chunk in chunks]
    pushed = bool(chunks[0].momenta)
    scheduled = hasattr(own, "_wrapped_by_lr_sched")
    allow = torch._C._set_grad_enabled  # noqa: SLF001  # the public one is an object more
    fits = True

    def update() -> None:
        nonlocal fits
        gradients: list[Any] = [[parameter.grad for parameter in chunk.parameters] for chunk in chunks]
        group = optimizer.param_groups[0]
        rate, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
        if (
            not fits
            or [list(map(type, given)).count(Tensor) for given in gradients] != sizes
            or type(rate) is not float
            or isinstance(decay, Tensor)
            or (momentum != 0) is not pushed
            or optimizer.state is not state
            or heard(optimizer)
        ):
            fits = False  # there may be other momenta from now on
            own()
            return
        if scheduled:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001  # as its wrapper does
        graded = torch.is_grad_enabled()
        allow(False)
        try:
            for (parameters, momenta), given in zip(chunks, gradients, strict=True):
                wanted: Any = torch._foreach_neg(given) if group["maximize"] else given  # noqa: SLF001
                if decay != 0:
                    wanted = torch._foreach_add(wanted, parameters, alpha=decay)  # noqa: SLF001
                if pushed:
                    torch._foreach_mul_(momenta, momentum)
                    torch._foreach_add_(momenta, wanted, alpha=1 - group["dampening"])
                    if group["nesterov"]:
                        wanted = torch._foreach_add(wanted, momenta, alpha=momentum)  # noqa: SLF001
                    else:
                        wanted = momenta
                torch._foreach_add_(parameters, wanted, alpha=-rate)
        finally:
            allow(graded)

    return update


def _stepped(optimizer: torch.optim.Optimizer) -> list[_Chunk]:
    """The parameters, in parts; none where the optimizer's own way is the only one known, as before the momenta are made."""
    group = optimizer.param_groups[0]
    if any(group.get(name) for name in _OTHERWISE):
        return []
    chunks: list[_Chunk] = []
    storages, size = set(), TOGETHER_BYTES
    for parameter in group["params"]:
        kept = optimizer.state.get(parameter, {}).get("momentum_buffer") if group["momentum"] != 0 else None
        known = (
            kept is None if group["momentum"] == 0 else type(kept) is Tensor and kept.dtype is parameter.dtype
        )
        if (
            not known
            or type(parameter) not in (nn.Parameter, Tensor)
            or not parameter.is_cpu
            or parameter.dtype not in DTYPES
        ):
            return []
        if size + parameter.nbytes > TOGETHER_BYTES:
            chunks.append(_Chunk([], []))
            size = 0
        size += parameter.nbytes
        chunks[-1].parameters.append(parameter)
        if kept is not None:
            chunks[-1].momenta.append(kept)
        storages.add(parameter.untyped_storage().data_ptr())
    # Those that share memory must step one after the other.
    return chunks if len(storages) == len(group["params"]) else []


@functools.cache
def _agrees() -> bool:
    """Try out whether this torch's own step comes to the same bits."""
    return all(
        _bits(dtype, given, together=True) == _bits(dtype, given, together=False)
        for dtype in DTYPES
        for given in _TRIED
    )


def _bits(dtype: torch.dtype, given: dict[str, Any], *, together: bool) -> list[bytes]:
    """Everything that a few steps leave behind, on numbers of many sizes."""
    parameters = [
        nn.Parameter(torch.linspace(-3, 3, size, dtype=dtype, device="cpu").sin_()) for size in TRIED_SIZES
    ]
    optimizer = torch.optim.SGD(parameters, lr=3e-3, **given)
    update: Call = optimizer.step
    for turn in range(TRIED_STEPS):
        for parameter in parameters:
            start = torch.linspace(turn, 9, parameter.numel(), dtype=dtype, device="cpu")
            parameter.grad = start.cos_().mul_(10.0 ** (turn - 3))
        if together and turn == 1:
            chunks = _stepped(optimizer)
            if not chunks:
                return []
            update = _together(optimizer, chunks)
        update()
    kept = [
        state["momentum_buffer"]
        for state in optimizer.state.values()
        if state.get("momentum_buffer") is not None
    ]
    return [tensor.detach().numpy().tobytes() for tensor in (*parameters, *kept)]
