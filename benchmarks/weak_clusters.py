"""Is a weak cluster worth more weight? Beside it the same weight on as many samples drawn at random, and a specialist for it.

    python benchmarks/weak_clusters.py [--tasks digits4 imbalanced rare small narrow] [--seeds 8] [--first-seed 0]

A network with one hidden layer trains for 35 % of a run at a constant rate. Its features are clustered as a scan does it, and the cluster
furthest above the others in standard errors is the weak one, whether or not `residual_cluster` would propose a card (``cards`` says
how often it would). From there the run goes on to its end, as it was (the control) or with the cluster's samples counting three times,
or random ones; a specialist trains for 15 % of the run on nine of the cluster's samples in ten. All are judged by the average of their
weights, in utility (0.8 accuracy + 0.2 p(y)) on clean test data, in points against the control, with 95 % intervals over seeds (Student's t);
``passing`` counts those whose paired z on validation data is above 1.64.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from _matched_tasks import TASKS, Data, Split
from scipy.stats import t as student
from torch import nn

from automode.trainer.clusters import fit_clusters, losses_by_cluster

RATE, DECAY, HORIZON, WEIGHT = 3e-3, 0.01, 0.03, 3.0
FORK, SHORT, PROBE = 0.35, 0.15, 1024
CARD_RATIO, CARD_Z, PASSING_Z = 1.5, 2.0, 1.64
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Keep = Callable[[Split, np.random.Generator], Mask]


@dataclass(frozen=True)
class Variation:
    """Digits in four views, some of them left out, for a network of so many hidden units."""

    keep: Keep | None = None
    hidden: int | None = None
    validation: bool = True

    def make(self, seed: int) -> Data:
        """The task under one seed."""
        data = TASKS["digits4"].make(seed)
        if self.keep is None:
            return data
        rng = np.random.default_rng(np.random.SeedSequence([seed, 9]))
        train = thinned(data.train, self.keep(data.train, rng))
        val = thinned(data.val, self.keep(data.val, rng)) if self.validation else data.val
        return Data(train=train, val=val, test=data.test)


VARIATIONS = {
    "digits4": Variation(),
    "imbalanced": Variation(keep=lambda part, rng: (part.source != 3) | (rng.random(part.y.size) < 0.15)),
    "rare": Variation(keep=lambda part, rng: (part.y != 8) | (rng.random(part.y.size) < 0.05)),
    "small": Variation(keep=lambda part, rng: rng.random(part.y.size) < 0.3, validation=False),
    "narrow": Variation(hidden=8),
}


def thinned(part: Split, keep: Mask) -> Split:
    return Split(x=part.x[keep], y=part.y[keep], source=part.source[keep])


class Run:
    """One network in training, with the average loss of every sample that it has seen."""

    def __init__(self, data: Data, hidden: int, batch: int, epochs: int, seed: int) -> None:
        torch.manual_seed(seed)
        width = data.train.x.shape[1]
        self.model = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY)
        self.x, self.y = torch.from_numpy(data.train.x), torch.from_numpy(data.train.y)
        self.batch, self.total = batch, epochs * len(self.x) // batch
        self.losses = np.full(len(self.x), np.nan)

    def train(
        self,
        steps: int,
        rng: np.random.Generator,
        *,
        marks: tuple[int, ...] = (),
        weight: torch.Tensor | None = None,
        cluster: npt.NDArray[np.int64] | None = None,
    ) -> dict[int, nn.Module]:
        """Take steps; returns the averaged network at each mark."""
        share = 1.0 / max(10.0, HORIZON * self.total)
        average = [p.detach().clone() for p in self.model.parameters()]
        order, found = np.empty(0, dtype=np.int64), {}
        for step in range(1, steps + 1):
            if cluster is not None:
                mine = round(0.9 * self.batch)
                rows = np.r_[rng.choice(cluster, mine), rng.choice(len(self.x), self.batch - mine)]
            else:
                if order.size < self.batch:
                    order = rng.permutation(len(self.x))
                rows, order = order[: self.batch], order[self.batch :]
            self._step(rows, weight)
            with torch.no_grad():
                for mean, p in zip(average, self.model.parameters(), strict=True):
                    mean.lerp_(p, share)
            if step in marks:
                found[step] = copy.deepcopy(self.model)
                with torch.no_grad():
                    for mean, p in zip(average, found[step].parameters(), strict=True):
                        p.copy_(mean)
        return found

    def _step(self, rows: npt.NDArray[np.int64], weight: torch.Tensor | None) -> None:
        index = torch.from_numpy(rows)
        losses = nn.functional.cross_entropy(self.model(self.x[index]), self.y[index], reduction="none")
        new, old = losses.detach().numpy(), self.losses[rows]
        self.losses[rows] = np.where(np.isnan(old), new, 0.7 * old + 0.3 * new)
        weights = torch.ones_like(losses) if weight is None else weight[index]
        self.optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        self.optimizer.step()

    def features(self, x: torch.Tensor) -> Floats:
        """What the last layer is given."""
        with torch.no_grad():
            return np.asarray(self.model[1](self.model[0](x)).double().numpy())


def weak_cluster(run: Run, data: Data, seed: int) -> tuple[Mask, bool]:
    """Mark the members of the weak cluster; tell whether the rule would make a card of it."""
    features, n = run.features(run.x), len(run.x)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    probe = np.sort(rng.choice(n, min(n, PROBE), replace=False))
    unseen = run.features(torch.from_numpy(data.val.x))
    clusters = fit_clusters(features[probe], seed=seed, held_out=unseen)
    if clusters is None:
        raise SystemExit("no clusters were found")
    told = losses_by_cluster(clusters.labels, run.losses[probe], np.ones(probe.size, dtype=bool), clusters.k)
    means, errors = (np.array(part) for part in told)
    sizes = np.bincount(clusters.labels, minlength=clusters.k)
    best, furthest, card = 0, -np.inf, False
    for number in range(clusters.k):
        others = np.arange(clusters.k) != number
        share = sizes[others] / sizes[others].sum()
        rest = float((share * means[others]).sum())
        z = (means[number] - rest) / np.hypot(errors[number], np.sqrt(((share * errors[others]) ** 2).sum()))
        if z > furthest:
            best, furthest = number, z
            card = bool(z >= CARD_Z and means[number] >= CARD_RATIO * rest)
    return clusters.assign(features) == best, card


def utility(model: nn.Module, part: Split) -> Floats:
    with torch.no_grad():
        p = model(torch.from_numpy(part.x)).softmax(dim=1).double().numpy()
    return 0.8 * (p.argmax(axis=1) == part.y) + 0.2 * p[np.arange(part.y.size), part.y]


def one(variation: Variation, seed: int) -> tuple[dict[tuple[str, str], tuple[float, float]], bool]:
    """Gain on the test set in points, and z on validation data, by arm and moment; and whether there would be a card."""
    task, data = TASKS["digits4"], variation.make(seed)
    trunk = Run(data, variation.hidden or task.hidden, task.batch, task.epochs, seed)
    fork = int(FORK * trunk.total)
    trunk.train(fork, np.random.default_rng(np.random.SeedSequence([seed, 1])))
    mine, card = weak_cluster(trunk, data, seed)
    chance = np.zeros(mine.size, dtype=bool)
    drawn = np.random.default_rng(np.random.SeedSequence([seed, 4]))
    chance[drawn.choice(mine.size, int(mine.sum()), replace=False)] = True
    short, end = int(SHORT * trunk.total), trunk.total - fork
    arms: dict[str, dict[int, nn.Module]] = {}
    for name, marked in (("control", None), ("weak cluster", mine), ("random", chance), ("specialist", None)):
        run, rng = copy.deepcopy(trunk), np.random.default_rng(np.random.SeedSequence([seed, 3]))
        if name == "specialist":
            arms[name] = run.train(short, rng, marks=(short,), cluster=np.flatnonzero(mine))
            continue
        weight = None if marked is None else torch.from_numpy(np.where(marked, WEIGHT, 1.0)).float()
        arms[name] = run.train(end, rng, marks=(short, end), weight=weight)
    found = {}
    for name in ("weak cluster", "random", "specialist"):
        for moment, step in (("15 %", short), ("end", end)):
            if step in arms[name]:
                model, control = arms[name][step], arms["control"][step]
                gain = 100 * float((utility(model, data.test) - utility(control, data.test)).mean())
                paired = utility(model, data.val) - utility(control, data.val)
                error = paired.std(ddof=1) / np.sqrt(paired.size)
                found[name, moment] = (gain, float(paired.mean() / error) if error > 0 else 0.0)
    return found, card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=VARIATIONS, default=list(VARIATIONS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.tasks:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        found = [one(VARIATIONS[name], seed) for seed in seeds]
        print(f"{name}: cards {sum(card for _, card in found)} of {len(found)}")
        for key in found[0][0]:
            gains, z = np.array([arms[key] for arms, _ in found]).T
            half = float("nan")
            if gains.size > 1:
                half = float(student.ppf(0.975, gains.size - 1) * gains.std(ddof=1) / np.sqrt(gains.size))
            passing = z > PASSING_Z
            print(
                f"  {key[0]:13} {key[1]:5} {gains.mean():+.2f} ± {half:.2f}   passing {int(passing.sum())}, "
                f"of them worse {int((passing & (gains < 0)).sum())}",
                flush=True,
            )


if __name__ == "__main__":
    main()
