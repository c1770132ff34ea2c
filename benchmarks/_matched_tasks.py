"""Tasks of the matched-compute benchmark: digits in four views, and three sets of letters and digits in one task.

Splits are 60 % training, 20 % validation, 20 % test, drawn anew for every seed; wrong labels are in training and validation
alike, never in the test set. The views of one digit stay in one split.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
CLASSES = 10
SOURCES = ("mnist", "kmnist", "notmnist")


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part of a task: inputs [n, d], labels [n] as given, and the source (view) of every sample."""

    x: Floats
    y: Ints
    source: Ints


@dataclass(frozen=True, kw_only=True)
class Data:
    """A task under one seed."""

    train: Split
    val: Split
    test: Split


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, on what, for how long."""

    name: str
    make: Callable[[int], Data]
    hidden: int
    batch: int
    epochs: int
    noisy: bool
    sources: tuple[str, ...]


def digits4(seed: int, *, noise: float = 0.0) -> Data:
    """scikit-learn's digits: plain, rotated by a quarter, inverted and permuted (one permutation for all)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).reshape(-1, 8, 8).astype(np.float32)
    order = np.random.default_rng(7).permutation(64)
    views = np.stack(
        [
            images.reshape(-1, 64),
            np.rot90(images, axes=(1, 2)).reshape(-1, 64),
            1.0 - images.reshape(-1, 64),
            images.reshape(-1, 64)[:, order],
        ],
        axis=1,
    )
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    parts = _parts(len(images), rng)

    def split(which: Ints, wrong: float) -> Split:
        x = views[which].reshape(-1, 64)
        y = np.repeat(labels[which].astype(np.int64), 4)
        source = np.tile(np.arange(4), which.size)
        return Split(x=x, y=symmetric(y, wrong, rng), source=source)

    return Data(train=split(parts[0], noise), val=split(parts[1], noise), test=split(parts[2], 0.0))


def mkn(
    seed: int,
    *,
    corrupt: Callable[[Ints, np.random.Generator], Ints] | None = None,
    keep: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Data:
    """MNIST, KMNIST and notMNIST (10 000 images each, 14 x 14) as one task; ``keep``: share of each in training and validation.

    Of images that are equal (196 of notMNIST are) one is kept, since a run whose validation set holds training samples proves nothing.
    """
    x, y, source = _letters()
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    parts = _parts(len(x), rng)

    def split(which: Ints, given: bool) -> Split:
        if given:
            which = which[rng.random(which.size) < np.asarray(keep)[source[which]]]
        labels = y[which]
        return Split(
            x=x[which], y=corrupt(labels, rng) if given and corrupt else labels, source=source[which]
        )

    return Data(train=split(parts[0], True), val=split(parts[1], True), test=split(parts[2], False))


def symmetric(y: Ints, share: float, rng: np.random.Generator) -> Ints:
    """Give a share of the samples another class, all others alike."""
    wrong = rng.random(y.size) < share
    return np.where(wrong, (y + rng.integers(1, CLASSES, y.size)) % CLASSES, y)


def pairs(y: Ints, share: float, rng: np.random.Generator) -> Ints:
    """Give a share of the samples the next class."""
    return np.where(rng.random(y.size) < share, (y + 1) % CLASSES, y)


def _parts(n: int, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    order = rng.permutation(n)
    return order[: int(0.6 * n)], order[int(0.6 * n) : int(0.8 * n)], order[int(0.8 * n) :]


_CACHE: dict[str, Any] = {}


def _letters() -> tuple[Floats, Ints, Ints]:
    if "letters" not in _CACHE:
        folder = Path(os.environ["AUTOMODE_DATA"]) / "images"
        sets = [
            (_idx(folder / "mnist_img.gz"), _idx(folder / "mnist_lab.gz")),
            (_npz(folder / "kmnist_img.npz"), _npz(folder / "kmnist_lab.npz")),
            (_idx(folder / "notmnist_img.gz"), _idx(folder / "notmnist_lab.gz")),
        ]
        x = np.concatenate([images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) for images, _ in sets])
        y = np.concatenate([labels for _, labels in sets]).astype(np.int64)
        source = np.repeat(np.arange(3), [len(labels) for _, labels in sets])
        x = (x.reshape(-1, 196) / 255.0).astype(np.float32)
        _, first = np.unique(x.view(np.dtype((np.void, x[0].nbytes)))[:, 0], return_index=True)
        first.sort()
        _CACHE["letters"] = (x[first], y[first], source[first])
    found: tuple[Floats, Ints, Ints] = _CACHE["letters"]
    return found


def _idx(path: Path) -> npt.NDArray[np.uint8]:
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _npz(path: Path) -> npt.NDArray[np.uint8]:
    with np.load(path, allow_pickle=False) as archive:
        found: npt.NDArray[np.uint8] = archive[archive.files[0]]
    return found


def _mkn_task(name: str, make: Callable[[int], Data], *, hidden: int = 128, noisy: bool) -> Task:
    return Task(name=name, make=make, hidden=hidden, batch=128, epochs=20, noisy=noisy, sources=SOURCES)


VIEWS = ("plain", "rotated", "inverted", "permuted")
TASKS = {
    task.name: task
    for task in (
        Task(
            name="digits4",
            make=digits4,
            hidden=32,
            batch=64,
            epochs=40,
            noisy=False,
            sources=VIEWS,
        ),
        Task(
            name="digits4_n20",
            make=lambda seed: digits4(seed, noise=0.2),
            hidden=64,
            batch=64,
            epochs=40,
            noisy=True,
            sources=VIEWS,
        ),
        _mkn_task("mkn_h32", mkn, hidden=32, noisy=False),
        _mkn_task(
            "mkn_n20", lambda seed: mkn(seed, corrupt=lambda y, rng: symmetric(y, 0.2, rng)), noisy=True
        ),
        _mkn_task(
            "mkn_n40", lambda seed: mkn(seed, corrupt=lambda y, rng: symmetric(y, 0.4, rng)), noisy=True
        ),
        _mkn_task(
            "mkn_pair30", lambda seed: mkn(seed, corrupt=lambda y, rng: pairs(y, 0.3, rng)), noisy=True
        ),
        _mkn_task("mkn_imb", lambda seed: mkn(seed, keep=(0.1, 0.3, 1.0)), hidden=64, noisy=False),
    )
}
