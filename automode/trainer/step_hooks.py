"""What an optimizer does in somebody else's code, followed through its hooks: when it steps, on which gradients, and whether it may.

With the guard on, gradients that are not finite are dropped when the optimizer is about to step, which makes that step a no-op;
the code around it runs on as it stands. Without it nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from automode.trainer.gradient_norms import grad_norms, total_norm
from automode.trainer.trunk import Trunk

Norm = float | Tensor | Sequence[Tensor]
"""Norm of all gradients, or those of the single gradients."""


class Guarded(Protocol):
    """Says whether the guard is on."""

    @property
    def guard(self) -> bool:
        """Whether a loss or gradient that is not finite must not reach the weights."""
        ...


class StepHooks:
    """Watches an optimizer step, and keeps from the weights what must not reach them.

    Args:
        trunk: What is trained.
        guarded: Says whether the guard is on.
        take: Takes the gradients' norm where the guard does not need to know it; None: the norms of the single gradients.
        stepped: Called after each step; None: nobody wants to know.

    Attributes:
        steps: Steps that the optimizer has been through so far, dropped ones included.
        began: Whether it has begun to write since :meth:`begin`.
        norm: Norm of the gradients that it stepped on last; None: it has not since :meth:`begin`.
        skipped: Why the guard dropped them; empty where it did not.
        loss: Tells the loss of the step that runs, where that is known already, for the guard; None: it is not.
    """

    def __init__(
        self,
        trunk: Trunk,
        guarded: Guarded,
        *,
        take: Callable[[], Norm] | None = None,
        stepped: Callable[[], None] | None = None,
    ) -> None:
        self.steps = 0
        self.began = False
        self.norm: Norm | None = None
        self.skipped = ""
        self.loss: Callable[[], float | None] = _unknown
        self._trunk = trunk
        self._guarded = guarded
        self._take: Callable[[], Norm] = take or (lambda: grad_norms(trunk.parameters))
        self._stepped = stepped
        self._hooks = (
            trunk.optimizer.register_step_pre_hook(self._before),
            trunk.optimizer.register_step_post_hook(self._after),
        )

    def begin(self) -> None:
        """Know that the next step is another one."""
        self.began, self.norm, self.skipped = False, None, ""

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.began = True
        if not self._guarded.guard:
            self.norm = self._take()
            return
        norm = self.norm = float(total_norm(grad_norms(self._trunk.parameters)))
        loss, cap = self.loss(), self._trunk.cap_norm
        if loss is not None and not math.isfinite(loss):
            self._drop(f"the loss is {loss}")
        elif not math.isfinite(norm):
            self._drop(f"the gradient norm is {norm}")
        elif cap is not None and norm > cap:
            torch.nn.utils.clip_grad_norm_(self._trunk.parameters, cap)

    def _drop(self, why: str) -> None:
        self.skipped = why
        for parameter in self._trunk.parameters:
            parameter.grad = None

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if self._stepped is not None:
            self._stepped()


def _unknown() -> float | None:
    """Nobody has told the loss yet."""
    return None
