"""Whole runs whose cards name what they are judged by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

STEPS = 170
CARD = """
action: fork
because: What counts is whether it is right.
training_recipe: {variants: [{name: fast, lr_mul: 20}, {name: faster, lr_mul: 40}]}
gate_recipe: {kind: switch_softmax, epochs: 1}
merge_recipe: {kind: interpolate, weights: [0.5, 1.0]}
budget_steps: 8
asha: {reduction_factor: 2, max_steps: 16}
acceptance: {metric: accuracy}
"""


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(rate=0.003)


@pytest.fixture(scope="module")
def played(handed_in: Any, run_once: Any, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_once(
        tmp_path_factory.mktemp("asked") / "run",
        script=script,
        policy={"budget": "on_top"},
        actions=handed_in(CARD, at=2),
        steps=STEPS,
    )


def test_rungs_control_router_and_merge_are_scored_by_accuracy(played: Any) -> None:
    scored = [*played.bodies("trial_reported"), *played.bodies("gate_fitted"), *played.bodies("merged")]
    scored.append(played.bodies("snapshotted")[1])
    assert len(scored) == 6
    for body in scored:
        assert body["metric"] == "accuracy"
        assert body["value"] * 80 == pytest.approx(round(body["value"] * 80))  # of 80 samples on val-A


def test_the_look_and_the_verdict_are_about_it(played: Any) -> None:
    (look,), (verdict,) = played.bodies("evaluated"), played.bodies("verdict_given")
    assert look["metric"] == verdict["metric"] == "accuracy"
    gained = look["candidate_metrics"]["accuracy"] - look["control_metrics"]["accuracy"]
    assert look["overall"]["mean"] == pytest.approx(gained)
    assert verdict["why"].endswith("compared by accuracy, as the card asks")


def test_it_is_the_same_when_the_card_is_run_again(played: Any, script: Any) -> None:
    wanted = played.bodies("card_proposed")[0]["card"]["id"]
    settings = Settings(automode="propose", max_steps=STEPS, seed=3, session_dir=played.folder, console=False)
    done = execute(Order(session=played.path, card=wanted), settings, FitRequest(**script.build()), None)
    assert done.same, done.text()


def test_values_are_judged_by_their_squared_error_and_never_by_accuracy(
    handed_in: Any, play_run: Any, script: Any
) -> None:
    def values(n: int, seed: int) -> TensorDataset:
        inputs = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(inputs, inputs[:, :1] * 3)

    torch.manual_seed(5)
    model = nn.Linear(6, 1)
    fit = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.003),
        "loss_fn": nn.L1Loss(),
        "train_loader": DataLoader(values(150, 1), batch_size=30),
        "val_loader": DataLoader(values(160, 2), batch_size=80),
    }
    alone = CARD.replace("gate_recipe: {kind: switch_softmax, epochs: 1}\n", "")
    run = play_run(
        script=script,
        fit=fit,
        policy={"budget": "on_top"},
        actions={2: lambda person: person.submit(alone)} | handed_in(alone.replace("accuracy", "mse"), at=4),
        steps=STEPS,
    )
    (refused,) = run.bodies("request_refused")
    assert "accuracy is of classification, and this run's task is regression" in refused["why"]
    (look,) = run.bodies("evaluated")
    assert look["metric"] == "mse"
    gained = look["control_metrics"]["mse"] - look["candidate_metrics"]["mse"]
    assert look["overall"]["mean"] == pytest.approx(gained)
