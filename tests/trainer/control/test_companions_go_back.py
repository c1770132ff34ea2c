"""Callbacks, metrics, loggers, accumulated gradients, flat buffers and the loader of tensors when a run goes back to an earlier state."""

from __future__ import annotations

import csv
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from automode import Callback, FlatAdamW, TensorLoader

pytestmark = pytest.mark.torch


class Counts(Callback):
    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class MeanOutput:
    def __init__(self) -> None:
        self.sum, self.n = 0.0, 0

    def update(self, outputs: Any, targets: Any) -> None:
        self.sum, self.n = self.sum + float(outputs.sum()), self.n + len(targets)

    def compute(self) -> float:
        return self.sum / self.n

    def reset(self) -> None:
        self.sum, self.n = 0.0, 0


def cells(path: Path, name: str) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("every", [1, 5])
def test_everything_that_goes_along_goes_back_with_the_run(every: int, desk: Any) -> None:
    def made() -> dict[str, Any]:
        script = desk.script()
        dataset = script["train_loader"].dataset
        script["train_loader"] = TensorLoader(
            dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(5)
        )
        script["optimizer"] = FlatAdamW(script["model"].parameters(), lr=1e-2)
        return script

    def given() -> dict[str, Any]:
        return {
            "callbacks": [Counts()],
            "metrics": {"mean": MeanOutput()},
            "logger": ["csv", "tensorboard"],
            "accumulate_grad_batches": every,
        }

    plain = desk.fit(made(), **given())
    run = desk.run(made(), **given())
    run.train(15)
    kept = run.trainer.checkpoint(timeout=desk.patience).result["checkpoint"]
    run.train(12)
    run.trainer.load(kept, timeout=desk.patience)
    run.trainer.wait_until_paused(desk.patience)
    result = run.finish()
    desk.same(plain, result)
    assert json.dumps(result.history) == json.dumps(plain.history)
    assert run.trainer.settings.callbacks[0].batches == 36
    for name in ("row", "step", "loss", "train_loss", "train_mean"):
        assert cells(result.path / "metrics.csv", name) == cells(plain.path / "metrics.csv", name), name
    mine, theirs = result.session.frames("epochs"), plain.session.frames("epochs")
    for name in ("epoch", "train_loss", "train_mean", "weight_norm"):
        np.testing.assert_array_equal(mine[name], theirs[name])
    gc.collect()  # a file that was left open would be told of here
