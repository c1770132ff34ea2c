"""A learning rate that a person orders: the factor that makes it, and what is told of it."""

from __future__ import annotations

import torch

from automode.errors import NotExecutableError
from automode.planner.controls import Order, SetArguments
from automode.planner.events import SetLearningRate
from automode.trainer.driver import Driver
from automode.trainer.trunk import Trunk


def factor_of(asked: SetArguments, trunk: Trunk) -> float | None:
    """Give the factor on all rates that an order means; None where it is about none.

    Raises:
        NotExecutableError: No factor makes the rate asked for.
    """
    if asked.lr is None:
        return asked.lr_mul
    now = trunk.rates()[0]
    if now <= 0.0:
        raise NotExecutableError(
            f"the learning rate is {now:g} now, so that no factor makes it {asked.lr:g}; set it once the schedule has raised it"
        )
    return asked.lr / now


def set_rates(
    driver: Driver, trunk: Trunk, factor: float, rate: float | None, order: Order
) -> tuple[float, ...]:
    """Multiply the rates, for good, and record who asked for it.

    Args:
        driver: The run's log.
        trunk: What is trained.
        factor: On every rate.
        rate: What the first group's is to be, to the last bit; None: what the factor makes it.
        order: Who asks.

    Returns:
        The rates from here on.
    """
    before = trunk.rates()
    why = order.note or f"asked for by {order.actor}"
    done = driver.performer.good.set_rate(SetLearningRate(factor=factor, why=why), trunk.step)
    if rate is not None:
        # A product of floats may miss the number asked for by its last bit.
        for group, old in zip(trunk.optimizer.param_groups, before, strict=True):
            if old == before[0] and not isinstance(group["lr"], torch.Tensor):
                group["lr"] = rate
    told = done.model_copy(update={"rates": trunk.rates(), "actor": order.actor})
    driver.scribe.feed(told, effective_at=trunk.step)
    return trunk.rates()
