"""Optimizers, schedulers, precisions and modes whose states are of many kinds: a cut in the middle of an epoch does not show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.result import FitResult

pytestmark = pytest.mark.torch

Make = Callable[[Any], Any]


def by_closure(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
    def closure() -> Any:
        state["optimizer"].zero_grad()
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        loss.backward()
        return loss

    return {"loss": state["optimizer"].step(closure)}


def sequential(optimizer: Any) -> Any:
    parts = [schedulers.LinearLR(optimizer, 0.1, 1, 5), schedulers.CosineAnnealingLR(optimizer, 25)]
    return schedulers.SequentialLR(optimizer, parts, [5])


CASES: dict[str, tuple[Make, Make | None, dict[str, Any]]] = {
    "lbfgs": (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), None, {"own_step": by_closure}),
    "lbfgs by the default step": (lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), None, {}),
    "accumulated": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda o: schedulers.ExponentialLR(o, 0.9),
        {"accumulate_grad_batches": 4, "clip_norm": 0.5, "automode": "observe"},
    ),
    "one cycle": (
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda o: schedulers.OneCycleLR(o, 0.01, total_steps=31),
        {},
    ),
    "sequential": (lambda p: torch.optim.RMSprop(p, momentum=0.9), sequential, {}),
    "lambda": (torch.optim.NAdam, lambda o: schedulers.LambdaLR(o, lambda s: 0.97**s), {}),
    "milestones": (
        lambda p: torch.optim.SGD(p, 0.1, nesterov=True, momentum=0.9),
        lambda o: schedulers.MultiStepLR(o, [1, 2]),
        {"scheduler_interval": "epoch"},
    ),
    "plateau": (
        torch.optim.Adagrad,
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
        {"scheduler_interval": "epoch"},
    ),
    "cyclic": (
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=4),
        {},
    ),
    "bf16": (torch.optim.Adam, None, {"precision": "bf16", "clip_norm": 0.5}),
    "act": (
        torch.optim.Adam,
        lambda o: schedulers.CosineAnnealingLR(o, 30),
        {"automode": "act", "seed": 4},
    ),
}


class Cut(Exception):
    """Ends a run as if it had been killed."""


def fit(name: str, folder: Path, **more: Any) -> FitResult:
    optimizer_of, scheduler_of, given = CASES[name]
    torch.manual_seed(1)
    inputs = torch.randn(120, 5)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 2))
    optimizer = optimizer_of(model.parameters())
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "session_dir": folder,
        "progress": False,
        "console": False,
        "scheduler_interval": "step",
        "val_every_n_epochs": 1,
        **given,
        **more,
    }
    own_step = settings.pop("own_step", None)
    trainer = Trainer(**settings)
    if own_step is not None:
        trainer.training_step(own_step)
    return trainer.fit(
        model=model,
        optimizer=optimizer,
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(TensorDataset(inputs[:80], targets[:80]), 8, shuffle=True),
        val_loader=DataLoader(TensorDataset(inputs[80:], targets[80:]), 20),
        scheduler=None if scheduler_of is None else scheduler_of(optimizer),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_cut_does_not_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == 13:
            assert keeper.save("periodic") is not None
            raise Cut

    whole = fit(name, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(name, tmp_path)
    torch.manual_seed(99)
    resumed = fit(name, tmp_path, resume="auto")
    assert len(list(resumed.session.events("resumed"))) == 1
    for column in ("loss", "grad_norm", "lr_0", "step", "applied"):
        np.testing.assert_array_equal(resumed.frame(column), whole.frame(column), err_msg=column)
    assert json.dumps(resumed.history) == json.dumps(whole.history)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
