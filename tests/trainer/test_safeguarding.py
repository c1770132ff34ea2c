"""Good states: exact copies that training does not reach, and a trunk that goes back without turning back its clock."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from automode.engine import State, initial
from automode.errors import NotExecutableError
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.events import Rewind, SetClip, SetLearningRate
from automode.planner.policy import SafeguardPolicy
from automode.trainer.safeguarding import GoodStates
from automode.trainer.steps import DefaultStep, OwnStep, Scaler, pair_step
from automode.trainer.trunk import Trunk, trainable


class On:
    guard = True


def act(budget: int = 80) -> State:
    """A fold's state of a run in act mode that is healthy."""
    state = initial()
    state.mode = "act"
    state.planning_budget = budget
    return state


class Script:
    """A trunk that trains."""

    def __init__(self, optimizer: str = "adam", *, averages: bool = True, schedule: Any = None) -> None:
        torch.manual_seed(0)
        cpu, loss = torch.device("cpu"), nn.CrossEntropyLoss()
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        parameters = model.parameters()
        made: torch.optim.Optimizer = (
            torch.optim.Adam(parameters, lr=0.01)
            if optimizer == "adam"
            else torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        )
        self.trunk = Trunk(
            model=model,
            optimizer=made,
            scheduler=None if schedule is None else schedule(made),
            step_fn=pair_step(loss, cpu),
            loss_fn=loss,
            device=cpu,
        )
        if averages:
            self.trunk.averages = TrajectoryAverages(trainable(model), 100, every=1)
        self.step = DefaultStep(self.trunk, Scaler("cpu", enabled=False), On())
        self.batch = (torch.randn(16, 4), torch.randint(0, 3, (16,)))

    def train(self, n: int, batch: Any = None) -> list[str]:
        """Make steps; returns why each was left out."""
        trunk = self.trunk
        why = []
        for _ in range(n):
            taken = self.step(batch or self.batch, 0)
            if taken.pending:
                trunk.optimizer.step()
                trunk.step += 1
                if trunk.scheduler is not None:
                    trunk.scheduler.step()
                if trunk.averages is not None:
                    trunk.averages.update(trainable(trunk.model), trunk.step)
            why.append(taken.skipped)
        return why

    def memory(self) -> list[Tensor]:
        """What a rewind puts back, as a copy."""
        trunk = self.trunk
        state = trunk.optimizer.state_dict()["state"]
        moments = [v for s in state.values() for v in s.values() if isinstance(v, Tensor)]
        found = [*trunk.model.state_dict().values(), *moments]
        if trunk.averages is not None:
            found += [t for a in trunk.averages.state_dict()["averages"].values() for t in a.values()]
        return [t.detach().clone() for t in found]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def back(to: int, factor: float = 0.5) -> Rewind:
    return Rewind(to_step=to, rate_factor=factor, why="to see")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_going_back_restores_weights_moments_and_averages_bit_by_bit_however_often(optimizer: str) -> None:
    script = Script(optimizer)
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=10))
    script.train(10)
    good.keep(act(), 10)
    kept = script.memory()
    for _ in range(2):  # twice: training on must not write into what is kept
        script.train(15)
        assert not equal(script.memory(), kept)
        answer = good.rewind(back(12), script.trunk.step)
        assert equal(script.memory(), kept)
        assert answer.to_step == 10
        assert answer.step == script.trunk.step
        assert all(p.grad is None for p in script.trunk.parameters)
    assert script.trunk.step == 40  # the clock goes on
    assert script.trunk.averages is not None
    assert script.trunk.averages.state_dict()["last_step"] == 40
    script.train(3)


def test_going_back_leaves_how_often_averages_are_read() -> None:
    script = Script()
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=10))
    assert script.trunk.averages is not None
    script.trunk.averages.every = 2  # as while a card is judged by the tail since its fork
    script.train(10)
    good.keep(act(), 10)
    script.trunk.averages.every = 32
    script.train(5)
    good.rewind(back(12), script.trunk.step)
    assert script.trunk.averages.every == 32


def test_keeping_a_state_touches_nothing() -> None:
    script, other = Script(), Script()
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=1))
    for step in range(8):
        good.keep(act(), step)
        script.train(1)
        other.train(1)
    assert equal(script.memory(), other.memory())


def test_the_state_before_the_first_step_has_no_moments_to_go_back_to() -> None:
    script = Script("sgd")
    good = GoodStates(script.trunk, SafeguardPolicy())
    good.keep(act(), 0)
    before = script.trunk.weights()
    script.train(5)
    good.rewind(back(0), 5)
    assert all(torch.equal(script.trunk.weights()[k], v) for k, v in before.items())
    assert not any(script.trunk.optimizer.state.values())
    script.train(2)


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=100),
    ],
)
def test_rates_go_on_at_the_schedules_clock_times_the_factor_for_good(schedule: Any) -> None:
    script, plain = Script(schedule=schedule), Script(schedule=schedule)
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=5))
    script.train(5)
    good.keep(act(), 5)
    script.train(15)
    plain.train(20)
    answer = good.rewind(back(20), 20)
    assert answer.rates == pytest.approx([0.5 * r for r in plain.trunk.rates()])
    script.train(30)
    plain.train(30)
    assert script.trunk.rates() == pytest.approx([0.5 * r for r in plain.trunk.rates()])


