"""Optimizers that step by a closure: LBFGS through the default step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.errors import UsageError
from automode.trainer.closures import needs_closure

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {"progress": False, "console": False}


def script(**given: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = torch.randn(60, 5)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    return {
        "model": model,
        "optimizer": torch.optim.LBFGS(model.parameters(), **{"max_iter": 4, "history_size": 5, **given}),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), 20),
    }


def by_hand(made: dict[str, Any], epochs: int, clip: float | None) -> list[float]:
    losses = []
    for _ in range(epochs):
        for x, y in made["train_loader"]:

            def closure(x: Any = x, y: Any = y) -> Any:
                made["optimizer"].zero_grad()
                loss = made["loss_fn"](made["model"](x), y)
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(made["model"].parameters(), clip)
                return loss

            losses.append(made["optimizer"].step(closure).item())
    return losses


@pytest.mark.parametrize(
    ("mode", "clip", "given"),
    [(False, None, {}), ("observe", 0.1, {}), (True, None, {"line_search_fn": "strong_wolfe"})],
)
def test_the_default_step_drives_it_as_a_loop_written_by_hand(
    mode: Any, clip: float | None, given: dict[str, Any], tmp_path: Path
) -> None:
    made = script(**given)
    trainer = Trainer(max_epochs=4, automode=mode, clip_norm=clip, seed=None, session_dir=tmp_path, **COMMON)
    torch.manual_seed(2)
    result = trainer.fit(**made)
    other = script(**given)
    torch.manual_seed(2)
    assert result.frame("loss").tolist() == by_hand(other, 4, clip)
    for mine, theirs in zip(made["model"].parameters(), other["model"].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_guard_takes_back_a_step_that_leaves_weights_that_are_not_finite(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script(lr=1e38)
    made["train_loader"] = list(made["train_loader"])[:1]
    before = [p.detach().clone() for p in made["model"].parameters()]
    Trainer(automode=True, max_epochs=1, session_dir=tmp_path, **COMMON).fit(**made)
    assert observers[0].told("skipped") == [("skipped", 0, "the optimizer left weights that are not finite")]
    for parameter, value in zip(made["model"].parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    assert not made["optimizer"].state_dict()["state"].get(0, {}).get("n_iter")


def test_the_guard_keeps_a_loss_that_is_not_finite_from_the_optimizer(
    tmp_path: Path, observers: list[Any]
) -> None:
    made = script()
    made["train_loader"].dataset.tensors[0][0] = float("nan")
    Trainer(automode=True, max_steps=2, session_dir=tmp_path, **COMMON).fit(**made)
    assert observers[0].told("skipped") == [("skipped", 0, "the loss is nan")]
    assert observers[0].column("applied") == [0.0, 1.0, 1.0]
    assert all(torch.isfinite(p).all() for p in made["model"].parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accumulate_grad_batches": 2}, "gradients of other batches cannot be added up for it"),
        ({"precision": "fp16"}, "which gradient scaling cannot drive"),
    ],
)
def test_what_a_closure_cannot_do_is_refused(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(session_dir=tmp_path, **given, **COMMON).fit(**script())


def test_only_optimizers_that_cannot_do_without_a_closure_get_one() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert needs_closure(torch.optim.LBFGS(parameters))
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop):
        assert not needs_closure(kind(parameters))

    class Own(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    assert needs_closure(Own(parameters))


def test_no_specialist_is_trained_in_such_a_run_and_it_says_why(tmp_path: Path) -> None:
    result = Trainer(automode=True, session_dir=tmp_path, **COMMON).fit(**script())
    (began,) = result.session.events("session_started")
    assert "LBFGS evaluates the loss itself" in began.body["run"]["why_no_forks"]
