"""Diagnostics of a run: nothing of it is touched, and what cannot be had has a reason."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from automode.planner.diagnostics import cost_of, noise_scale, summary
from automode.planner.events import Diagnose, Diagnosed, UpdateSize
from automode.planner.policy import DiagnosticPolicy
from automode.trainer import diagnosing
from automode.trainer.diagnosing import Diagnoser
from automode.trainer.random_state import RandomState
from automode.trainer.sample_source import SampleSource
from automode.trainer.steps import pair_step
from automode.trainer.trunk import Trunk

WHOLE = Diagnose(examples=64, probe=32, iterations=6)


def made(model: nn.Module | None = None, *, optimizer: str = "adam", n: int = 200) -> tuple[Diagnoser, Trunk]:
    torch.manual_seed(0)
    model = model or nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    parameters = list(model.parameters())
    made_ = (
        torch.optim.Adam(parameters, lr=1e-2)
        if optimizer == "adam"
        else torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    )
    cpu = torch.device("cpu")
    loss = nn.CrossEntropyLoss()
    trunk = Trunk(
        model=model, optimizer=made_, scheduler=None, step_fn=pair_step(loss, cpu), loss_fn=loss, device=cpu
    )
    data = TensorDataset(torch.randn(n, 5), torch.randint(0, 3, (n,)))
    source = SampleSource(data, default_collate, cpu)
    for i in range(5):
        made_.zero_grad()
        value, _, _ = trunk.step_fn(model, source.batch(np.arange(i * 16, i * 16 + 16)))
        value.backward()
        made_.step()
    return Diagnoser(trunk=trunk, source=source, train_ids=np.arange(n), seed=3), trunk


def memory(trunk: Trunk) -> list[Any]:
    """Everything that must stay: tensors with their versions and identities, gradients, flags, random states."""
    tensors = [*trunk.model.parameters(), *trunk.model.buffers()]
    state = [v for s in trunk.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    grads = [p.grad for p in trunk.model.parameters() if p.grad is not None]
    return [
        *((id(t), t._version, t.detach().clone(), t.requires_grad) for t in [*tensors, *state, *grads]),
        tuple(m.training for m in trunk.model.modules()),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trunk.model.modules()],
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x == y
        if not isinstance(x, tuple) or not any(isinstance(v, Tensor) for v in x)
        else all(torch.equal(v, w) if isinstance(v, Tensor) else v == w for v, w in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_run_is_touched(training: bool) -> None:
    diagnoser, trunk = made()
    trunk.model.train(training)
    random.seed(1)
    before, rng = memory(trunk), RandomState.capture()
    found = diagnoser.diagnose(WHOLE, 5)
    assert found.missing == {}
    assert same(memory(trunk), before)
    assert RandomState.capture().same_as(rng)
    assert found.passes == 3 * 64 + 6 * 32 * 6


def test_equal_states_give_equal_numbers_and_a_second_reading_goes_on_from_the_first() -> None:
    first, again = (made()[0].diagnose(WHOLE, 5) for _ in range(2))
    assert first == again
    diagnoser, _ = made(optimizer="sgd")
    for _ in range(6):
        found = diagnoser.diagnose(WHOLE, 5)
    assert found.residual is not None
    assert found.residual < 0.1
    assert found.sharpness is not None
    assert found.stability == pytest.approx(found.sharpness * 1e-2 / (2 * 1.9))


class Stubborn(nn.Module):
    """A network in which something goes wrong."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.layer = nn.Linear(5, 3)
        self.trained = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        self.trained += 1
        if self.trained <= 5:
            return out
        if self.what == "nan":
            return out * float("nan")
        if self.what == "raises":
            raise RuntimeError("only five times")
        if self.what == "no way back":
            return out.detach() + 0.0 * out.sum().detach()
        return out


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("nan", "the loss is nan"),
        ("raises", "RuntimeError: only five times"),
        ("no way back", "RuntimeError"),
    ],
)
def test_what_cannot_be_had_has_a_reason_and_no_number(what: str, why: str) -> None:
    diagnoser, _ = made(Stubborn(what))
    found = diagnoser.diagnose(WHOLE, 5)
    assert set(found.missing) == {"noise_scale", "sharpness"}
    assert all(why in reason for reason in found.missing.values()), found.missing
    assert found.sharpness is None
    assert found.gradient_variance is None
    assert found.passes == 0.0
    assert found.updates  # what needs no pass is there all the same


