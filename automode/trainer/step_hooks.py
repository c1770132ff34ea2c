"""What an optimizer does in somebody else's code, followed through its hooks: when it steps, on which gradients, and whether it may.

With the guard on, gradients that are not finite are dropped when the optimizer is about to step, which makes that step a no-op;
the code around it runs on as it stands. Without it nothing is written. Steps by closure are followed, and neither guarded nor clipped.
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


class Holder(Protocol):
    """Takes norms, or holds gradients, by the number of the row that they belong to."""

    @property
    def rows(self) -> int:
        """Rows so far: the number of the next one."""
        ...

    @property
    def take(self) -> Callable[[int], float | Tensor]:
        """Take the norm of the gradients as they are now; NaN where they are held."""
        ...


class StepHooks:
    """Watches an optimizer step, and keeps from the weights what must not reach them.

    Args:
        trunk: What is trained.
        guarded: Says whether the guard is on.
        take: Takes the gradients' norm where the guard does not need to know it, once between two calls of :meth:`begin`; None: the
            norms of the single gradients, at each step anew.
        clips: Whether the trunk's ``clip_norm`` is to be kept here; no: whoever steps the optimizer does.

    Attributes:
        steps: Steps that the optimizer has been through so far, dropped ones included.
        began: Whether it has begun to write since :meth:`begin`.
        norm: Norm of the gradients that it stepped on last; None: it has not since :meth:`begin`.
        skipped: Why the guard dropped them; empty where it did not.
        due: Whether :meth:`ready` was called and no step has followed: a gradient scaler has left it out.
        rates: Learning rate of each parameter group at the last step: by the next look a schedule may have changed it.
        stepped: Called after each step; None: nobody wants to know.
        loss: Tells the loss of the step that runs, where that is known already, for the guard; None: it is not.
        held: Where the norm is taken in place of ``take``; whoever sets it knows that nothing is guarded or clipped. None: nobody.
    """

    def __init__(
        self,
        trunk: Trunk,
        guarded: Guarded,
        *,
        take: Callable[[], Norm] | None = None,
        clips: bool = False,
    ) -> None:
        self.steps = 0
        self.began = False
        self.norm: Norm | None = None
        self.skipped = ""
        self.due = False
        self.rates: tuple[float, ...] = ()
        self.stepped: Callable[[], None] | None = None
        self.loss: Callable[[], float | None] = _unknown
        self.held: Holder | None = None
        self._trunk = trunk
        self._guarded = guarded
        self._take: Callable[[], Norm] = take or (lambda: grad_norms(trunk.parameters))
        self._clips = clips
        self._first = take is not None
        self._groups = len(trunk.optimizer.param_groups)
        self._hooks = (
            trunk.optimizer.register_step_pre_hook(self._before),
            trunk.optimizer.register_step_post_hook(self._after),
        )

    def begin(self) -> None:
        """Know that the next step is another one."""
        self.began, self.norm, self.skipped, self.due = False, None, "", False

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.began = True
        held = self.held
        if (
            held is not None
            and len(args) == 1
            and not kwargs
            and not self.due
            and len(optimizer.param_groups) == self._groups
        ):
            self.due = True
            if self.norm is None:
                self.norm = held.take(held.rows)
            return
        if len(optimizer.param_groups) != self._groups:  # one was added, as parameters are thawed say
            self._groups = len(optimizer.param_groups)
            self._trunk.follow()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # A closure makes the gradients itself: they can be looked at afterwards, or by whoever knows when they are there.
        if closure is None and not self.due:
            self.ready()

    def ready(self) -> None:
        """Know that the gradients are what the optimizer is about to step on; where they must not reach the weights, they are dropped.

        Called by the optimizer's own hook, or before it by whoever knows better.
        """
        self.due = True
        trunk = self._trunk
        clip, cap = trunk.clip_norm if self._clips else None, trunk.cap_norm
        if clip is None and not self._guarded.guard:
            if self.norm is None or not self._first:
                self.norm = self._take()
            return
        norm = self.norm = float(total_norm(grad_norms(trunk.parameters)))
        largest = cap if clip is None else clip if cap is None else min(clip, cap)
        if self._guarded.guard and self._must_not(norm):
            for parameter in trunk.parameters:
                parameter.grad = None
        elif largest is not None and norm > largest:
            torch.nn.utils.clip_grad_norm_(trunk.parameters, largest)

    def _must_not(self, norm: float) -> bool:
        """Whether the step must not be made, and say why in :attr:`skipped`."""
        loss = self.loss()
        if loss is not None and not math.isfinite(loss):
            self.skipped = f"the loss is {loss}"
        elif not math.isfinite(norm):
            self.skipped = f"the gradient norm is {norm}"
        return bool(self.skipped)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.steps += 1
        self.due = False
        if self.norm is None:
            self.norm = self._take()
        groups = self._trunk.optimizer.param_groups
        if len(groups) == 1:
            self.rates = (float(groups[0]["lr"]),)
        else:
            self.rates = tuple([float(group["lr"]) for group in groups])
        if self.stepped is not None:
            self.stepped()


def _unknown() -> float | None:
    """Nobody has told the loss yet."""
    return None
