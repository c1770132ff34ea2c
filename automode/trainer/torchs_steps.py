"""What the quick steps of torch's own optimizers have in common: who may be listening, and whose code a method is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim import optimizer as optimizer_module

Call = Callable[[], Any]

DTYPES = (torch.float32, torch.float64)
TOGETHER_BYTES = 1 << 18
"""Parameters that step together: a pass over more than this for each operation would fall out of the cache."""

TRIED_SIZES = (1, 7, 33, 1030)
TRIED_STEPS = 4


def heard(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks or the profiler are to hear of steps; torch has no public name for either."""
    return bool(
        optimizer._optimizer_step_pre_hooks  # noqa: SLF001
        or optimizer._optimizer_step_post_hooks  # noqa: SLF001
        or optimizer_module._global_optimizer_pre_hooks  # noqa: SLF001
        or optimizer_module._global_optimizer_post_hooks  # noqa: SLF001
        or _profiler_enabled()
    )


def is_torchs(method: Any) -> bool:
    """Whether a method, with everything that is wrapped around it, is the own code of torch's optimizers and schedulers.

    Args:
        method: Bound or not.
    """
    function = getattr(method, "__func__", method)
    while function is not None:
        where = getattr(function, "__globals__", {}).get("__name__", "")
        if not where.startswith("torch.optim."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def clearing_of(optimizer: torch.optim.Optimizer) -> Call:
    """What forgets the gradients, for as long as nobody changes the optimizer's groups.

    Args:
        optimizer: Any.

    Returns:
        A function without arguments that does what ``zero_grad(set_to_none=True)`` does.
    """
    own = functools.partial(optimizer.zero_grad, set_to_none=True)
    if not is_torchs(optimizer.zero_grad):
        return own
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def clear() -> None:
        if _profiler_enabled():  # torch tells it
            own()
            return
        for parameter in parameters:
            parameter.grad = None

    return clear
