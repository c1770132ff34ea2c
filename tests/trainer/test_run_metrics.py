"""Metrics of the user's: on training and on held-out data, in history, session and result, and over a cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.errors import UsageError
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.result import FitResult
from automode.trainer.run_metrics import RunMetrics

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {"progress": False, "console": False}


class Share:
    """Share of right answers, without any library."""

    def __init__(self) -> None:
        self.right = self.n = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        assert not outputs.requires_grad
        self.right += int((outputs.argmax(1) == targets).sum())
        self.n += len(targets)

    def compute(self) -> float:
        return self.right / self.n

    def reset(self) -> None:
        self.right = self.n = 0


def fit(folder: Path, metrics: Any, own_step: Any = None, **given: Any) -> FitResult:
    torch.manual_seed(1)
    inputs = torch.randn(130, 5)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    trainer = Trainer(
        **{"session_dir": folder, "val_every_n_epochs": 1, "metrics": metrics, **COMMON, **given}
    )
    if own_step is not None:
        trainer.training_step(own_step)
    held_out = DataLoader(TensorDataset(inputs[90:], targets[90:]), 20)
    return trainer.fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(TensorDataset(inputs[:90], targets[:90]), 20, shuffle=True),
        val_loader=held_out,
        test_loader=held_out,
    )


@pytest.mark.parametrize("mode", [False, "observe", True])
def test_a_metric_is_computed_over_each_epoch_each_validation_and_the_test(mode: Any, tmp_path: Path) -> None:
    mine = Share()
    result = fit(tmp_path, {"share": mine}, max_epochs=4, automode=mode, do_test_after=True, seed=3)
    history, table = result.history, result.session.frames("epochs")
    # automode's own accuracy is computed in another way, from per-sample scores.
    assert history["val_share"] == pytest.approx(history["val_metric"])
    assert result.test is not None
    assert result.test["share"] == pytest.approx(result.test["accuracy"])
    assert history["train_share"][-1] > history["train_share"][0]
    assert all(
        0 < share < 1 and share * 90 == pytest.approx(round(share * 90)) for share in history["train_share"]
    )
    for name in ("train_share", "val_share"):
        assert table[name].tolist() == history[name]
    assert mine.n == 0  # what the user gave is copied and left alone


def test_metrics_change_no_bit(tmp_path: Path) -> None:
    plain, measured = fit(tmp_path, None, max_epochs=3), fit(tmp_path, {"share": Share()}, max_epochs=3)
    assert plain.frame("loss").tolist() == measured.frame("loss").tolist()


def test_an_epoch_without_validation_has_no_number_of_it(tmp_path: Path) -> None:
    history = fit(tmp_path, {"share": Share()}, max_epochs=3, val_every_n_epochs=2).history
    assert np.isnan(history["val_share"]).tolist() == [True, False, True]
    assert np.isfinite(history["train_share"]).all()
    last = fit(tmp_path, {"share": Share()}, max_steps=12, val_every_n_epochs=2).history
    assert np.isnan(last["val_share"]).tolist() == [True, False, False]


def test_an_own_step_that_shows_no_outputs_is_warned_of(tmp_path: Path) -> None:
    def step(batch: Any, state: dict[str, Any]) -> dict[str, Any]:
        state["optimizer"].zero_grad()
        loss = state["loss_fn"](state["model"](batch[0]), batch[1])
        loss.backward()
        state["optimizer"].step()
        return {"loss": loss.detach()}

    with pytest.warns(UserWarning, match="metrics= saw no training batch: return `outputs` and `targets`"):
        history = fit(tmp_path, {"share": Share()}, own_step=step, max_epochs=2).history
    assert "train_share" not in history
    assert len(history["val_share"]) == 2


def torchmetric() -> Any:
    torchmetrics = pytest.importorskip("torchmetrics")
    return {
        "acc": torchmetrics.classification.MulticlassAccuracy(num_classes=2, average="micro"),
        "many": torchmetrics.MetricCollection(
            {
                "recall": torchmetrics.classification.MulticlassRecall(num_classes=2, average=None),
                "auroc": torchmetrics.classification.MulticlassAUROC(num_classes=2),
            }
        ),
    }


def test_torchmetrics_and_their_collections_work(tmp_path: Path) -> None:
    history = fit(tmp_path, torchmetric(), max_epochs=2).history
    assert history["val_acc"] == pytest.approx(history["val_metric"])
    for prefix in ("train", "val"):
        for name in ("many_recall_0", "many_recall_1", "many_auroc"):
            assert all(0 <= value <= 1 for value in history[f"{prefix}_{name}"])


class Cut(Exception):
    """Ends a run as if it had been killed."""


@pytest.mark.parametrize("make", [lambda: {"share": Share()}, torchmetric], ids=["own", "torchmetrics"])
@pytest.mark.parametrize("cut", [7, 10])
def test_a_cut_does_not_show(
    cut: int, make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == cut:
            assert keeper.save("periodic") is not None
            raise Cut

    whole = fit(tmp_path / "whole", make(), max_epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(tmp_path, make(), max_epochs=3)
    resumed = fit(tmp_path, make(), max_epochs=3, resume="auto")
    assert json.dumps(resumed.history) == json.dumps(whole.history)
    (record,) = resumed.session.events("resumed")
    assert record.body["exact"]


class Odd(Share):
    def __init__(self) -> None:
        super().__init__()
        self.what = object()


def test_a_metric_that_cannot_be_stored_makes_the_checkpoint_approximate() -> None:
    metrics = RunMetrics({"odd": Odd(), "share": Share()}, torch.device("cpu"))
    state = metrics.state()
    assert set(state["train"]) == {"share"}
    assert metrics.lost() == ["the metric odd keeps more than numbers, text, tensors and containers of them"]
    assert RunMetrics({}, torch.device("cpu")).load(state) == ["the metric share is no longer there"]


class Broken(Share):
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        raise ValueError("not like this")


class Wordy(Share):
    def compute(self) -> Any:
        return "good"


def test_a_metric_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not like this") as caught:
        fit(tmp_path, {"broken": Broken()}, max_epochs=1)
    assert any("the metric 'broken' of metrics=" in note for note in caught.value.__notes__)
    with pytest.raises(UsageError, match=r"compute\(\) of 'train_wordy' gave a str"):
        fit(tmp_path, {"wordy": Wordy()}, max_epochs=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Share()], r"metrics must be a mapping of names to metrics.*got list"),
        ({"": Share()}, "named by a non-empty string, got ''"),
        ({"loss": Share()}, "'loss' is what automode itself calls a column"),
        ({"share": Share}, "'share' is the class Share; a metric is an object with update"),
        ({"share": 3}, "'share' is a int; a metric is an object"),
    ],
)
def test_what_is_no_metric_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(metrics=given)
