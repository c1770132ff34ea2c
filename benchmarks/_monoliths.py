"""Many small classifiers trained at once: the networks that a person could have trained with the same compute.

Four schedules on the same data in the same order from the same weights; each is kept raw, as exponential averages over 3 % and 10 %
of the run, and as uniform averages of its last 20 % and 25 %. One hidden layer, ReLU, AdamW, cross-entropy; members differ in seed,
schedule, rate and weight decay, and are trained by batched products, which changes a result by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from _matched_tasks import CLASSES, Data
from torch import Tensor

SCHEDULES = ("constant", "cosine", "wsd", "half")
AVERAGES = ("raw", "ema3", "ema10", "tail20", "tail25")
BEST_OF = (
    ("cosine", "raw"),
    ("cosine", "ema3"),
    ("cosine", "ema10"),
    ("wsd", "raw"),
    ("wsd", "ema3"),
    ("wsd", "tail20"),
    ("half", "raw"),
    ("half", "ema10"),
    ("half", "tail25"),
)
"""The nine that the pipeline is held against: the best of them by the mean over seeds on the test set."""

Member = tuple[int, str, float, float]
"""(index of the data, schedule, rate, weight decay)"""


def rate_at(schedule: str, progress: float) -> float:
    """Factor on the rate at a share of the run."""
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1.0 + float(np.cos(np.pi * progress)))
        case "wsd":
            return 1.0 if progress < 0.5 else 2.0 * (1.0 - progress)
        case "half":
            return 1.0 if progress < 0.75 else 0.5
        case _:
            raise ValueError(schedule)


@dataclass(frozen=True)
class Trained:
    """Accuracy on the test set [members], by average, and on validation of the raw weights."""

    test: dict[str, npt.NDArray[np.float64]]
    worst: dict[str, npt.NDArray[np.float64]]
    val: npt.NDArray[np.float64]


def train(
    data: Sequence[Data],
    members: Sequence[Member],
    *,
    hidden: int,
    batch: int,
    steps: int,
    seeds: Sequence[int],
) -> Trained:
    """Train every member on its data for so many steps."""
    found = weights(data, members, hidden=hidden, batch=batch, steps=steps, seeds=seeds)
    which = [m[0] for m in members]
    test, worst = {}, {}
    for name, parameters in found.items():
        test[name], worst[name] = _accuracies(parameters, data, which, "test")
    val, _ = _accuracies(found["raw"], data, which, "val")
    return Trained(test=test, worst=worst, val=val)


def weights(
    data: Sequence[Data],
    members: Sequence[Member],
    *,
    hidden: int,
    batch: int,
    steps: int,
    seeds: Sequence[int],
) -> dict[str, list[Tensor]]:
    """Train every member on its data for so many steps; raw weights and every average, members along the first dimension."""
    network = _Network(
        [seeds[m[0]] for m in members],
        data[0].train.x.shape[1],
        hidden,
        torch.tensor([m[3] for m in members]),
    )
    inputs = [torch.from_numpy(part.train.x) for part in data]
    labels = [torch.from_numpy(part.train.y) for part in data]
    orders = [_Order(len(part.train.x), batch, seed) for part, seed in zip(data, seeds, strict=True)]
    which = torch.tensor([m[0] for m in members])
    averages = _Averages(network.parameters, steps)
    for step in range(steps):
        drawn = [order.next() for order in orders]
        x = torch.stack([part[ids] for part, ids in zip(inputs, drawn, strict=True)])[which]
        y = torch.stack([part[ids] for part, ids in zip(labels, drawn, strict=True)])[which]
        rates = torch.tensor([m[2] * rate_at(m[1], step / steps) for m in members])
        network.step(x, y, rates)
        averages.add(network.parameters, step)
    return averages.all(network.parameters)


class _Network:
    def __init__(self, seeds: Sequence[int], inputs: int, hidden: int, decay: Tensor) -> None:
        drawn = [_initial(seed, inputs, hidden) for seed in seeds]
        self.parameters = [torch.stack(parts).requires_grad_() for parts in zip(*drawn, strict=True)]
        self._first = [torch.zeros_like(p) for p in self.parameters]
        self._second = [torch.zeros_like(p) for p in self.parameters]
        self._decay = decay
        self._steps = 0

    def step(self, x: Tensor, y: Tensor, rates: Tensor) -> None:
        """One AdamW step (Loshchilov & Hutter 2019, arXiv:1711.05101) of every member at its own rate."""
        logits = forward(self.parameters, x)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        gradients = torch.autograd.grad(loss.view(y.shape).mean(dim=1).sum(), self.parameters)
        self._steps += 1
        first, second = 1 - 0.9**self._steps, 1 - 0.999**self._steps
        with torch.no_grad():
            for p, g, m, v in zip(self.parameters, gradients, self._first, self._second, strict=True):
                rate = rates.view(-1, *([1] * (p.dim() - 1)))
                p.mul_(1 - rate * self._decay.view_as(rate))
                m.lerp_(g, 0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p.sub_(rate / first * m / ((v / second).sqrt() + 1e-8))


def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Inputs [members, n, d] to logits [members, n, classes]."""
    w1, b1, w2, b2 = parameters
    return torch.baddbmm(b2, torch.baddbmm(b1, x, w1).relu(), w2)


