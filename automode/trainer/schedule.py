"""The user's learning-rate schedule: stepped as asked, by a clock that may also count the compute that automode spent.

With ``budget: within`` automode pays from the run's last steps, so that a cosine that was planned to end with the run
would be cut off. A charged clock therefore counts the steps trained and the steps' worth of compute spent, and the
schedule ends where the user's would have ended.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import MultiStepLR, ReduceLROnPlateau, StepLR

from automode.errors import UsageError
from automode.session.checkpoints import why_not_storable

Interval = Literal["epoch", "step", "manual"]

_SLACK = 1e-9


class Schedule:
    """Steps a scheduler; all of it in the training thread.

    Args:
        scheduler: The user's scheduler, or None.
        interval: When it is stepped: after each ``epoch``, after each optimizer ``step``, or by the user's own training
            step (``manual``: never here).
        steps_per_epoch: Batches of an epoch; None where that is not known, which rules a charged epoch clock out.
        batches_per_step: Batches of an optimizer step, where gradients are accumulated.
        charged: Whether the clock counts compute spent by automode too.
        advanced: Called with the number of ticks each time that spent compute moves the clock.

    Attributes:
        ticks: Times that the scheduler was stepped so far.
    """

    def __init__(
        self,
        scheduler: Any,
        interval: Interval,
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
        charged: bool = False,
        advanced: Callable[[int], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.interval = interval
        self.on_plateau = isinstance(scheduler, ReduceLROnPlateau)
        self.every_step = scheduler is not None and interval == "step"
        self.ticks = 0
        self._steps = 0
        self._per_tick = 1 if interval == "step" else steps_per_epoch
        self._batches_per_step = batches_per_step
        clocked = scheduler is not None and interval != "manual" and not self.on_plateau
        self._charged = charged and clocked and self._per_tick is not None
        self._advanced = advanced

    def after_step(self) -> None:
        """Tick once for an applied optimizer step; called only while :attr:`every_step`."""
        self._steps += 1
        self._tick(1)

    def after_epoch(self, batches: int, spent: float) -> None:
        """Tick for a finished epoch.

        Args:
            batches: Batches trained on since the start.
            spent: As for :meth:`charge`.
        """
        if self._charged:
            self.charge(batches, spent)
        elif self.scheduler is not None and self.interval == "epoch" and not self.on_plateau:
            self._tick(1)

    def validated(self, loss: float) -> None:
        """Give the validation loss to a schedule that waits for plateaus."""
        if self.on_plateau and self.interval == "epoch":
            self.scheduler.step(loss)
            self.ticks += 1

    def charge(self, batches: int, spent: float) -> None:
        """Move a charged clock to where the compute spent has brought it; nothing happens otherwise.

        Args:
            batches: Batches trained on since the start.
            spent: Steps' worth of compute that automode has spent.
        """
        if not self._charged or self._per_tick is None:
            return
        trained = batches
        if self.interval == "step":
            trained, spent = self._steps, spent / self._batches_per_step
        due = math.floor((trained + spent) / self._per_tick + _SLACK) - self.ticks
        if due <= 0:
            return
        unspent = max(0, trained // self._per_tick - self.ticks)
        self._tick(due)
        if self._advanced is not None and due > unspent:
            self._advanced(due - unspent)

    def state(self) -> dict[str, int]:
        """The clock, as plain data for :meth:`load`; the user's scheduler saves itself."""
        return {"ticks": self.ticks, "steps": self._steps}

    def load(self, state: Mapping[str, int]) -> None:
        """Set the clock to what :meth:`state` gave."""
        self.ticks, self._steps = state["ticks"], state["steps"]

    def _tick(self, times: int) -> None:
        for _ in range(times):
            self.scheduler.step()
        self.ticks += times


