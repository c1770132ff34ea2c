"""What the tests of the stacked backend share: networks, optimizers, a bench, and how two results are compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from automode.backends.base import Backend, SegmentDone, SegmentJob, SegmentRunner
from automode.backends.inline import InlineBackend
from automode.backends.stacked import StackedBackend
from automode.planner.recipes import EarlyStopping, TrainingRecipe, Variant
from automode.testing.backends import drained
from automode.testing.bench import (
    CLASSES,
    FEATURES,
    Bench,
    make_bench,
    small_network,
)
from automode.trainer.specialists import SpecialistRunner
from automode.trainer.stackable import StackableSpecialists

STEPS = 40
CLOSE = 1e-10
PLAIN = Variant(name="plain")
MIXED = (
    PLAIN,
    Variant(name="fast", lr_mul=2.0, clip_norm=0.3),
    Variant(name="decayed", weight_decay=0.1),
    Variant(name="weighted", lr_mul=0.5, loss_weight=3.0),
    Variant(name="annealed", schedule="anneal", ema=0.9),
)

Results = dict[int, SegmentDone]


def stackable(runner: SegmentRunner) -> SegmentRunner:
    return StackableSpecialists(runner) if isinstance(runner, SpecialistRunner) else runner


class Convolutions(nn.Module):
    """Features as an image of 2 x 3, two convolutions, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.body(inputs.to(self.body[0].weight.dtype).view(-1, 1, 2, 3))
        return logits


class Attention(nn.Module):
    """Features as a sequence of 6 scalars, one transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 8)
        self.place = nn.Parameter(0.1 * torch.randn(FEATURES, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.lift(inputs.to(self.place.dtype).unsqueeze(-1)) + self.place
        logits: Tensor = self.head(self.layer(hidden).mean(dim=1))
        return logits


class Perceptron(nn.Module):
    """The bench's network, in its weights' own precision."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.body = small_network(**how)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.body(inputs.to(next(self.parameters()).dtype))
        return logits


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0, "lr": 0.02}], lr=0.01
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def bench_of(
    folder: Path,
    model: nn.Module | None = None,
    variants: Sequence[Variant] = MIXED,
    *,
    early_stopping: EarlyStopping | None = None,
    **how: Any,
) -> Bench:
    """A run in double precision, and a card over two thirds of its samples."""
    torch.manual_seed(5)
    network = Perceptron() if model is None else model
    bench = make_bench(folder, model=network.double(), **{"optimizer": adam, "averages": True, **how})
    recipe = TrainingRecipe(variants=tuple(variants), replay=0.25, early_stopping=early_stopping)
    bench.card(recipe, selected=np.arange(64))
    return bench


def jobs_of(
    bench: Bench, variants: Sequence[Variant] = MIXED, *, end: int = STEPS, **how: Any
) -> list[SegmentJob]:
    return [
        replace(bench.job(variant, trial=trial, end=end, **how), per_trunk_step=7.0)
        for trial, variant in enumerate(variants)
    ]


def run(backend: Backend, jobs: Iterable[SegmentJob]) -> Results:
    for job in jobs:
        backend.submit(job)
    found: Results = {}
    for result in drained(backend, seconds=60):
        assert isinstance(result, SegmentDone), result
        found[result.job.trial] = result
    return found


def both(
    bench: Bench, jobs: Sequence[SegmentJob], runner: SegmentRunner | None = None
) -> tuple[Results, Results, list[str]]:
    """The same jobs inline and stacked, and what the stacked backend had to say."""
    runner = StackableSpecialists(bench.runner) if runner is None else runner
    backend = StackedBackend(runner)
    alone, together = run(InlineBackend(runner), jobs), run(backend, jobs)
    return alone, together, [note.text for note in backend.notes()]


def farthest(a: Any, b: Any) -> float:
    """The largest distance between two nested values of one structure."""
    match a:
        case Tensor():
            assert isinstance(b, Tensor)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        case dict():
            assert a.keys() == b.keys()
            return max((farthest(a[key], b[key]) for key in a), default=0.0)
        case list() | tuple():
            assert len(a) == len(b)
            return max((farthest(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
        case float() | int() if not isinstance(a, bool):
            return abs(a - b)
        case _:
            assert a == b
            return 0.0


def assert_equal(bench: Bench, alone: Results, together: Results) -> None:
    """Values, choices, weights, optimizers, averages and random states agree."""
    assert alone.keys() == together.keys()
    for trial, mine in together.items():
        theirs = alone[trial]
        assert mine.value == pytest.approx(theirs.value, abs=CLOSE)
        assert (mine.choice, mine.stopped_early) == (theirs.choice, theirs.stopped_early)
        assert farthest(bench.weights(mine), bench.weights(theirs)) < CLOSE
        assert farthest(bench.rest(mine), bench.rest(theirs)) < CLOSE