def _initial(seed: int, inputs: int, hidden: int) -> list[Tensor]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, CLASSES)
    )
    return [p.detach().T.clone() if p.dim() == 2 else p.detach()[None].clone() for p in model.parameters()]


class _Order:
    """Batches of one shuffled pass after another; the last batch of a pass is filled up from the next."""

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self._n, self._batch = n, batch
        self._rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
        self._left = np.empty(0, dtype=np.int64)

    def next(self) -> Tensor:
        if self._left.size < self._batch:
            self._left = np.concatenate([self._left, self._rng.permutation(self._n)])
        ids, self._left = self._left[: self._batch], self._left[self._batch :]
        return torch.from_numpy(ids)


@dataclass
class _Tail:
    """A uniform average from a step on."""

    start: int
    weights: list[Tensor]
    count: int = 0


class _Averages:
    EVERY = 4

    def __init__(self, parameters: Sequence[Tensor], steps: int) -> None:
        self._steps = steps
        self._ema = {
            name: ((1 - 1 / max(2.0, share * steps)) ** self.EVERY, [p.detach().clone() for p in parameters])
            for name, share in (("ema3", 0.03), ("ema10", 0.10))
        }
        self._tail = {
            name: _Tail(int((1 - share) * steps), [torch.zeros_like(p) for p in parameters])
            for name, share in (("tail20", 0.20), ("tail25", 0.25))
        }

    @torch.no_grad()
    def add(self, parameters: Sequence[Tensor], step: int) -> None:
        if step % self.EVERY and step != self._steps - 1:
            return
        for decay, averaged in self._ema.values():
            for a, p in zip(averaged, parameters, strict=True):
                a.lerp_(p, 1 - decay)
        for tail in self._tail.values():
            if step >= tail.start:
                tail.count += 1
                for a, p in zip(tail.weights, parameters, strict=True):
                    a.lerp_(p, 1 / tail.count)

    def all(self, parameters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        found = {"raw": [p.detach() for p in parameters]}
        found |= {name: averaged for name, (_, averaged) in self._ema.items()}
        return found | {name: tail.weights for name, tail in self._tail.items()}


@torch.no_grad()
def _accuracies(
    parameters: Sequence[Tensor], data: Sequence[Data], which: Sequence[int], part: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return (accuracy, accuracy on the worst source) of every member, in percent."""
    overall, worst = np.zeros(len(which)), np.zeros(len(which))
    for index, task in enumerate(data):
        split = getattr(task, part)
        for member in [k for k, of in enumerate(which) if of == index]:
            mine = [p[member : member + 1] for p in parameters]
            right = (
                (forward(mine, torch.from_numpy(split.x)[None])[0].argmax(dim=1).numpy() == split.y) * 100.0
            ).astype(np.float64)
            overall[member] = right.mean()
            worst[member] = min(right[split.source == s].mean() for s in np.unique(split.source))
    return overall, worst
