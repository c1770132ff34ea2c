"""The schedule is stepped as asked, and a charged clock brings it to the end that the user planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    MultiStepLR,
    ReduceLROnPlateau,
    StepLR,
)

from automode.errors import UsageError
from automode.trainer.schedule import Interval, Schedule, check_schedule, known_drops


def optimizer_of(rate: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


def counter(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda tick: 1.0 + tick)


def stepped(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def ticks_of(scheduler: LambdaLR) -> int:
    return int(scheduler.last_epoch)


def test_per_step_and_per_epoch_tick_when_they_are_told_and_never_otherwise() -> None:
    for interval, after_step, after_epoch in (("step", 1, 1), ("epoch", 0, 1), ("manual", 0, 0)):
        optimizer = optimizer_of()
        schedule = Schedule(counter(optimizer), interval, steps_per_epoch=4)  # type: ignore[arg-type]
        stepped(optimizer)
        if schedule.every_step:
            schedule.after_step()
        assert ticks_of(schedule.scheduler) == after_step
        schedule.after_epoch(4, 0.0)
        schedule.charge(4, 3.0)
        schedule.validated(0.5)
        assert ticks_of(schedule.scheduler) == after_epoch
        assert schedule.ticks == after_epoch


def test_a_charged_cosine_ends_at_zero_although_a_fifth_of_the_steps_was_spent_elsewhere() -> None:
    optimizer, total, spent = optimizer_of(), 100, 0.0
    schedule = Schedule(CosineAnnealingLR(optimizer, total), "step", charged=True)
    for step in range(1, 81):
        stepped(optimizer)
        schedule.after_step()
        if step % 20 == 0:
            spent += 5.0
            schedule.charge(step, spent)
    assert schedule.ticks == total
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_charged_epoch_clock_ticks_where_training_and_spending_fill_an_epoch() -> None:
    optimizer = optimizer_of()
    advanced: list[int] = []
    schedule = Schedule(
        counter(optimizer), "epoch", steps_per_epoch=10, charged=True, advanced=advanced.append
    )
    stepped(optimizer)
    schedule.charge(9, 0.9)
    assert (schedule.ticks, advanced) == (0, [])
    schedule.charge(9, 1.0)
    assert (schedule.ticks, advanced) == (1, [1])
    schedule.after_epoch(10, 1.0)
    assert (schedule.ticks, advanced) == (1, [1])
    schedule.after_epoch(20, 1.0)
    assert (schedule.ticks, advanced) == (2, [1])
    schedule.charge(25, 16.0)
    assert (schedule.ticks, advanced) == (4, [1, 2])


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_charged_clock_without_charges_is_the_plain_clock(interval: Interval) -> None:
    rates = []
    for charged in (False, True):
        optimizer = optimizer_of()
        schedule = Schedule(counter(optimizer), interval, steps_per_epoch=3, charged=charged)
        seen = []
        for step in range(1, 13):
            stepped(optimizer)
            if schedule.every_step:
                schedule.after_step()
            schedule.charge(step, 0.0)
            seen.append(optimizer.param_groups[0]["lr"])
            if step % 3 == 0:
                schedule.after_epoch(step, 0.0)
        rates.append((seen, optimizer.param_groups[0]["lr"]))
    assert rates[0][1] == rates[1][1]
    if interval == "step":
        assert rates[0] == rates[1]
    # An epoch clock that is asked at the epoch's last step ticks then; no step is trained in between.
    assert [rates[0][0][i] for i in (0, 1, 3, 4)] == [rates[1][0][i] for i in (0, 1, 3, 4)]


def test_an_epoch_clock_of_unknown_length_is_never_charged() -> None:
    optimizer = optimizer_of()
    schedule = Schedule(counter(optimizer), "epoch", steps_per_epoch=None, charged=True)
    stepped(optimizer)
    schedule.charge(50, 1000.0)
    assert schedule.ticks == 0
    schedule.after_epoch(50, 1000.0)
    assert schedule.ticks == 1


def test_a_plateau_schedule_gets_the_validation_loss_and_nothing_else() -> None:
    optimizer = optimizer_of()
    schedule = Schedule(ReduceLROnPlateau(optimizer, factor=0.1, patience=0), "epoch", steps_per_epoch=2)
    stepped(optimizer)
    schedule.validated(1.0)
    schedule.after_epoch(2, 0.0)
    schedule.charge(2, 50.0)
    assert optimizer.param_groups[0]["lr"] == 1.0
    schedule.validated(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def drops_by_simulation(scheduler: Any, optimizer: Any, per_tick: int, total: int) -> tuple[int, ...]:
    drops = []
    for step in range(1, total):
        stepped(optimizer)
        before = optimizer.param_groups[0]["lr"]
        if step % per_tick == 0:
            scheduler.step()
        if optimizer.param_groups[0]["lr"] < before * 0.999:
            drops.append(step)
    return tuple(drops)


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize(("interval", "per_tick"), [("step", 1), ("epoch", 7)])
@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: StepLR(optimizer, 4, 0.5),
        lambda optimizer: StepLR(optimizer, 2, 2.0),
        lambda optimizer: MultiStepLR(optimizer, [2, 5, 6, 11], 0.1),
    ],
)
def test_known_drops_are_the_drops_that_come(
    make: Any, interval: Interval, per_tick: int, taken: int
) -> None:
    optimizer = optimizer_of()
    scheduler = make(optimizer)
    stepped(optimizer)
    for _ in range(taken):
        scheduler.step()
    known = known_drops(scheduler, interval, 7, 60)
    assert known == drops_by_simulation(scheduler, optimizer, per_tick, 60)


def test_other_schedules_unknown_lengths_and_the_users_own_stepping_have_no_known_drops() -> None:
    step_lr = StepLR(optimizer_of(), 2, 0.5)
    assert known_drops(None, "epoch", 10, 100) == ()
    assert known_drops(ExponentialLR(optimizer_of(), 0.9), "epoch", 10, 100) == ()
    assert known_drops(step_lr, "epoch", None, 100) == ()
    assert known_drops(step_lr, "epoch", 10, None) == ()
    assert known_drops(step_lr, "manual", 10, 100) == ()


def test_a_scheduler_that_cannot_be_driven_is_refused_with_what_to_do() -> None:
    optimizer = optimizer_of()
    check_schedule(None, optimizer, "epoch", validates=False)
    check_schedule(StepLR(optimizer, 2), optimizer, "step", validates=False)
    check_schedule(ReduceLROnPlateau(optimizer), optimizer, "epoch", validates=True)
    check_schedule(ReduceLROnPlateau(optimizer), optimizer, "manual", validates=False)
    with pytest.raises(UsageError, match=r"has no step\(\)"):
        check_schedule(0.1, optimizer, "epoch", validates=False)
    with pytest.raises(UsageError, match="another optimizer"):
        check_schedule(StepLR(optimizer_of(), 2), optimizer, "epoch", validates=False)
    with pytest.raises(UsageError, match="pass val_loader"):
        check_schedule(ReduceLROnPlateau(optimizer), optimizer, "epoch", validates=False)
    with pytest.raises(UsageError, match='scheduler_interval="epoch"'):
        check_schedule(ReduceLROnPlateau(optimizer), optimizer, "step", validates=True)


class Remembering(LambdaLR):
    """Keeps a function where its state is taken from."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.told = lambda tick: tick
        super().__init__(optimizer, lambda tick: 1.0)


class Stateless:
    def step(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            Remembering,
            r"the state of the Remembering cannot be stored in a checkpoint: .*Give it a state_dict",
        ),
        (lambda _: Stateless(), r"a Stateless, which has no state_dict\(\)"),
    ],
)
def test_a_scheduler_that_no_checkpoint_could_hold_is_refused_before_training(make: Any, said: str) -> None:
    optimizer = optimizer_of()
    with pytest.raises(UsageError, match=said):
        check_schedule(make(optimizer), optimizer, "epoch", validates=False)
