"""The session's stream of epochs: what its columns hold, and that a cut does not show in those that are the run's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.result import FitResult

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {"progress": False, "console": False}


def fit(folder: Path, loader: Any = None, **given: Any) -> FitResult:
    torch.manual_seed(1)
    inputs = torch.randn(120, 5)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    return Trainer(**{"session_dir": folder, "val_every_n_epochs": 2, **COMMON, **given}).fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=loader or DataLoader(TensorDataset(inputs[:90], targets[:90]), 20, shuffle=True),
        val_loader=DataLoader(TensorDataset(inputs[90:], targets[90:]), 20),
    )


@pytest.mark.parametrize("mode", [False, True])
def test_every_epoch_is_a_row(mode: Any, tmp_path: Path) -> None:
    result = fit(tmp_path, max_epochs=4, automode=mode)
    table, history = result.session.frames("epochs"), result.history
    assert table["epoch"].tolist() == [0, 1, 2, 3]
    for column, name in (("step", "step"), ("train_loss", "train_loss"), ("learning_rate", "learning_rate")):
        assert table[column].tolist() == history[name]
    for column in ("val_loss", "val_metric"):
        np.testing.assert_array_equal(table[column], history[column])
    np.testing.assert_array_equal(table["val_accuracy"], history["val_metric"])
    norm = math.sqrt(sum(float((p.detach() ** 2).sum()) for p in result.model.parameters()))
    assert table["weight_norm"][-1] == pytest.approx(norm, rel=1e-5)
    assert (table["seconds"] > 0).all()
    assert table["samples_per_second"] == pytest.approx(90 / table["seconds"])
    assert (table["peak_rss_mib"] > 50).all()


def test_a_last_validation_stands_in_the_last_row(tmp_path: Path) -> None:
    result = fit(tmp_path, max_steps=7)
    table = result.session.frames("epochs")
    assert table["epoch"].tolist() == [0, 1]
    assert table["val_loss"][-1] == result.history["val_loss"][-1]
    assert math.isnan(table["val_loss"][0])


def test_where_nobody_knows_how_many_samples_there_are_there_is_no_rate_of_them(tmp_path: Path) -> None:
    batches = [(torch.randn(4, 5), torch.zeros(4).long())] * 3

    class Stream:
        def __iter__(self) -> Any:
            return iter(batches)

    table = fit(tmp_path, Stream(), max_epochs=1).session.frames("epochs")
    assert np.isnan(table["samples_per_second"]).all()


@pytest.mark.parametrize("cut", [7, 10, 15])
def test_a_cut_does_not_show(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(Exception):
        pass

    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == cut - 2:
            assert keeper.save("periodic") is not None
        if keeper._loop.batches == cut:
            raise Cut

    whole = fit(tmp_path / "whole", max_epochs=4)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "after_epoch", lambda _: None)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(tmp_path, max_epochs=4)
    resumed = fit(tmp_path, max_epochs=4, resume="auto")
    mine, theirs = resumed.session.frames("epochs"), whole.session.frames("epochs")
    for column in ("epoch", "step", "train_loss", "val_loss", "val_metric", "learning_rate", "weight_norm"):
        np.testing.assert_array_equal(mine[column], theirs[column], err_msg=column)
