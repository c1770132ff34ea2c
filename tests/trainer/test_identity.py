"""Watching changes nothing: losses, weights and random states are those of the plain loop, bit by bit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode.planner.policy import DiagnosticPolicy, PacingPolicy, Policy, ScanPolicy
from automode.trainer.random_state import RandomState
from automode.trainer.trainer import Trainer

EPOCHS = 3


@dataclass(frozen=True)
class Script:
    """One training script: what is made, in the order in which a user makes it."""

    workers: int = 0
    generator: bool = False
    scheduler: str | None = None
    validates: bool = False
    clip: float | None = None
    optimizer: str = "adam"
    shared_generator: bool = False

    def build(self) -> dict[str, Any]:
        random.seed(3)
        np.random.seed(4)  # noqa: NPY002  # the global generator is what is compared
        torch.manual_seed(5)
        inputs = torch.randn(90, 6)
        targets = (inputs[:, :3].sum(1) > 0).long()
        model = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)
        )
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        else:
            optimizer = torch.optim.SGD(
                model.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True, weight_decay=1e-3
            )
        generator = torch.Generator().manual_seed(9) if self.generator else None
        dataset = TensorDataset(inputs, targets)
        schedulers = {
            None: lambda: None,
            "epoch": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
            "step": lambda: torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=0.05, epochs=EPOCHS, steps_per_epoch=6
            ),
        }
        return {
            "model": model,
            "optimizer": optimizer,
            "loss_fn": nn.CrossEntropyLoss(),
            "train_loader": DataLoader(
                dataset, batch_size=16, shuffle=True, num_workers=self.workers, generator=generator
            ),
            "val_loader": DataLoader(
                TensorDataset(torch.randn(30, 6), torch.randint(0, 2, (30,))),
                batch_size=8,
                shuffle=True,
                generator=generator if self.shared_generator else None,
            )
            if self.validates
            else None,
            "scheduler": schedulers[self.scheduler](),
        }


def bare_loop(
    script: Script, epochs: int = EPOCHS
) -> tuple[list[float], dict[str, Tensor], RandomState, Any]:
    """What a person writes by hand."""
    made = script.build()
    model, optimizer, loss_fn = made["model"], made["optimizer"], made["loss_fn"]
    losses = []
    for _ in range(epochs):
        for inputs, targets in made["train_loader"]:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            if script.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), script.clip)
            optimizer.step()
            if script.scheduler == "step":
                made["scheduler"].step()
            losses.append(loss.item())
        if script.scheduler == "epoch":
            made["scheduler"].step()
    return losses, model.state_dict(), RandomState.capture(), made


SCRIPTS = {
    "plain": Script(),
    "generator": Script(generator=True),
    "scheduler per epoch, validation": Script(scheduler="epoch", validates=True),
    "scheduler per step, clipping": Script(scheduler="step", clip=0.5),
    "nesterov that writes to the gradients": Script(optimizer="sgd", validates=True),
    "validation shares the generator": Script(generator=True, validates=True, shared_generator=True),
    "workers": Script(workers=2),
    "workers, generator, scheduler, validation": Script(
        workers=2, generator=True, scheduler="epoch", validates=True
    ),
}


@pytest.mark.parametrize("mode", ["off", "observe"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_watched_run_equals_the_plain_loop_bit_by_bit(name: str, mode: Any, tmp_path: Path) -> None:
    script = SCRIPTS[name]
    losses, weights, rng, bare = bare_loop(script)
    made = script.build()
    flags = {key: module.training for key, module in made["model"].named_modules()}
    trainer = Trainer(
        max_epochs=EPOCHS,
        automode=mode,
        session_dir=tmp_path,
        val_every_n_epochs=1 if script.validates else 0,
        clip_norm=script.clip,
        scheduler_interval="step" if script.scheduler == "step" else "epoch",
        progress=False,
        console=False,
    )
    result = trainer.fit(**made)
    assert RandomState.capture().same_as(rng)
    assert result.frame("loss").tolist() == losses
    assert all(torch.equal(value, weights[key]) for key, value in made["model"].state_dict().items())
    assert {key: module.training for key, module in made["model"].named_modules()} == flags
    assert made["optimizer"].param_groups[0]["lr"] == bare["optimizer"].param_groups[0]["lr"]
    if script.generator:
        mine, theirs = made["train_loader"].generator, bare["train_loader"].generator
        assert torch.equal(mine.get_state(), theirs.get_state())
    assert result.steps == len(losses) == 18
    assert result.reason == "max_epochs"
    if script.validates:
        assert all(loss > 0 for loss in result.history["val_loss"])


def test_scans_and_rules_that_run_meanwhile_change_nothing(tmp_path: Path) -> None:
    script = Script(scheduler="epoch", validates=True)
    losses, weights, rng, _ = bare_loop(script, epochs=30)
    made = script.build()
    policy = Policy(
        scan=ScanPolicy(every=20, share=1.0, cost=1.0, probe=64, min_visits=1.0),
        pacing=PacingPolicy(warmup_steps=0),
        diagnostics=DiagnosticPolicy(every=30, share=1.0, examples=32, probe=16),
    )
    trainer = Trainer(
        max_epochs=30,
        automode="observe",
        policy=policy,
        session_dir=tmp_path,
        val_every_n_epochs=1,
        progress=False,
        console=False,
    )
    result = trainer.fit(**made)
    assert RandomState.capture().same_as(rng)
    assert result.frame("loss").tolist() == losses
    assert all(torch.equal(value, weights[key]) for key, value in made["model"].state_dict().items())
    assert len(list(result.session.events("scanned"))) >= 5
    assert len(list(result.session.events("clustered"))) >= 5
    assert len(list(result.session.events("validated"))) == 30
    read = [event.body["sharpness"] for event in result.session.events("diagnosed")]
    assert len([value for value in read if value is not None]) >= 2