def test_the_latest_state_up_to_the_step_is_taken_and_later_ones_are_dropped() -> None:
    script = Script()
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=10, keep=3))
    for step in range(0, 60, 5):
        good.keep(act(), step)
        script.train(5)
    assert good.steps == (30, 40, 50)
    assert good.rewind(back(45), 60).to_step == 40
    assert good.steps == (30, 40)
    assert good.rewind(back(3), 60).to_step == 30  # else the oldest
    good.restart()
    assert good.steps == ()
    with pytest.raises(NotExecutableError, match="no good state is kept"):
        good.rewind(back(45), 60)


def test_states_come_at_fixed_steps_and_only_in_act_mode_while_the_run_is_healthy() -> None:
    script = Script()
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=10, keep=9))
    watching, ill = act(), act()
    watching.mode = "observe"
    ill.guards.level.since = 3
    for step in (0, 10):
        good.keep(watching, step)
        good.keep(ill, step)
    assert good.steps == ()
    for step in (14, 16, 20, 28, 41):
        good.keep(act(), step)
    assert good.steps == (14, 20, 41)


def test_weights_that_are_not_finite_are_no_good_state() -> None:
    script = Script()
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=1))
    with torch.no_grad():
        script.trunk.parameters[0][0, 0] = math.inf
    good.keep(act(), 1)
    assert good.steps == ()


def test_memory_is_bounded_and_a_state_that_does_not_fit_is_refused_with_the_numbers() -> None:
    script = Script()
    script.train(1)
    size = 0.002  # MiB: some hundred numbers, thrice for Adam and thrice for the averages
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=1, keep=50, keep_mib=3 * size))
    for step in range(1, 9):
        good.keep(act(), step)
    assert 1 <= len(good.steps) < 8
    small = GoodStates(script.trunk, SafeguardPolicy(keep_mib=1e-6))
    with pytest.warns(UserWarning, match="cannot put this run back"):
        small.keep(act(), 1)
    small.keep(act(), 50)  # told once
    with pytest.raises(NotExecutableError, match="keep_mib allows"):
        small.rewind(back(1), 2)


def test_the_rate_alone_can_be_set() -> None:
    script = Script()
    good = GoodStates(script.trunk, SafeguardPolicy())
    answer = good.set_rate(SetLearningRate(factor=0.25, why="to see"), 3)
    assert answer.rates == script.trunk.rates() == (0.0025,)


@pytest.mark.parametrize(
    ("own", "capped", "norm"), [(None, 1e-3, 1e-3), (1e-2, 1e-3, 1e-3), (1e-3, 1e-2, 1e-3)]
)
def test_a_cap_binds_beside_the_users_own_clipping(own: float | None, capped: float, norm: float) -> None:
    script = Script()
    script.trunk.clip_norm = own
    good = GoodStates(script.trunk, SafeguardPolicy())
    good.set_clip(SetClip(norm=capped, why="spikes"), 1)
    script.step(script.batch, 0)
    total = nn.utils.get_total_norm([p.grad for p in script.trunk.parameters if p.grad is not None])
    assert float(total) == pytest.approx(norm, rel=1e-3)
    good.set_clip(SetClip(norm=None, why="calm"), 2)
    script.step(script.batch, 0)
    total = nn.utils.get_total_norm([p.grad for p in script.trunk.parameters if p.grad is not None])
    assert float(total) == pytest.approx(own, rel=1e-3) if own else float(total) > 1e-2


def test_a_cap_binds_in_a_users_own_step_too() -> None:
    script = Script()
    trunk = script.trunk
    norms: list[float] = []

    def own(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        state["optimizer"].zero_grad()
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        loss.backward()
        state["optimizer"].step()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in trunk.parameters if p.grad is not None])))
        return {"loss": loss}

    step = OwnStep(own, trunk, Scaler("cpu", enabled=False), On())
    try:
        trunk.cap_norm = 1e-3
        step(script.batch, 0)
        trunk.cap_norm = None
        step(script.batch, 0)
    finally:
        step.close()
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] > 1e-2


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_batch_that_is_left_out_leaves_no_trace_in_norm_statistics(value: float) -> None:
    script = Script()
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=10))
    script.train(20)
    good.keep(act(), 20)
    norm = script.trunk.model[1]
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    bad = (torch.full((16, 4), value), script.batch[1])
    with torch.no_grad():
        script.trunk.model(bad[0])  # what the forward pass of a batch does before anything can be known of it
    assert (
        not torch.isfinite(norm.running_var).all()
        or (norm.running_mean - before["running_mean"]).abs().max() > 1e3
    )
    assert good.mend() == 1
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in before.items())
    assert good.mend() == 0


def test_norm_statistics_that_can_be_believed_are_left_alone() -> None:
    script = Script()
    good = GoodStates(script.trunk, SafeguardPolicy(keep_every=10))
    script.train(20)
    good.keep(act(), 20)
    script.train(15, (2.0 * torch.randn(16, 4) + 0.5, script.batch[1]))
    before = script.trunk.weights()
    assert good.mend() == 0
    assert all(torch.equal(script.trunk.weights()[k], v) for k, v in before.items())
