"""Callbacks: which hooks are called and when, what they may ask, what is kept with checkpoints, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Callback, Trainer
from automode.errors import UsageError
from automode.trainer.callbacks import HOOKS, Callbacks, check_callbacks
from automode.trainer.checkpointing import CheckpointKeeper

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {"progress": False, "console": False}


def script(rows: int = 40) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = torch.randn(rows + 20, 5)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(TensorDataset(inputs[:rows], targets[:rows]), 20),
        "val_loader": DataLoader(TensorDataset(inputs[rows:], targets[rows:]), 20),
    }


class Everything(Callback):
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in HOOKS and name not in ("state_dict", "load_state_dict"):
            return lambda *given: self.calls.append(name)
        return super().__getattribute__(name)


for _hook in HOOKS:
    setattr(Everything, _hook, lambda self, *given: None)


def test_hooks_are_called_in_lightnings_order(tmp_path: Path) -> None:
    one = Everything()
    trainer = Trainer(
        max_epochs=2,
        val_every_n_epochs=2,
        do_test_after=True,
        callbacks=[one],
        session_dir=tmp_path,
        **COMMON,
    )
    made = script()
    trainer.fit(**made, test_loader=made["val_loader"])
    batch = ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]
    validation = [
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_epoch_end",
        "on_validation_end",
    ]
    test = [name.replace("validation", "test") for name in validation]
    assert one.calls == [
        *("setup", "on_fit_start", "on_train_start"),
        *("on_train_epoch_start", *batch, *batch, "on_train_epoch_end"),
        *("on_train_epoch_start", *batch, *batch, *validation, "on_train_epoch_end"),
        *("on_train_end", "on_fit_end", "teardown"),
        *test,
    ]
    assert not made["optimizer"]._optimizer_step_pre_hooks


def test_hooks_are_given_what_lightning_gives_them(tmp_path: Path) -> None:
    made = script()
    seen: list[Any] = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer.global_step, trainer.current_epoch, batch_idx, len(batch[0])))

        def on_before_optimizer_step(self, trainer: Any, model: Any, optimizer: Any) -> None:
            assert optimizer is made["optimizer"]
            seen.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))

        def on_train_batch_end(
            self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            assert model is made["model"]
            seen.append((trainer.global_step, float(outputs["loss"].detach()), batch_idx))

        def on_train_epoch_end(self, trainer: Any, model: Any) -> None:
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer = Trainer(max_epochs=1, val_every_n_epochs=1, callbacks=[Looks()], session_dir=tmp_path, **COMMON)
    result = trainer.fit(**made)
    losses, norms = result.frame("loss"), result.frame("grad_norm")
    numbers = seen.pop()
    assert seen[0::3] == [(0, 0, 0, 20), (1, 0, 1, 20)]
    assert seen[1::3] == pytest.approx(norms.tolist())
    assert seen[2::3] == [(1, losses[0], 0), (2, losses[1], 1)]
    assert numbers["loss"] == pytest.approx(losses[1])
    assert numbers["train_loss"] == pytest.approx(losses.mean())
    assert numbers["val_loss"] == pytest.approx(result.history["val_loss"][0])
    assert numbers["val_accuracy"] == numbers["val_metric"] == pytest.approx(result.history["val_metric"][0])


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
def test_a_callback_may_end_the_run(hook: str, tmp_path: Path) -> None:
    class Stops(Callback):
        pass

    def stop(self: Any, trainer: Any, *given: Any) -> None:
        trainer.should_stop = True
        assert trainer.should_stop

    setattr(Stops, hook, stop)
    trainer = Trainer(max_epochs=5, val_every_n_epochs=1, callbacks=[Stops()], session_dir=tmp_path, **COMMON)
    result = trainer.fit(**script())
    assert result.steps == (1 if hook == "on_train_batch_end" else 2)
    assert result.reason == "a callback asked for it"


def test_lightnings_early_stopping_and_learning_rate_monitor_work_as_they_are(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    made = script()
    made["optimizer"].param_groups[0]["lr"] = 0.0  # nothing gets better
    stops = callbacks.EarlyStopping(monitor="val_loss", patience=3)
    result = Trainer(
        max_epochs=20,
        val_every_n_epochs=1,
        callbacks=[stops, callbacks.Timer(), callbacks.LambdaCallback(on_train_start=lambda *_: None)],
        session_dir=tmp_path,
        **COMMON,
    ).fit(**made)
    # The first validation sets the mark, and three more do not beat it.
    assert len(result.history["val_loss"]) == 4
    assert stops.wait_count == 3
    assert stops.stopped_epoch == 3


@pytest.mark.parametrize("mode", [False, "observe", True])
def test_callbacks_that_only_look_change_no_bit(mode: Any, tmp_path: Path) -> None:
    losses = []
    for callbacks in ([], [Everything()]):
        trainer = Trainer(
            max_epochs=3, automode=mode, callbacks=callbacks, session_dir=tmp_path, seed=3, **COMMON
        )
        losses.append(trainer.fit(**script()).frame("loss").tolist())
    assert losses[0] == losses[1]


class Counts:
    """No base class; keeps a count and a tensor."""

    def __init__(self) -> None:
        self.n, self.sum, self.epochs = 0, torch.zeros(()), 0

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.n += 1
        self.sum += outputs["loss"].detach()

    def on_train_epoch_start(self, trainer: Any, model: Any) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "sum": self.sum.clone(), "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n, self.sum, self.epochs = state["n"], state["sum"], state["epochs"]


class Cut(Exception):
    """Ends a run as if it had been killed."""


def cut_after(batches: int, fit: Callable[[], object]) -> None:
    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == batches:
            assert keeper.save("periodic") is not None
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit()


def test_what_callbacks_keep_comes_back_with_the_run(tmp_path: Path) -> None:
    def fit(folder: Path, **more: Any) -> Counts:
        first, second = Counts(), Counts()
        Trainer(max_epochs=3, callbacks=[first, second], session_dir=folder, **more, **COMMON).fit(
            **script(rows=100)
        )
        assert (first.n, float(first.sum)) == (second.n, float(second.sum))
        return second

    whole = fit(tmp_path / "whole")
    cut_after(7, lambda: fit(tmp_path))
    resumed = fit(tmp_path, resume="auto")
    assert (resumed.n, resumed.epochs) == (whole.n, whole.epochs) == (15, 3)
    assert torch.equal(resumed.sum, whole.sum)


def test_a_callback_that_cannot_be_stored_or_is_gone_is_said(tmp_path: Path) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"what": object()}

    def fit(callbacks: list[Any], **more: Any) -> Any:
        return Trainer(max_epochs=2, callbacks=callbacks, session_dir=tmp_path, **more, **COMMON).fit(
            **script()
        )

    cut_after(1, lambda: fit([Odd(), Counts()]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([], resume="auto")
    said = "\n".join(str(one.message) for one in caught)
    assert "Odd saves itself as more than numbers" in said
    assert "the callback Counts, which had kept something, is no longer there" in said


def test_exceptions_are_heard_of_and_leave_as_they_came(tmp_path: Path) -> None:
    heard: list[BaseException] = []

    class Hears(Callback):
        def on_exception(self, trainer: Any, model: Any, exception: BaseException) -> None:
            heard.append(exception)
            raise RuntimeError("and more")

        def on_train_batch_end(self, *given: Any) -> None:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        Trainer(callbacks=[Hears()], session_dir=tmp_path, **COMMON).fit(**script())
    assert heard == [caught.value]
    assert any("RuntimeError: and more" in note for note in caught.value.__notes__)


def test_only_hooks_that_are_overridden_are_bound() -> None:
    class One(Callback):
        def on_fit_end(self, trainer: Any, model: Any) -> None:
            """Mine."""

    bound = Callbacks([One(), Callback()])
    assert {hook for hook in HOOKS if "state" not in hook and bound.of(hook)} == {"on_fit_end"}


class Late(Callback):
    def on_after_backward(self, trainer: Any, model: Any) -> None:
        """Never called."""


class Misspelt(Callback):
    def on_train_batch_ends(self, *given: Any) -> None:
        """Never called."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "must be a list of callbacks, got int"),
        ([Counts], r"holds the class Counts; make an object of it: Counts\(\)"),
        ([Late()], "Late.on_after_backward would never be called.*use on_before_optimizer_step"),
        ([Misspelt()], "on_train_batch_ends is no hook; did you mean on_train_batch_end"),
        ([object()], "object has none of the hooks"),
    ],
)
def test_what_would_never_be_called_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(callbacks=given)


def test_lightnings_callbacks_that_need_lightning_are_refused_with_what_to_use_instead() -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    for one, instead in (
        (callbacks.ModelCheckpoint(), "checkpoint_every="),
        (callbacks.RichProgressBar(), "progress="),
        (callbacks.StochasticWeightAveraging(1e-2), "averages"),
        (callbacks.GradientAccumulationScheduler({0: 2}), "accumulate_grad_batches="),
        (callbacks.ModelSummary(), "summary"),
        (callbacks.DeviceStatsMonitor(), "epochs"),
    ):
        with pytest.raises(UsageError, match=instead):
            check_callbacks([one])


def test_what_a_callback_asks_for_and_is_not_there_is_said(tmp_path: Path) -> None:
    class Asks(Callback):
        def on_fit_start(self, trainer: Any, model: Any) -> None:
            trainer.save_checkpoint("x")

    with pytest.raises(
        AttributeError, match=r"trainer\.save_checkpoint, which automode's Trainer does not have"
    ):
        Trainer(callbacks=[Asks()], session_dir=tmp_path, **COMMON).fit(**script())