def test_weights_of_low_precision_are_too_coarse() -> None:
    diagnoser, trunk = made(nn.Linear(5, 3))
    trunk.model.bfloat16()
    assert "torch.bfloat16" in diagnoser.diagnose(WHOLE, 5).missing["sharpness"]


def test_a_network_too_large_for_copies_of_its_weights_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosing, "LARGEST_MIB", 1e-4)
    assert "MiB would be needed" in made()[0].diagnose(WHOLE, 5).missing["sharpness"]


def test_a_run_that_cannot_be_diagnosed_says_so_without_trying() -> None:
    diagnoser, _ = made()
    diagnoser.why_not = "the training step is the user's own"
    found = diagnoser.diagnose(WHOLE, 5)
    assert found.missing["sharpness"] == "the training step is the user's own"
    diagnoser.why_not, diagnoser.why_no_noise = "", "the loss is no mean over samples"
    found = diagnoser.diagnose(WHOLE, 5)
    assert found.missing == {"noise_scale": "the loss is no mean over samples"}
    assert found.sharpness is not None


def test_frozen_layers_stay_out_of_it() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    diagnoser, _ = made(model)
    assert diagnoser.diagnose(WHOLE, 5).missing == {}
    assert [tuple(d.shape) for d in diagnoser._direction] == [(3, 8), (3,)]


def reading(variance: float, square: float, examples: int = 100, **more: Any) -> Diagnosed:
    return Diagnosed(step=1, gradient_variance=variance, gradient_square=square, examples=examples, **more)


def test_the_noise_scale_is_a_ratio_of_means_or_a_bound() -> None:
    assert noise_scale([]) == (None, None)
    assert noise_scale([Diagnosed(step=1)]) == (None, None)
    assert noise_scale([reading(10.0, 1.0), reading(20.0, 2.0)]) == (pytest.approx(10.0), None)
    # One negative square is an estimate like any other; only the mean has to be positive.
    assert noise_scale([reading(10.0, -1.0), reading(10.0, 3.0)]) == (pytest.approx(10.0), None)
    assert noise_scale([reading(10.0, -1.0)]) == (None, pytest.approx(100 / 3))
    assert noise_scale([reading(100.0, 1.0)]) == (None, pytest.approx(100 / 3))


def test_a_card_gets_the_latest_of_each_or_the_reason_why_there_is_none() -> None:
    size = UpdateSize(rms=0.5, ratio=1e-3)
    first = reading(10.0, 1.0, sharpness=7.0, residual=0.1, stability=0.2)
    told = summary([first, Diagnosed(step=9, updates=(size, None))])
    assert told == {
        "diagnosed_at": 9,
        "noise_scale": pytest.approx(10.0),
        "sharpness": 7.0,
        "sharpness_to_edge": 0.2,
        "update_rms": (0.5,),
        "update_ratio": (1e-3,),
    }
    missing = summary(
        [Diagnosed(step=2, missing={"sharpness": "the loss is nan", "updates": "SGD keeps none"})]
    )
    assert missing == {"diagnosed_at": 2, "no_sharpness": "the loss is nan"}
    assert summary([]) == {}


def test_a_reading_costs_what_the_policy_reckons_with() -> None:
    policy = DiagnosticPolicy(examples=64, probe=32, iterations=6)
    assert cost_of(policy) == made()[0].diagnose(WHOLE, 5).passes
