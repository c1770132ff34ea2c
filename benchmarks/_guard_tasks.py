"""Clean tasks, ways to train on them, and cards to hand in: what the guard is tried on.

Every task has right labels, held-out data apart from what is trained on, and a test set that is far larger than both, which no
session ever sees. What a seed decides: the data, first weights, rate, schedule, which cards are handed in and when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from automode.planner.policy import Policy

Floats = npt.NDArray[np.float32]
Pair = tuple[Tensor, Tensor]
TRAIN, HELD_OUT, TEST = 800, 800, 60_000
BATCH, EPOCHS, GROUP = 32, 24, 200
RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True, kw_only=True)
class Data:
    """One task under one seed; ``slices`` are ids of held-out samples."""

    train: Pair
    val: Pair
    test: Pair
    slices: dict[str, list[int]] = field(default_factory=dict)

    @property
    def group(self) -> list[int]:
        """The training samples that are nearest to the first one: what specialists are for."""
        x = self.train[0]
        return [int(i) for i in (x - x[0]).square().sum(dim=1).argsort()[:GROUP]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learnt by what."""

    name: str
    make: Callable[[int], Data]
    inputs: int
    hidden: int
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]

    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(self.inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.outputs)
        )


@lru_cache(maxsize=1)
def _images() -> tuple[Floats, npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16.0).reshape(-1, 8, 8).astype(np.float32), labels.astype(np.int64)


def _shifted(images: Floats, rng: np.random.Generator) -> Floats:
    """Move every image by up to a pixel each way and turn it by up to 10 degrees, with some noise: no two are equal."""
    n = len(images)
    angle = rng.uniform(-np.pi / 18, np.pi / 18, n)
    cos, sin = np.cos(angle), np.sin(angle)
    shift = rng.uniform(-0.25, 0.25, (2, n))
    theta = np.stack([np.stack([cos, -sin, shift[0]], 1), np.stack([sin, cos, shift[1]], 1)], 1)
    grid = torch.nn.functional.affine_grid(
        torch.from_numpy(theta.astype(np.float32)), [n, 1, 8, 8], align_corners=False
    )
    moved = torch.nn.functional.grid_sample(torch.from_numpy(images)[:, None], grid, align_corners=False)
    out: Floats = moved[:, 0].numpy() + rng.normal(0.0, 0.05, images.shape).astype(np.float32)
    return out