def check_schedule(
    scheduler: Any, optimizer: torch.optim.Optimizer, interval: Interval, *, validates: bool
) -> None:
    """Refuse a scheduler that cannot be driven as asked, before anything starts.

    Args:
        scheduler: What the user gave, or None.
        optimizer: The optimizer that it must drive.
        interval: When it shall be stepped.
        validates: Whether the run validates.

    Raises:
        UsageError: It is no scheduler, has a state that no checkpoint could hold, drives another optimizer, or waits for a
            validation loss that never comes.
    """
    if scheduler is None:
        return
    if not callable(getattr(scheduler, "step", None)):
        raise UsageError(
            f"scheduler is a {type(scheduler).__name__}, which has no step(); pass a torch.optim.lr_scheduler or None"
        )
    if not callable(getattr(scheduler, "state_dict", None)):
        raise UsageError(
            f"scheduler is a {type(scheduler).__name__}, which has no state_dict(), so that no checkpoint could hold where it stands; "
            "give it state_dict() and load_state_dict(), or step it in a training step of your own"
        )
    why = why_not_storable(scheduler.state_dict())
    if why is not None:
        raise UsageError(
            f"the state of the {type(scheduler).__name__} cannot be stored in a checkpoint: {why}. Give it a state_dict() of containers, "
            "numbers, strings and tensors, and a load_state_dict() that makes the rest anew"
        )
    driven = getattr(scheduler, "optimizer", optimizer)
    if driven is not optimizer:
        raise UsageError(
            "the scheduler drives another optimizer than the one given; build it on the optimizer passed to fit"
        )
    if not isinstance(scheduler, ReduceLROnPlateau) or interval == "manual":
        return
    if interval == "step":
        raise UsageError(
            'ReduceLROnPlateau follows the validation loss, which there is no new one of at every step; use scheduler_interval="epoch"'
        )
    if not validates:
        raise UsageError(
            "ReduceLROnPlateau follows the validation loss, and this run has none; pass val_loader to fit and "
            "val_every_n_epochs=1 to the Trainer"
        )


def known_drops(
    scheduler: Any,
    interval: Interval,
    steps_per_epoch: int | None,
    total: int | None,
    *,
    batches_per_step: int = 1,
) -> tuple[int, ...]:
    """Tell when a ``StepLR`` or ``MultiStepLR`` will drop the rate, which is known before the first step.

    Args:
        scheduler: The user's scheduler, or None; other kinds have no known drops.
        interval: When it is stepped.
        steps_per_epoch: Batches of an epoch, or None.
        total: Steps of the run, or None.
        batches_per_step: Batches of an optimizer step, where gradients are accumulated; an epoch's last may have fewer.

    Returns:
        Optimizer steps, ascending: after that many, the rate is lower. Those from ``total`` on are left out.
    """
    if interval == "manual" or total is None or (interval == "epoch" and steps_per_epoch is None):
        return ()
    if interval == "step" and batches_per_step > 1:
        batches_at = partial(_batches_at, batches_per_step=batches_per_step, steps_per_epoch=steps_per_epoch)
    else:
        batches_at = partial(operator.mul, 1 if interval == "step" else steps_per_epoch)
    ticks: Iterable[int] = ()
    if type(scheduler) is StepLR and scheduler.gamma < 1:
        first = scheduler.step_size - scheduler.last_epoch % scheduler.step_size
        ticks = range(first, total + 1, scheduler.step_size)
    elif type(scheduler) is MultiStepLR and scheduler.gamma < 1:
        ticks = sorted(milestone - scheduler.last_epoch for milestone in scheduler.milestones)
    return tuple(batches for tick in ticks if tick > 0 and (batches := batches_at(tick)) < total)


def _batches_at(steps: int, *, batches_per_step: int, steps_per_epoch: int | None) -> int:
    """Batches trained on when so many optimizer steps, at least one, have been made."""
    if steps_per_epoch is None:
        return steps * batches_per_step
    epochs, rest = divmod(steps - 1, math.ceil(steps_per_epoch / batches_per_step))
    return epochs * steps_per_epoch + min((rest + 1) * batches_per_step, steps_per_epoch)
