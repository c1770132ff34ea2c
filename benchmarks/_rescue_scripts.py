"""Four sound training scripts, and ten ways to break one: scikit-learn's digits and generated data, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from _study_tasks import Attention
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]
Schedule = Literal["cosine", "constant"]

VAL, TEST = 400, 397
WRONG, RARER, BROKEN_IN, FAR_OFF, FEW, LONGER = 0.3, 20, 600, 16, 100, 3


@dataclass(frozen=True, kw_only=True)
class Script:
    """Everything that a training script decides; a fault changes some of it.

    ``groups`` names the class (or the region of a regression) of every training sample; ``best_epoch`` keeps the weights of the
    epoch whose validation loss was lowest, as early stopping does. ``judge`` is the held-out loss.
    """

    train: Pair
    groups: Tensor
    val: Pair
    test: Pair
    network: Callable[[], nn.Module]
    loss: LossFn
    judge: LossFn
    rate: float
    decay: float
    schedule: Schedule = "cosine"
    batch: int = 16
    epochs: int = 50
    best_epoch: bool = False

    def keep(self, rows: Tensor) -> Script:
        """The same script on some of the training samples."""
        return replace(self, train=(self.train[0][rows], self.train[1][rows]), groups=self.groups[rows])


class LastSymbol(nn.Module):
    """A transformer of one block that predicts the symbol after its window."""

    def __init__(self, symbols: int, length: int) -> None:
        super().__init__()
        self.body = Attention(symbols, length)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)[:, -1]
        return out


@lru_cache(maxsize=4)
def _text(seed: int, symbols: int = 12, length: int = 8, rows: int = 1000 + VAL + TEST) -> Pair:
    """Windows of a source whose next symbol depends on the two before it, and the symbol that follows."""
    rng = np.random.default_rng([seed, 4])
    table = rng.dirichlet(np.full(symbols, 0.1), size=(symbols, symbols)).cumsum(axis=-1)
    stream = [0, 1]
    for u in rng.random(8 * rows + length):
        stream.append(min(symbols - 1, int(np.searchsorted(table[stream[-2], stream[-1]], u))))
    # No window twice: held-out ones must not be among those trained on.
    windows = np.lib.stride_tricks.sliding_window_view(stream, length + 1)
    windows = windows[np.unique(windows[:, :-1], axis=0, return_index=True)[1]]
    picked = torch.from_numpy(windows[rng.permutation(len(windows))[:rows]].copy())
    return picked[:, :-1], picked[:, -1]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def _transformer() -> nn.Module:
    return LastSymbol(12, 8)


def script(network: str, seed: int) -> Script:
    """The sound script of a network, its rate and weight decay still to be chosen; splits follow from the seed."""
    rng = np.random.default_rng([seed, 1])
    loss: LossFn = nn.functional.cross_entropy
    match network:
        case "mlp" | "cnn":
            digits = load_digits()
            x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
            y = torch.tensor(digits.target)
            if network == "cnn":
                x = x.view(-1, 1, 8, 8)
            made, groups = (_mlp if network == "mlp" else _cnn), y
        case "regression":
            raw, target = make_friedman1(n_samples=1000 + VAL + TEST, noise=1.0, random_state=seed)
            x = torch.tensor(raw, dtype=torch.float32)
            y = torch.tensor((target - target.mean()) / target.std(), dtype=torch.float32).unsqueeze(1)
            made, groups, loss = _regressor, (x[:, 3] * 10).long().clamp(0, 9), nn.functional.mse_loss
        case _:
            x, y = _text(seed)
            made, groups = _transformer, y
    order = torch.from_numpy(rng.permutation(len(x)))
    test, val, train = order[:TEST], order[TEST : TEST + VAL], order[TEST + VAL : TEST + VAL + 1000]
    return Script(
        train=(x[train], y[train]),
        groups=groups[train],
        val=(x[val], y[val]),
        test=(x[test], y[test]),
        network=made,
        loss=loss,
        judge=loss,
        rate=1e-3,
        decay=0.01,
    )


NETWORKS = ("mlp", "cnn", "regression", "transformer")


def broken(fault: str, sound: Script, seed: int) -> tuple[Script, Script]:
    """Break a script; returns it broken, and as somebody would write it who knows the fault and its cure."""
    rng = np.random.default_rng([seed, 2])
    match fault:
        case "rate x10":
            return replace(sound, rate=10 * sound.rate), sound
        case "rate /10":
            return replace(sound, rate=sound.rate / 10), sound
        case "no schedule":
            return replace(sound, schedule="constant"), sound
        case "no decay":
            return replace(sound, decay=0.0), sound
        case "exploding":
            return _damaged(sound, rng, lambda x: x * 1e3)
        case "nan":
            return _damaged(sound, rng, lambda x: x * float("nan"))
        case "wrong labels":
            return _mislabelled(sound, rng)
        case "rare class":
            return _rarer(sound, rng)
        case "overfitting":
            few = sound.keep(torch.arange(FEW))
            long = replace(few, epochs=LONGER * sound.epochs * len(sound.groups) // FEW, decay=0.0)
            return long, replace(long, decay=sound.decay, best_epoch=True)
        case "batch far off":
            return replace(sound, batch=FAR_OFF * sound.batch), sound
    raise ValueError(f"no fault {fault!r}; there are {FAULTS}")


FAULTS = (
    "rate x10",
    "rate /10",
    "no schedule",
    "no decay",
    "exploding",
    "nan",
    "wrong labels",
    "rare class",
    "overfitting",
    "batch far off",
)


def _damaged(
    sound: Script, rng: np.random.Generator, damage: Callable[[Tensor], Tensor]
) -> tuple[Script, Script]:
    """Spoil the inputs of a few training samples; of symbols, embedded later, by a hook on the embedding."""
    x, y = sound.train
    bad = torch.from_numpy(rng.permutation(len(x))[: max(2, len(x) // BROKEN_IN)])
    good = torch.ones(len(x), dtype=torch.bool)
    good[bad] = False
    if x.is_floating_point():
        spoilt = x.clone()
        spoilt[bad] = damage(spoilt[bad])
        return replace(sound, train=(spoilt, y)), sound.keep(good)
    # A symbol of its own marks the spoilt windows, which the network then reads as damaged.
    marked = x.clone()
    marked[bad, 0] += MARK
    network = sound.network
    return (
        replace(sound, train=(marked, y), network=lambda: Damaging(network(), damage)),
        sound.keep(good),
    )


MARK = 1000


class Damaging(nn.Module):
    """Reads marked windows as damaged ones: what a broken pipeline hands to a network with an embedding."""

    def __init__(self, inner: nn.Module, damage: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.damage = inner, damage

    def forward(self, x: Tensor) -> Tensor:
        marked = x[:, 0] >= MARK
        out: Tensor = self.inner(torch.where(x >= MARK, x - MARK, x))
        # By rows: a product with NaN that `where` then leaves out has gradients that are not.
        spoilt = out.clone()
        spoilt[marked] = self.damage(out[marked])
        return spoilt


def _mislabelled(sound: Script, rng: np.random.Generator) -> tuple[Script, Script]:
    """Give wrong labels to training and validation data, which come from one pool; the test data stay right."""
    wrong, given = _wrong(sound.train[1], rng)
    _, held = _wrong(sound.val[1], rng)
    broken = replace(sound, train=(sound.train[0], given), val=(sound.val[0], held))
    return broken, sound.keep(~wrong)


def _wrong(y: Tensor, rng: np.random.Generator) -> Pair:
    """Which labels become wrong, and all labels after that."""
    wrong = torch.from_numpy(rng.random(len(y)) < WRONG)
    given = y.clone()
    if y.is_floating_point():
        given[wrong] = y[wrong][torch.from_numpy(rng.permutation(int(wrong.sum())))]
    else:
        classes = int(y.max()) + 1
        shift = torch.from_numpy(rng.integers(1, classes, int(wrong.sum())))
        given[wrong] = (y[wrong] + shift) % classes
    return wrong, given


def _rarer(sound: Script, rng: np.random.Generator) -> tuple[Script, Script]:
    """Make one group rarer in training; held-out data keep their balance. The cure weighs its samples."""
    sizes = torch.bincount(sound.groups)
    rare = int(rng.choice(np.flatnonzero(sizes.numpy() >= RARER)))
    drawn = torch.from_numpy(rng.random(len(sound.groups)) < 1 / RARER)
    few = sound.keep((sound.groups != rare) | drawn)
    n = len(few.groups)
    repeats = torch.where(few.groups == rare, RARER, 1)
    # As many passes over samples as before, most of them of other groups: an epoch of the cure is longer.
    more = few.keep(torch.repeat_interleave(torch.arange(n), repeats))
    return few, replace(more, epochs=max(1, round(few.epochs * n / len(more.groups))))


def loader_of(script: Script, seed: int) -> Any:
    """The script's training loader."""
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*script.train),
        batch_size=script.batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