def _parts(n: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Indices of 600 images to train on, 400 held out, and the rest."""
    order = rng.permutation(n)
    return order[:600], order[600:1000], order[1000:]


def digits(seed: int, *, views: bool = False) -> Data:
    """scikit-learn's digits, each a little moved and turned; with ``views`` plain, rotated by a quarter, inverted or permuted."""
    rng = np.random.default_rng([seed, 11])
    images, labels = _images()
    scramble = np.random.default_rng(7).permutation(64)
    kinds = 4 if views else 1

    def part(which: Any, times: int) -> tuple[Pair, npt.NDArray[np.int64]]:
        which = np.repeat(which, times)
        moved = _shifted(images[which], rng)
        kind = rng.integers(0, kinds, which.size)
        seen = np.stack(
            [
                moved.reshape(-1, 64),
                np.rot90(moved, axes=(1, 2)).reshape(-1, 64),
                1.0 - moved.reshape(-1, 64),
                moved.reshape(-1, 64)[:, scramble],
            ]
        )[kind, np.arange(which.size)]
        return (torch.from_numpy(np.ascontiguousarray(seen)), torch.from_numpy(labels[which])), kind

    parts = _parts(len(images), rng)
    train, _ = part(parts[0], 1)
    val, kind = part(parts[1], 2)
    test, _ = part(parts[2], TEST // len(parts[2]))
    names = {name: np.flatnonzero(kind == i).tolist() for i, name in enumerate(VIEWS)} if views else {}
    return Data(train=train, val=val, test=test, slices=names)


VIEWS = ("plain", "rotated", "inverted", "permuted")


def _drawn(seed: int, draw: Callable[[np.random.Generator, int], tuple[Floats, Any]]) -> Data:
    rng = np.random.default_rng([seed, 12])
    x, y = draw(rng, TRAIN + HELD_OUT + TEST)
    inputs, targets = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)
    held, test = TRAIN, TRAIN + HELD_OUT
    return Data(
        train=(inputs[:held], targets[:held]),
        val=(inputs[held:test], targets[held:test]),
        test=(inputs[test:], targets[test:]),
    )


def moons(seed: int) -> Data:
    """Two half circles, noisy."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Floats, Any]:
        y, angle = rng.integers(0, 2, n), rng.uniform(0.0, np.pi, n)
        x = np.stack([np.cos(angle), np.sin(angle)], 1) * (1 - 2 * y[:, None]) + y[:, None] * [1.0, 0.5]
        return (x + rng.normal(0.0, 0.25, x.shape)).astype(np.float32), y

    return _drawn(seed, draw)


def blobs(seed: int) -> Data:
    """Ten classes of two Gaussian clouds each, in eight dimensions, that overlap."""
    centres = np.random.default_rng([seed, 13]).normal(0.0, 1.3, (20, 8))

    def draw(rng: np.random.Generator, n: int) -> tuple[Floats, Any]:
        cloud = rng.integers(0, 20, n)
        return (centres[cloud] + rng.normal(0.0, 1.0, (n, 8))).astype(np.float32), cloud % 10

    return _drawn(seed, draw)


def friedman(seed: int) -> Data:
    """Friedman's first regression (1991, Annals of Statistics 19), standardized, with noise of a fifth of its spread."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Floats, Any]:
        x = rng.uniform(0.0, 1.0, (n, 10))
        y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        y = (y - 14.4) / 4.9 + rng.normal(0.0, 0.2, n)
        return (2 * x - 1).astype(np.float32), y.astype(np.float32)[:, None]

    return _drawn(seed, draw)


_CLASSES = nn.functional.cross_entropy
TASKS = {
    task.name: task
    for task in (
        Task(name="digits", make=digits, inputs=64, hidden=32, outputs=10, loss=_CLASSES),
        Task(
            name="digits4",
            make=lambda seed: digits(seed, views=True),
            inputs=64,
            hidden=32,
            outputs=10,
            loss=_CLASSES,
        ),
        Task(name="blobs", make=blobs, inputs=8, hidden=32, outputs=10, loss=_CLASSES),
        Task(name="moons", make=moons, inputs=2, hidden=16, outputs=2, loss=_CLASSES),
        Task(name="friedman", make=friedman, inputs=10, hidden=32, outputs=1, loss=nn.functional.mse_loss),
    )
}


def _fork(selection: dict[str, Any], variants: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    recipe = {"replay": 0.1 if selection["kind"] != "all" else 0.0, "variants": variants}
    return {"action": "fork", "selection": selection, "training_recipe": recipe} | more


_ALL: dict[str, Any] = {"kind": "all"}
_GROUP: dict[str, Any] = {"kind": "indices", "ids": [0]}  # Data.group is put in its place
_HARD: dict[str, Any] = {"kind": "quantile", "from": 0.7, "to": 1.0, "exclude_suspects": False}
_PAIR = [{"name": "specialist"}, {"name": "gentle specialist", "lr_mul": 0.5}]

CARDS: dict[str, dict[str, Any]] = {
    "rates": _fork(_ALL, [{"name": "rate x3", "lr_mul": 3.0}, {"name": "rate /3", "lr_mul": 1 / 3}]),
    "restless": _fork(_ALL, [{"name": "rate x10", "lr_mul": 10.0}, {"name": "rate x3", "lr_mul": 3.0}]),
    "decay": _fork(
        _ALL,
        [{"name": "decay .1", "weight_decay": 0.1}, {"name": "decay 1", "weight_decay": 1.0}],
    ),
    "flat": _fork(
        _ALL,
        [
            {"name": "sam", "optimizer": "sam", "sam_rho": 0.05},
            {"name": "sam .2", "optimizer": "sam", "sam_rho": 0.2},
        ],
    ),
    "average": _fork(_ALL, [{"name": "ema", "ema": 0.97}, {"name": "plain"}]),
    "hard": _fork(_HARD, [{"name": "hard samples", "loss_weight": 2.0}]),
    "specialists": _fork(_GROUP, _PAIR),
    "uniform soup": _fork(_GROUP, _PAIR, merge_recipe={"kind": "uniform"}),
    "greedy soup": _fork(_GROUP, _PAIR, merge_recipe={"kind": "greedy"}),
    "interpolation": _fork(_GROUP, _PAIR, merge_recipe={"kind": "interpolate", "weights": [0.25, 0.5, 0.75]}),
    "Fisher soup": _fork(_GROUP, _PAIR, merge_recipe={"kind": "fisher_soup"}),
    "distillation": _fork(_GROUP, _PAIR, merge_recipe={"kind": "distill", "steps": 20}),
    "anneal": _fork(
        _ALL,
        [
            {"name": "anneal", "schedule": "anneal"},
            {"name": "anneal x3", "schedule": "anneal", "lr_mul": 3.0},
        ],
    ),
    "gate": _fork(_GROUP, _PAIR, gate_recipe={"kind": "switch_softmax", "epochs": 5}),
    "merge": {
        "action": "merge",
        "merge_recipe": {"kind": "swa"},
        "acceptance": {"z": Policy().averages.z},
    },
}
"""Cards by kind: as somebody would hand them in, less the ladder; a merge asks for what the finishing merge is held to."""

FORKS = tuple(kind for kind in CARDS if kind != "merge")


FORKS_AT, MERGES_AT, LADDERS = (0.08, 0.26, 0.44, 0.62), (0.17, 0.35, 0.53, 0.71), (0.03, 0.05)
"""Shares of the run: when forks and merges are handed in, and how long a ladder is."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One session: how it is trained, and which cards are handed in."""

    task: str
    seed: int
    rate: float
    cosine: bool
    sgd: bool
    cards: dict[float, tuple[str, float]]
    """Share of the run to (kind, length of the ladder as a share of the run); none: the default policy's own cards alone."""


def plan(task: str, seed: int, *, own_cards: bool) -> Plan:
    """Draw a session's plan."""
    rng = np.random.default_rng([seed, 14, crc32(task.encode())])
    cards: dict[float, tuple[str, float]] = {}
    if own_cards:
        for at, kind in zip(FORKS_AT, rng.permutation(FORKS), strict=False):
            cards[at] = (str(kind), float(rng.choice(LADDERS)))
        cards |= dict.fromkeys(MERGES_AT, ("merge", 0.0))
    return Plan(
        task=task,
        seed=seed,
        rate=float(rng.choice(RATES)),
        cosine=bool(rng.random() < 0.5),
        sgd=bool(rng.random() < 0.25),
        cards=cards,
    )
