"""One training step over several batches: gradients add up, and the optimizer steps once for the group.

What is trained on is the mean of the batches' losses, as with Lightning's ``accumulate_grad_batches``: each loss is divided by
the size of a full group, an epoch's last batch ends its group, and the loss that is recorded is undivided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from automode.trainer.gradient_norms import grad_norms, total_norm
from automode.trainer.step_hooks import Guarded
from automode.trainer.steps import OVERFLOWED, Scaler, Taken
from automode.trainer.trunk import Trunk


class AccumulatingStep:
    """zero_grad, then forward, loss / every, backward for each batch of a group; norm, clipping and optimizer step at its end.

    The gradient norm of a batch within a group is that of the mean gradient so far, so that it can be compared with others.
    With the guard on, a group that meets a loss or gradient that is not finite is dropped, and the next batch begins another.

    Args:
        trunk: What is trained.
        scaler: Scales the loss of fp16; disabled otherwise.
        guarded: Says whether the guard is on.
        every: Batches of a full group, at least 2.
        last: Tells whether the batch at hand is the last of its epoch.

    Attributes:
        began: Whether the optimizer has begun to write in this step; a pending one has not.
    """

    def __init__(
        self, trunk: Trunk, scaler: Scaler, guarded: Guarded, *, every: int, last: Callable[[], bool]
    ) -> None:
        self._trunk = trunk
        self._scaler = scaler
        self._guarded = guarded
        self._every = every
        self._last = last
        self._clipped = list(trunk.model.parameters())
        self._gathered = 0
        self._applied = 0
        self.began = False
        self._hook = trunk.optimizer.register_step_post_hook(self._after) if scaler.is_enabled() else None

    def close(self) -> None:
        """Take the hook off the optimizer."""
        if self._hook is not None:
            self._hook.remove()

    def state(self) -> dict[str, Any]:
        """The scaler's state and the place in the group, for :meth:`load`; gradients are stored with the weights."""
        return {"scaler": self._scaler.state_dict(), "gathered": self._gathered}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        if state["scaler"]:  # empty where the run did not scale when it was cut
            self._scaler.load_state_dict(state["scaler"])
        self._gathered = int(state["gathered"])

    def __call__(self, batch: Any, epoch: int) -> Taken:
        """Train on one batch."""
        self.began = False
        trunk, scaler = self._trunk, self._scaler
        # Weights that were put back took the gradients of those before them along: the group begins again.
        if self._gathered and all(parameter.grad is None for parameter in trunk.parameters):
            self._gathered = 0
        if not self._gathered:
            trunk.optimizer.zero_grad(set_to_none=True)
        with trunk.autocast():
            loss, outputs, targets = trunk.step_fn(trunk.model, batch)
        scaler.scale(loss / self._every).backward()  # type: ignore[no-untyped-call]
        self._gathered += 1
        if self._gathered < self._every and not self._last():
            return self._gathering(loss, outputs, targets)
        self._gathered = 0
        if scaler.is_enabled():
            return self._scaled(loss, outputs, targets)
        norm: Any = self._clip()
        if norm is None:
            norm = grad_norms(trunk.parameters)
        if self._guarded.guard:
            norm, why = _judged(loss, norm)
            if why:
                return Taken(loss, norm, False, False, False, outputs, targets, None, why)
        return Taken(loss, norm, True, True, True, outputs, targets, None, "")

    def _gathering(self, loss: Any, outputs: Any, targets: Any) -> Taken:
        """A batch within a group: nothing is written to the weights."""
        to_mean = self._every / self._gathered
        if self._scaler.is_enabled():
            to_mean /= self._scaler.get_scale()
        norms: Any = [norm * to_mean for norm in grad_norms(self._trunk.parameters)]
        if self._guarded.guard and not self._scaler.is_enabled():
            norms, why = _judged(loss, norms)
            if why:
                self._gathered = 0
                return Taken(loss, norms, False, False, False, outputs, targets, None, why)
        return Taken(loss, norms, True, False, False, outputs, targets, None, "")

    def _scaled(self, loss: Any, outputs: Any, targets: Any) -> Taken:
        """Leave it to the scaler whether to step: it must see an overflow to lower its scale."""
        self._scaler.unscale_(self._trunk.optimizer)
        norm = self._clip()
        if norm is None:
            norm = grad_norms(self._trunk.parameters)
        before = self._applied
        self.began = True
        self._scaler.step(self._trunk.optimizer)
        self._scaler.update()
        applied = self._applied > before
        why = "" if applied else OVERFLOWED
        return Taken(loss, norm, applied, applied, False, outputs, targets, None, why)

    def _clip(self) -> Any:
        """Clip where that was asked for; returns the norm before it, None where it was not."""
        limits = [limit for limit in (self._trunk.clip_norm, self._trunk.cap_norm) if limit is not None]
        return torch.nn.utils.clip_grad_norm_(self._clipped, min(limits)) if limits else None

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._applied += 1


def _judged(loss: Any, norm: Any) -> tuple[float, str]:
    """Tell the gradient norm, and why the step must not be made (empty: it may)."""
    total = float(total_norm(norm) if isinstance(norm, list) else norm)
    value = float(loss.detach())
    if not math.isfinite(value):
        return total, f"the loss is {value}"
    return total, "" if math.isfinite(total) else f"the gradient norm is {total}"
