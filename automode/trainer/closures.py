"""Optimizers that evaluate the loss themselves, as often as they like: LBFGS, and every other whose ``step`` needs a closure."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automode.trainer.gradient_norms import grad_norms, total_norm
from automode.trainer.step_hooks import Guarded
from automode.trainer.steps import Taken
from automode.trainer.trunk import Trunk


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether ``optimizer.step`` cannot be called without a closure."""
    try:
        parameters = inspect.signature(type(optimizer).step).parameters
    except (TypeError, ValueError):  # a step written in C says nothing of itself
        return False
    found = parameters.get("closure")
    return found is not None and found.default is inspect.Parameter.empty


class _Evaluated(NamedTuple):
    loss: Tensor
    outputs: Any
    targets: Any
    norm: Any


class ClosureStep:
    """``optimizer.step(closure)``, where the closure is zero_grad, forward, loss, backward and clipping where asked for.

    What is recorded is the first evaluation of a step: loss, gradient norm, outputs. With the guard on, a step whose first loss
    or gradient is not finite is not made, and one that leaves weights that are not finite is taken back, with the
    optimizer's state.

    Args:
        trunk: What is trained.
        guarded: Says whether the guard is on.

    Attributes:
        began: Whether the optimizer has begun to write in this step.
    """

    def __init__(self, trunk: Trunk, guarded: Guarded) -> None:
        self._trunk = trunk
        self._guarded = guarded
        self.began = False

    def close(self) -> None:
        """Nothing was hung on the optimizer."""

    def state(self) -> dict[str, Any]:
        """Nothing is kept from step to step that the optimizer does not keep."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept from step to step."""

    def __call__(self, batch: Any, epoch: int) -> Taken:
        """Train on one batch."""
        self.began = False
        optimizer, guard = self._trunk.optimizer, self._guarded.guard
        first = self._evaluate(batch)
        if guard and (why := _why_not(first)):
            return self._skipped(first, why)
        waiting: list[Tensor] = [first.loss]

        def closure() -> Tensor:
            return waiting.pop() if waiting else self._evaluate(batch).loss

        before = self._kept() if guard else None
        self.began = True
        optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, and its own LBFGS calls float() on it
        if before is not None and not self._finite():
            self._put_back(before)
            return self._skipped(first, "the optimizer left weights that are not finite")
        return Taken(
            first.loss.detach(), first.norm, True, True, False, first.outputs, first.targets, None, ""
        )

    def _evaluate(self, batch: Any) -> _Evaluated:
        trunk = self._trunk
        trunk.optimizer.zero_grad(set_to_none=True)
        with trunk.autocast():
            loss, outputs, targets = trunk.step_fn(trunk.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        limits = [limit for limit in (trunk.clip_norm, trunk.cap_norm) if limit is not None]
        norm: Any
        if limits:
            norm = torch.nn.utils.clip_grad_norm_(trunk.model.parameters(), min(limits))
        else:
            norm = grad_norms(trunk.parameters)
        return _Evaluated(loss, outputs, targets, norm)

    def _kept(self) -> tuple[list[Tensor], dict[str, Any]]:
        trunk = self._trunk
        return [p.detach().clone() for p in trunk.parameters], copy.deepcopy(trunk.optimizer.state_dict())

    @torch.no_grad()
    def _put_back(self, kept: tuple[list[Tensor], dict[str, Any]]) -> None:
        for parameter, value in zip(self._trunk.parameters, kept[0], strict=True):
            parameter.copy_(value)
        self._trunk.optimizer.load_state_dict(kept[1])

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self._trunk.parameters)

    def _skipped(self, first: _Evaluated, why: str) -> Taken:
        loss = first.loss.detach()
        return Taken(loss, first.norm, False, False, False, first.outputs, first.targets, None, why)


def _why_not(first: _Evaluated) -> str:
    value = float(first.loss.detach())
    total = float(total_norm(first.norm) if isinstance(first.norm, list) else first.norm)
    if not math.isfinite(value):
        return f"the loss is {value}"
    return "" if math.isfinite(total) else f"the gradient norm is {total}"
