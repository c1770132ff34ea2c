"""Loops as a person writes them, bare and watched, from the same seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import automode
from automode import replay
from automode.session import Session
from automode.trainer.random_state import RandomState, seed_everything
from automode.trainer.watching import Watch

FEATURES, CLASSES, BATCH, SAMPLES = 6, 3, 16, 100


@dataclass
class Made:
    """What a script makes before its loop."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]
    held_out: DataLoader[Any]
    loss_fn: Any
    scheduler: Any = None
    scaler: Any = None

    def state(self) -> dict[str, Any]:
        """Everything that a run ends with."""
        return {
            "weights": {k: v.clone() for k, v in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "training": [m.training for m in self.model.modules()],
            "random": RandomState.capture(),
        }


def samples(n: int, seed: int) -> TensorDataset:
    rng = np.random.default_rng(np.random.SeedSequence([seed, n]))
    x = rng.standard_normal((n, FEATURES)).astype(np.float32)
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(np.abs(x[:, :CLASSES]).argmax(axis=1)))


def make(
    *,
    rate: float = 0.05,
    optimizer: str = "adam",
    norm: bool = True,
    dropout: float = 0.2,
    steplr: bool = False,
) -> Made:
    seed_everything(11)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 16)]
    if norm:
        layers.append(nn.BatchNorm1d(16))
    model = nn.Sequential(*layers, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES))
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    made = kind(model.parameters(), lr=rate)
    return Made(
        model=model,
        optimizer=made,
        loader=DataLoader(samples(SAMPLES, 1), batch_size=BATCH, shuffle=True),
        held_out=DataLoader(samples(120, 2), batch_size=50),
        loss_fn=nn.CrossEntropyLoss(),
        scheduler=torch.optim.lr_scheduler.StepLR(made, 4, gamma=0.5) if steplr else None,
    )


def same(a: Any, b: Any) -> bool:
    """Equal bit by bit, whatever is nested in what."""
    match a:
        case Tensor():
            return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        case RandomState():
            return a.same_as(b)
        case dict():
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        case list() | tuple():
            return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        case _:
            return bool(a == b)


def sound(path: Path) -> list[Any]:
    """What holds of every session; returns its events."""
    report = replay(path)
    assert report.differences == 0, report.first
    with Session.open(path) as session:
        session.verify()
        events = list(session.events())
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert events[-1].kind == "run_ended" or any(e.kind == "run_ended" for e in events)
    return events


@dataclass
class Seen:
    """A loop that has run: what it made, the losses that it computed, and its watch."""

    made: Made
    losses: list[float] = field(default_factory=list)
    watch: Watch | None = None


@pytest.fixture
def script() -> Callable[..., Made]:
    return make


@pytest.fixture
def equal() -> Callable[[Any, Any], bool]:
    return same


@pytest.fixture
def soundness() -> Callable[[Path], list[Any]]:
    return sound


@pytest.fixture
def frame() -> Callable[[Path, str], list[float]]:
    def read(path: Path, name: str) -> list[float]:
        with Session.open(path) as session:
            return session.frame(name).tolist()

    return read


@pytest.fixture
def watching(tmp_path: Path) -> Iterator[Callable[..., Watch]]:
    """Makes watches without a word on the console, and closes those that a test leaves open."""
    made: list[Watch] = []

    def watch(script: Made, **more: Any) -> Watch:
        values = {"session_dir": tmp_path, "console": False, "seed": 3} | more
        made.append(automode.watch(script.model, script.optimizer, **values))
        return made[-1]

    yield watch
    for watch_made in made:
        with contextlib.suppress(Exception):
            watch_made.close()
