"""Health checks find what is wrong, and leave a run as if nobody had looked."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, WeightedRandomSampler

from automode import replay
from automode.cli.main import main
from automode.errors import UsageError
from automode.planner.controls import CHECKS
from automode.trainer.flat_optimizers import FlatAdam
from automode.trainer.tensor_loader import TensorLoader

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_checked_equals_one_that_was_not_bit_for_bit(workers: int, desk: Any) -> None:
    plain = desk.fit(desk.script(workers=workers))
    run = desk.run(desk.script(workers=workers))
    first = run.trainer.check(timeout=desk.patience)
    run.train(17)
    second = run.trainer.check(timeout=desk.patience)
    checked = run.finish()
    desk.same(plain, checked)
    assert [finding.check for finding in first.findings] == list(CHECKS)
    assert {f.check: f.verdict for f in second.findings if f.check != "throughput"} == {
        name: "good" for name in CHECKS if name != "throughput"
    }
    assert replay(checked.session).differences == 0


@pytest.mark.parametrize("kind", ["adam", "flat adam", "scheduled", "accumulating", "clipped in bf16"])
def test_other_ways_to_train_are_put_back_too(kind: str, desk: Any) -> None:
    def made() -> dict[str, Any]:
        script = desk.script()
        if kind == "adam":
            script["optimizer"] = torch.optim.AdamW(script["model"].parameters(), lr=0.01)
        if kind == "flat adam":
            script["optimizer"] = FlatAdam(script["model"].parameters(), lr=0.01)
        if kind == "scheduled":
            script["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(
                script["optimizer"], 0.2, total_steps=36
            )
        return script

    given: dict[str, Any] = {
        "adam": {},
        "flat adam": {},
        "scheduled": {"scheduler_interval": "step"},
        "accumulating": {"accumulate_grad_batches": 4},
        "clipped in bf16": {"clip_norm": 0.5, "precision": "bf16"},
    }[kind]
    plain = desk.fit(made(), **given)
    run = desk.run(made(), **given)
    for _ in range(2):
        run.train(6)
        assert run.trainer.check("determinism", timeout=desk.patience).verdict == "good"
        run.trainer.check("gradients", timeout=desk.patience)
        run.trainer.check("throughput", timeout=desk.patience)
    desk.same(plain, run.finish())


class Drifting(nn.Module):
    """Draws from a source that nobody can put back."""

    drift = 0.0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        Drifting.drift += 1e-3
        return inputs * (1.0 + Drifting.drift)


def test_a_step_that_cannot_be_repeated_is_found(desk: Any) -> None:
    made = desk.script()
    made["model"].append(Drifting())
    run = desk.run(made)
    found = run.trainer.check("determinism", timeout=desk.patience)["determinism"]
    assert found.verdict == "bad"
    assert found.numbers["first_different_loss"] == 1.0
    assert found.worst[0]["largest_difference"] > 0.0


class Cut(nn.Module):
    """A network one of whose branches leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 2), nn.Linear(5, 2)
        self.huge = nn.Parameter(torch.zeros(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.used(inputs) + self.unused(inputs).detach() + 1e6 * self.huge


def test_weights_without_a_gradient_and_with_far_too_large_ones_are_named(desk: Any) -> None:
    made = desk.script()
    made["model"] = Cut()
    made["optimizer"] = torch.optim.SGD(made["model"].parameters(), lr=1e-12)
    run = desk.run(made)
    found = run.trainer.check("gradients", timeout=desk.patience)["gradients"]
    assert found.verdict == "doubtful"
    assert (found.numbers["dead"], found.numbers["exploding"]) == (2.0, 1.0)
    assert [layer["layer"] for layer in found.worst] == ["huge", "unused.weight", "unused.bias"]


def test_dead_and_saturated_layers_are_named(desk: Any) -> None:
    made = desk.script()
    dying = nn.Linear(5, 8)
    with torch.no_grad():
        dying.bias.fill_(-100.0)
        dying.bias[0] = 1.0
    rising = nn.Linear(8, 4)
    with torch.no_grad():
        rising.bias.fill_(50.0)
    made["model"] = nn.Sequential(dying, nn.ReLU(), rising, nn.Tanh(), nn.Linear(4, 2))
    made["optimizer"] = torch.optim.SGD(made["model"].parameters(), lr=0.0)
    run = desk.run(made)
    found = run.trainer.check("activations", timeout=desk.patience)["activations"]
    assert found.verdict == "doubtful"
    assert found.numbers["dead"] == pytest.approx(7 / 8)
    assert found.numbers["saturated"] == 1.0
    assert {layer["layer"] for layer in found.worst[:2]} == {"1", "3"}


@pytest.mark.parametrize(("value", "verdict"), [(float("nan"), "bad"), (1e38, "doubtful"), (1.0, "good")])
def test_values_that_are_not_finite_or_near_the_end_of_the_range_are_named(
    value: float, verdict: str, desk: Any
) -> None:
    made = desk.script()
    made["model"].register_buffer("extra", torch.tensor([0.0, value]))
    run = desk.run(made)
    found = run.trainer.check("numerics", timeout=desk.patience)["numerics"]
    assert found.verdict == verdict
    assert verdict == "good" or found.worst[0]["layer"] == "extra"


class Slow(Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        import time

        time.sleep(0.002)
        return torch.zeros(5), torch.tensor(index % 2)


def test_a_loader_that_does_not_keep_up_is_found(desk: Any) -> None:
    run = desk.run({**desk.script(), "train_loader": DataLoader(Slow(), batch_size=8)})
    found = run.trainer.check("throughput", timeout=desk.patience)["throughput"]
    assert found.verdict == "doubtful"
    assert found.numbers["load_ms"] > 16.0
    assert found.numbers["waiting_share"] > 0.5


HIDDEN = itertools.count()


class Hidden(Sampler[int]):
    """Counts in a place that cannot be found."""

    def __iter__(self) -> Any:
        seed = next(HIDDEN)
        return iter(torch.randperm(96, generator=torch.Generator().manual_seed(seed)).tolist())

    def __len__(self) -> int:
        return 96


def loaders(data: TensorDataset) -> dict[str, tuple[DataLoader[Any], str]]:
    generator = torch.Generator().manual_seed(3)
    return {
        "weighted": (DataLoader(data, batch_size=8, sampler=WeightedRandomSampler([1.0] * 96, 96)), "good"),
        "generator": (DataLoader(data, batch_size=8, shuffle=True, generator=generator), "good"),
        "tensors": (TensorLoader(data, batch_size=8, shuffle=True, generator=generator), "good"),
        "hidden": (DataLoader(data, batch_size=8, sampler=Hidden()), "bad"),
    }


@pytest.mark.parametrize("name", ["weighted", "generator", "tensors", "hidden"])
def test_an_order_that_cannot_be_drawn_again_is_found(name: str, desk: Any) -> None:
    def made() -> tuple[dict[str, Any], str]:
        script = desk.script()
        script["train_loader"], verdict = loaders(script["train_loader"].dataset)[name]
        return script, verdict

    plain = desk.fit(made()[0])
    script, verdict = made()
    run = desk.run(script)
    run.train(15)
    found = run.trainer.check("data_order", timeout=desk.patience)["data_order"]
    assert found.verdict == verdict
    assert found.numbers["batches"] == 3.0
    if verdict == "good":
        desk.same(plain, run.finish())


def test_what_cannot_be_checked_says_why_and_the_run_goes_on(desk: Any) -> None:
    made = desk.script()
    batches = list(made["train_loader"])
    made["train_loader"] = (batch for batch in batches)
    run = desk.run(made, max_epochs=None, max_steps=9)
    report = run.trainer.check(timeout=desk.patience)
    assert report.verdict == "unknown"
    assert "cannot be read beside the run" in report["determinism"].why
    assert run.finish().steps == 9


def test_a_model_that_fails_in_a_check_does_not_end_the_run(desk: Any) -> None:
    made = desk.script()
    failing = [False]

    def fail(*_: Any) -> None:
        if failing[0]:
            raise ArithmeticError("on demand")

    made["model"].register_forward_hook(fail)
    plain = desk.fit()
    run = desk.run(made)
    run.train(5)
    failing[0] = True
    report = run.trainer.check(timeout=desk.patience)
    failing[0] = False
    assert "ArithmeticError: on demand" in report["gradients"].why
    desk.same(plain, run.finish())


def test_reports_stand_in_the_session_and_on_the_command_line(desk: Any) -> None:
    run = desk.run()
    call = CliRunner().invoke
    assert "no health checks" in call(main, ["checks", str(run.path)]).output
    asked = call(main, ["ctl", str(run.path), "check", "gradients"])
    assert asked.exit_code == 0
    assert "gradients: good: gradients reach all" in asked.output
    assert "numerics: good" in call(main, ["ctl", str(run.path), "check", "steps=1"]).output
    shown = call(main, ["checks", str(run.path)]).output
    assert shown.count("gradients: good") == 2
    lines = call(main, ["checks", str(run.path), "--json"]).output.splitlines()
    assert len(lines) == 7
    assert json.loads(lines[0])["numbers"]["layers"] == 6.0
    report = run.trainer.check("numerics", timeout=desk.patience)
    assert "health at step 0: good" in str(report)
    assert "<table" in report._repr_html_()


def test_the_training_thread_cannot_wait_for_its_own_check(desk: Any) -> None:
    trainer = desk.trainer(max_epochs=1)
    told: list[str] = []

    @trainer.training_step
    def step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        if state["step"] == 3 and not told:
            with pytest.raises(UsageError, match="cannot wait for itself") as refused:
                trainer.check("gradients")
            told.append(str(refused.value))
        state["optimizer"].zero_grad()
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        loss.backward()
        state["optimizer"].step()
        return {"loss": loss}

    result = trainer.fit(**desk.script())
    (found,) = result.session.events("health_checked")
    assert (found.body["verdict"], found.body["step"]) == ("unknown", 4)
    assert "your own" in found.body["why"]
