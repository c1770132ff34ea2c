"""Runs that train in a thread, so that a test can order them about."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.session import Record, Session
from automode.trainer.result import FitResult

PATIENCE = 120.0


def script(*, rows: int = 96, batch_size: int = 8, workers: int = 0, lr: float = 0.1) -> dict[str, Any]:
    torch.manual_seed(1)
    inputs = torch.randn(rows, 5)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))
    held_out = TensorDataset(torch.randn(40, 5), (torch.randn(40) > 0).long())
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(
            TensorDataset(inputs, targets), batch_size=batch_size, shuffle=True, num_workers=workers
        ),
        "test_loader": DataLoader(held_out, batch_size=16),
    }


def trainer_in(folder: Path, **given: Any) -> Trainer:
    settings = {
        "max_epochs": 3,
        "session_dir": folder,
        "progress": False,
        "console": False,
        "seed": 3,
        "automode": "observe",
    }
    return Trainer(**{**settings, **given})


class Run:
    """A fit in a thread of its own, paused before its first step unless told otherwise."""

    def __init__(self, folder: Path, made: dict[str, Any] | None = None, **given: Any) -> None:
        self.trainer = trainer_in(folder, **{"start_paused": True, **given})
        self.made = made or script()
        self.folder = folder
        self._result: FitResult | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()
        if self.trainer.settings.start_paused:
            assert self.trainer.wait_until_paused(PATIENCE) or self.ended().steps >= 0

    def _fit(self) -> None:
        try:
            self._result = self.trainer.fit(**self.made)
        except BaseException as error:
            self._error = error

    def train(self, steps: int) -> None:
        """Train so many steps, and wait until it is paused."""
        self.trainer.step(steps, timeout=PATIENCE)
        assert self.trainer.wait_until_paused(PATIENCE)

    def ended(self) -> FitResult:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def finish(self) -> FitResult:
        self.trainer.resume(timeout=PATIENCE)
        return self.ended()

    @property
    def path(self) -> Path:
        return newest(self.folder)

    def events(self, kind: str, **more: Any) -> list[Record]:
        with Session.open(self.path) as session:
            return list(session.events(kind, **more))

    def give_up(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._thread.is_alive() and time.monotonic() < deadline:
            if self.trainer.running:
                try:
                    self.trainer.stop(timeout=1.0)
                except Exception:
                    time.sleep(0.01)
            self._thread.join(0.05)
        assert not self._thread.is_alive()


class Desk:
    """Starts runs, and compares them."""

    patience = PATIENCE
    script = staticmethod(script)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Run] = []

    def run(self, made: dict[str, Any] | None = None, **given: Any) -> Run:
        """Start a run that is ended with the test."""
        self.started.append(Run(self.folder / str(len(self.started)), made, **given))
        return self.started[-1]

    def fit(self, made: dict[str, Any] | None = None, folder: Path | None = None, **given: Any) -> FitResult:
        """Train in this thread, undisturbed."""
        return self.trainer(folder, **given).fit(**(made or script()))

    def trainer(self, folder: Path | None = None, **given: Any) -> Trainer:
        return trainer_in(folder or self.folder / "fits", **given)

    @staticmethod
    def same(left: FitResult, right: FitResult, *, decided: bool = True) -> None:
        """Insist that two runs are equal bit by bit: weights, rows, and what was decided."""
        assert all(torch.equal(a, b) for a, b in zip(weights(left), weights(right), strict=True))
        for name in ("loss", "grad_norm", "lr_0", "step"):
            assert left.frame(name).tolist() == right.frame(name).tolist(), name
        if not decided:
            return
        told = [[(r.kind, r.body) for r in run.session.events(role="fact")] for run in (left, right)]
        assert told[0] == told[1]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Runs to be ordered about; they are ended with the test."""
    made = Desk(tmp_path)
    yield made
    for each in made.started:
        each.give_up()


def newest(folder: Path) -> Path:
    return max((folder / "default").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def weights(result: FitResult) -> list[torch.Tensor]:
    return list(result.model.state_dict().values())
