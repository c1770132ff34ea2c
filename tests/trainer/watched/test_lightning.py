"""Lightning's loop with the callback is Lightning's loop without it, bit by bit, while it observes; and it can do what a watch can."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.utils.data import DataLoader

from automode.errors import UsageError
from automode.lightning import AutomodeCallback
from automode.planner.card_text import submission_from_yaml
from automode.planner.policy import Policy
from automode.session import Session, inbox
from automode.trainer.driver import Driver

pytestmark = [
    pytest.mark.torch,
    # Lightning's own advice about this machine and these small loaders.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*litlogger"),
]

BATCHES, EPOCHS = 7, 3


class Module(pl.LightningModule):
    """A network that draws random numbers and keeps running statistics."""

    def __init__(
        self, made: Any, *, manual: bool = False, shows: bool = True, poison: int | None = None
    ) -> None:
        super().__init__()
        self.net, self.loss_fn = made.model, made.loss_fn
        self.automatic_optimization = not manual
        self._optimizer, self._shows, self._poison = made.optimizer, shows, poison
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        out = self(x)
        loss = self.loss_fn(out, y)
        self.losses.append(loss.item())
        if len(self.losses) == self._poison:
            loss = loss * float("nan")
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss, "outputs": out.detach(), "targets": y} if self._shows else None

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self.loss_fn(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return self._optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(self._optimizer, 4, gamma=0.5)
        return {"optimizer": self._optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(made: Any, callback: AutomodeCallback | None, module: Module, **more: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[] if callback is None else [callback],
        **({"max_epochs": EPOCHS} | more),
    )  # fmt: skip
    trainer.fit(module, made.loader, made.held_out)
    return trainer


def automode(folder: Any, mode: str = "observe", **more: Any) -> AutomodeCallback:
    return AutomodeCallback(mode, session_dir=folder, console=False, **({"seed": 3} | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"manual": True},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_a_run_that_is_observed_equals_the_run_that_is_not_bit_by_bit(
    settings: dict[str, Any], script: Any, tmp_path: Any, equal: Any, soundness: Any, frame: Any
) -> None:
    settings = dict(settings)
    manual = settings.pop("manual", False)
    alone = script()
    bare = Module(alone, manual=manual)
    fit(alone, None, bare, **settings)
    made = script()
    module = Module(made, manual=manual)
    callback = automode(tmp_path, loss_fn=made.loss_fn, val=made.held_out)
    trainer = fit(made, callback, module, **settings)
    assert equal(made.state(), alone.state())
    trainer.validate(module, made.held_out, verbose=False)  # after the session's end
    assert module.losses == bare.losses
    watch = callback.watch
    assert watch is not None
    events = soundness(watch.path)
    assert [e.body["why"] for e in events if e.kind == "run_ended"] == ["the loop ended"]
    assert len([e for e in events if e.kind == "validated"]) == EPOCHS
    assert frame(watch.path, "loss") == pytest.approx(
        bare.losses, rel=1e-2 if "precision" in settings else 1e-6
    )
    assert frame(watch.path, "step") == list(range(1, EPOCHS * BATCHES + 1))
    norms = frame(watch.path, "grad_norm")
    assert min(norms) > 0.0
    if "gradient_clip_val" in settings:
        assert max(norms) > 0.51  # before Lightning clips


@pytest.fixture
def _at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(Driver, "stride", 1)


class Person(pl.Callback):
    """Hands a card in at the beginning, approves it, and stops looking."""

    def __init__(self, card: str, callback: AutomodeCallback) -> None:
        self.card, self.callback = card, callback

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        watch = self.callback.watch
        assert watch is not None
        fields = {"card": None, "rev": None, "body": None, "mode": None, "note": "", "actor": "ann"}
        if watch.steps == 0:
            inbox.post(watch.path, fields | {"verb": "submit", "body": submission_from_yaml(self.card)})
        for record in watch.loop.driver.state.cards.values():
            if str(record.state) == "proposed":
                inbox.post(
                    watch.path, fields | {"verb": "approve", "card": record.card.id, "rev": record.card.rev}
                )


def act(made: Any, tmp_path: Any, card: str, module: Module, **more: Any) -> AutomodeCallback:
    callback = automode(tmp_path, "act", **({"policy": Policy.model_validate({"reasons": []})} | more))
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, Person(card, callback)], max_epochs=EPOCHS,
    )  # fmt: skip
    trainer.fit(module, made.loader, made.held_out)
    return callback


@pytest.mark.usefixtures("_at_every_step")
def test_a_card_lowers_the_rate_and_the_schedule_that_lightning_steps(
    script: Any, tmp_path: Any, soundness: Any, frame: Any
) -> None:
    made = script(rate=0.08)
    callback = act(
        made, tmp_path, "{action: adjust, adjustment: {rate_factor: 0.25, clip_norm: 0.01}}", Module(made)
    )
    assert callback.watch is not None
    events = soundness(callback.watch.path)
    assert [e.body["after"] for e in events if e.kind == "card_moved"] == ["approved", "running", "applied"]
    halvings = [0.08 * 0.5 ** (row // 4) for row in range(EPOCHS * BATCHES)]
    rates = frame(callback.watch.path, "lr_0")
    assert rates == pytest.approx([rate if row < 2 else rate / 4 for row, rate in enumerate(halvings)])
    with Session.open(callback.watch.path) as session:
        run = next(session.events("session_started")).body["run"]
    assert (run["total_steps"], run["batch"], run["scheduled"]) == (21, 16.0, True)


@pytest.mark.usefixtures("_at_every_step")
def test_forks_are_refused_and_steps_that_are_not_finite_left_out(
    script: Any, tmp_path: Any, soundness: Any, frame: Any
) -> None:
    fork = "{action: fork, training_recipe: {variants: [{name: half, lr_mul: 0.5}]}, budget_steps: 2, asha: {max_steps: 4}}"
    made = script(norm=False)
    callback = act(made, tmp_path, fork, Module(made, poison=5))
    assert callback.watch is not None
    events = soundness(callback.watch.path)
    (refused,) = [e.body["why"] for e in events if e.kind == "request_refused"]
    assert "no specialist can be trained in this run: the loop is the user's own" in refused
    assert frame(callback.watch.path, "applied") == [1.0] * 4 + [0.0] + [1.0] * 16
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters())


@pytest.mark.usefixtures("_at_every_step")
def test_a_run_that_stays_broken_is_stopped(script: Any, tmp_path: Any, soundness: Any) -> None:
    class Broken(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            found = super().training_step(batch, index)
            return found | {"loss": found["loss"] * float("nan")}

    made = script(norm=False)
    policy = Policy.model_validate({"reasons": [], "safeguards": {"stop_after_nonfinite": 6}})
    module = Broken(made)
    callback = automode(tmp_path, "act", policy=policy)
    fit(made, callback, module)
    assert len(module.losses) == 6
    assert callback.watch is not None
    assert "6 steps in a row were not finite" in str(callback.watch.why_stop)
    soundness(callback.watch.path)


def test_an_exception_ends_the_session_and_passes_on(script: Any, tmp_path: Any, soundness: Any) -> None:
    class Failing(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            if index == 3:
                raise OSError("the disk is gone")
            return super().training_step(batch, index)

    made = script()
    callback = automode(tmp_path)
    with pytest.raises(OSError, match="the disk is gone"):
        fit(made, callback, Failing(made))
    assert callback.watch is not None
    assert soundness(callback.watch.path)[-1].body["why"] == "failed: OSError: the disk is gone"


def test_what_cannot_be_observed_is_said(script: Any, tmp_path: Any) -> None:
    made = script()
    with pytest.raises(UsageError, match="optimizer=1 was asked for, and configure_optimizers gave 1"):
        fit(made, automode(tmp_path, optimizer=1), Module(made))
    made = script()
    callback = automode(tmp_path)
    with pytest.warns(UserWarning, match="training_step returned no loss"):
        fit(made, callback, Module(made, manual=True, shows=False), max_epochs=1)
    assert callback.watch is not None
    assert callback.watch.steps == 0


def test_ids_that_a_module_returns_give_per_sample_losses(script: Any, tmp_path: Any) -> None:
    class Indexed(torch.utils.data.Dataset[Any]):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __len__(self) -> int:
            return len(self.inner)

        def __getitem__(self, index: int) -> Any:
            return (*self.inner[index], index)

    class Telling(Module):
        def training_step(self, batch: Any, index: int) -> Any:
            *batch, ids = batch
            return super().training_step(batch, index) | {"ids": ids}

    made = script()
    made.loader = DataLoader(Indexed(made.loader.dataset), batch_size=16, shuffle=True)
    callback = automode(tmp_path, loss_fn=nn.CrossEntropyLoss())
    fit(made, callback, Telling(made))
    assert callback.watch is not None
    samples = callback.watch.samples
    assert samples is not None, callback.watch.why_no_samples
    assert (samples.n_seen, samples.visits) == (100, 300)


def test_parameters_that_are_thawed_and_added_on_the_way_count_for_the_norm(
    script: Any, tmp_path: Any, frame: Any
) -> None:
    norms: list[float] = []

    class Thaws(BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer)

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
            norms.append(torch.stack(found).sum().sqrt().item())

    class Trains(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    made = script()
    callback = automode(tmp_path)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, Thaws()], max_epochs=EPOCHS,
    )  # fmt: skip
    trainer.fit(Trains(made), made.loader, made.held_out)
    assert callback.watch is not None
    assert frame(callback.watch.path, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert copy.deepcopy(callback).watch is None
