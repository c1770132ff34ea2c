"""Loggers: what they are given and when, what they cannot break, and that the command line reads what was written."""

from __future__ import annotations

import csv
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.cli.curves import load_curve
from automode.errors import UsageError
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.result import FitResult

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {"progress": False, "console": False}


def fit(folder: Path, logger: Any, **given: Any) -> FitResult:
    torch.manual_seed(1)
    inputs = torch.randn(130, 5)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    held_out = DataLoader(TensorDataset(inputs[90:], targets[90:]), 20)
    return Trainer(
        **{
            "session_dir": folder,
            "val_every_n_epochs": 1,
            "max_epochs": 4,
            "logger": logger,
            **COMMON,
            **given,
        }
    ).fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(TensorDataset(inputs[:90], targets[:90]), 20, shuffle=True),
        val_loader=held_out,
        test_loader=held_out,
    )


class Notes:
    """A logger with Lightning's methods that only remembers, and draws random numbers while it does."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.parameters: dict[str, Any] = {}
        self.saved = 0
        self.status: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        random.random()
        torch.rand(3)
        assert step is not None
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self.parameters = params

    def save(self) -> None:
        self.saved += 1

    def finalize(self, status: str) -> None:
        self.status.append(status)


def test_a_logger_gets_every_nth_row_every_epoch_the_test_and_the_end(tmp_path: Path) -> None:
    notes = Notes()
    result = fit(tmp_path, notes, log_every_n_steps=7, do_test_after=True)
    losses, history = result.frame("loss"), result.history
    steps = [(step, metrics) for step, metrics in notes.metrics if "loss" in metrics]
    assert [(step, metrics["loss"]) for step, metrics in steps] == [(7, losses[6]), (14, losses[13])]
    assert set(steps[0][1]) == {"loss", "grad_norm", "lr_0"}
    epochs = [(step, metrics) for step, metrics in notes.metrics if "train_loss" in metrics]
    assert [(step, m["train_loss"], m["val_loss"]) for step, m in epochs] == [
        (5 * (i + 1), history["train_loss"][i], history["val_loss"][i]) for i in range(4)
    ]
    assert result.test is not None
    assert notes.metrics[-1] == (20, {f"test_{name}": value for name, value in result.test.items()})
    assert notes.parameters["optimizer"] == "SGD"
    assert notes.parameters["batch_size"] == 20
    assert notes.saved == 5
    assert notes.status == ["success"]


@pytest.mark.parametrize("mode", ["observe", True])
def test_loggers_change_no_bit(mode: Any, tmp_path: Path) -> None:
    plain = fit(tmp_path, None, automode=mode, seed=2)
    logged = fit(tmp_path, [Notes(), "csv", "tensorboard"], automode=mode, seed=2, log_every_n_steps=1)
    assert plain.frame("loss").tolist() == logged.frame("loss").tolist()


class Fails(Notes):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        raise ConnectionError("no route")


def test_a_logger_that_fails_ends_no_run_where_warnings_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = Fails()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path, [fails], log_every_n_steps=1)
    assert fails.status == ["success"]
    assert capsys.readouterr().err.count("the logger Fails failed") == 1


def test_a_logger_that_fails_is_warned_of_once_and_tried_again(tmp_path: Path) -> None:
    fails, works = Fails(), Notes()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(tmp_path, [fails, works], log_every_n_steps=1)
    said = [str(one.message) for one in caught]
    assert said == ["the logger Fails failed (ConnectionError: no route); training goes on"]
    assert result.steps == 20
    assert len(fails.metrics) == len(works.metrics) == 24
    assert fails.status == ["success"]


@pytest.mark.parametrize(
    ("error", "status"), [(ZeroDivisionError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_a_run_that_does_not_come_to_its_end_says_so(error: Any, status: str, tmp_path: Path) -> None:
    class Raises:
        def on_train_epoch_end(self, *_: Any) -> None:
            raise error

    notes = Notes()
    with pytest.raises(error):
        fit(tmp_path, notes, callbacks=[Raises()])
    assert notes.status == [status]
    assert [metrics["epoch"] for _, metrics in notes.metrics if "epoch" in metrics] == [0]


def cells(path: Path, name: str) -> list[float]:
    with path.open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_the_csv_file_holds_every_step_and_epoch_and_the_command_line_reads_it(tmp_path: Path) -> None:
    result = fit(tmp_path, "csv", max_epochs=8)
    path = result.path / "metrics.csv"
    for name in ("loss", "grad_norm", "lr_0"):
        assert cells(path, name) == result.frame(name).tolist()
    assert cells(path, "val_loss") == result.history["val_loss"]
    curve = load_curve(str(path), None)
    assert curve.loss.tolist() == result.frame("loss").tolist()


def test_the_event_file_is_read_by_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra automode[tensorboard]")
    result = fit(tmp_path, "tensorboard", max_epochs=8)
    curve = load_curve(str(result.path / "tensorboard"), None)
    np.testing.assert_allclose(curve.loss, result.frame("loss"), rtol=1e-6)


def test_a_cut_does_not_show_in_the_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(Exception):
        pass

    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == 7:
            assert keeper.save("periodic") is not None
        if keeper._loop.batches == 12:
            keeper._loop.flush()
            raise Cut

    whole = fit(tmp_path / "whole", "csv")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "after_epoch", lambda _: None)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(tmp_path, "csv")
    resumed = fit(tmp_path, "csv", resume="auto")
    for name in ("row", "step", "loss", "val_loss", "train_loss", "epoch"):
        mine, theirs = (cells(result.path / "metrics.csv", name) for result in (resumed, whole))
        assert mine == theirs, name


def test_lightnings_loggers_and_monitors_work_as_they_are(tmp_path: Path) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    logger = loggers.CSVLogger(tmp_path / "theirs", name="run")
    monitor = callbacks.LearningRateMonitor("step")
    result = fit(tmp_path, logger, callbacks=[monitor], log_every_n_steps=5, max_epochs=12)
    path = Path(logger.log_dir) / "metrics.csv"
    assert cells(path, "loss") == result.frame("loss")[4::5].tolist()
    assert cells(path, "val_loss") == result.history["val_loss"]
    assert cells(path, "lr-SGD") == [0.2] * 12
    assert (Path(logger.log_dir) / "hparams.yaml").is_file()
    curve = load_curve(str(path), "loss")
    assert curve.loss.tolist() == result.frame("loss")[4::5].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorbord", "logger='tensorbord' is unknown; there are 'csv', 'tensorboard'"),
        (Notes, "got the class Notes"),
        ([3], "got a int"),
        (["csv", "csv"], "names 'csv' twice"),
    ],
)
def test_what_is_no_logger_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(logger=given)


def test_a_number_of_steps_is_a_whole_one() -> None:
    with pytest.raises(UsageError, match="log_every_n_steps must be a whole number at least 1"):
        Trainer(log_every_n_steps=0)
