"""How often are averages of a run's own weights better than its last weights, and how much proof do they need?

    python benchmarks/averages_gain.py [--seeds 8] [--first-seed 200] [--quick]

Classifiers with one hidden layer, trained at three rates, short and long, at a constant rate and with a cosine, on clean and on
noisy labels. As in a run, the best of three averages is chosen on one half of the validation data and adopted when the paired
difference of utility on the other half stands at least so many standard errors above 0. ``gain`` is what that did to the accuracy
on clean test data (in points, 0 where the raw weights stayed), ``worse`` how often it was adopted and the test accuracy fell, test
noise included. Five draws of the halves. The seeds are the development ones that ``averages.z`` was chosen on; choose others to judge it.

Tasks named ``mkn_...`` need the images that the environment variable AUTOMODE_DATA points to, and are left out without them.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from _matched_tasks import TASKS, Split, Task
from _monoliths import forward, weights
from torch import Tensor

CHOICES = ("ema3", "ema10", "tail20")
THRESHOLDS = (0.0, 0.5, 0.75, 1.0, 1.28, 1.64, 1.96)
RATES = (1e-3, 3e-3, 1e-2)
EPOCHS = {"digits4": (8, 40), "digits4_n20": (8, 40), "mkn_h32": (4, 12), "mkn_n20": (4, 12)}
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One network: validation utilities and test accuracy of its raw weights and averages."""

    schedule: str
    noisy: bool
    utility: dict[str, Floats]
    accuracy: dict[str, float]


@torch.no_grad()
def scored(parameters: list[Tensor], split: Split) -> tuple[Floats, float]:
    logits = forward(parameters, torch.from_numpy(split.x)[None])[0]
    probability = torch.softmax(logits.double(), dim=1).numpy()
    right = (probability.argmax(axis=1) == split.y).astype(np.float64)
    return 0.8 * right + 0.2 * probability[np.arange(split.y.size), split.y], 100.0 * float(right.mean())


def trials(task: Task, seeds: list[int], epochs: int) -> list[Trial]:
    data = [task.make(seed) for seed in seeds]
    members = [
        (i, schedule, rate, 0.01)
        for schedule in ("constant", "cosine")
        for rate in RATES
        for i in range(len(data))
    ]
    steps = epochs * -(-len(data[0].train.x) // task.batch)
    found = weights(data, members, hidden=task.hidden, batch=task.batch, steps=steps, seeds=seeds)
    out = []
    for k, (i, schedule, _, _) in enumerate(members):
        mine = {name: [p[k : k + 1] for p in parameters] for name, parameters in found.items()}
        out.append(
            Trial(
                schedule,
                task.noisy,
                {name: scored(parameters, data[i].val)[0] for name, parameters in mine.items()},
                {name: scored(parameters, data[i].test)[1] for name, parameters in mine.items()},
            )
        )
    return out


def z_of(difference: Floats) -> float:
    error = difference.std(ddof=1) / np.sqrt(difference.size)
    return float(difference.mean() / error) if error > 0 else 0.0


def outcomes(trial: Trial, threshold: float, draw: int) -> tuple[bool, float]:
    """Return whether an average was adopted, and what it gained on the test set."""
    n = trial.utility["raw"].size
    order = np.random.default_rng(draw).permutation(n)
    half_a, half_b = order[: n // 2], order[n // 2 :]
    gains = {name: trial.utility[name] - trial.utility["raw"] for name in CHOICES}
    best = max(CHOICES, key=lambda name: gains[name][half_a].mean())
    adopted = bool(gains[best][half_a].mean() > 0 and z_of(gains[best][half_b]) >= threshold)
    return adopted, trial.accuracy[best] - trial.accuracy["raw"] if adopted else 0.0


def report(name: str, found: list[Trial]) -> None:
    print(f"\n{name}: {len(found)} networks")
    print("     z   adopted    gain   worse   worse by .2   worst")
    for threshold in THRESHOLDS:
        results = [outcomes(trial, threshold, draw) for trial in found for draw in range(5)]
        gain = np.array([g for _, g in results])
        print(
            f"  {threshold:4.2f}   {np.mean([a for a, _ in results]):7.2f} {gain.mean():7.3f} {np.mean(gain < 0):7.3f} "
            f"{np.mean(gain < -0.2):10.3f} {gain.min():10.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="two seeds of the digits, short runs only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [arguments.first_seed + i for i in range(2 if arguments.quick else arguments.seeds)]
    found: list[Trial] = []
    for name, lengths in EPOCHS.items():
        if name.startswith("mkn") and (arguments.quick or not os.environ.get("AUTOMODE_DATA")):
            print(f"{name} is left out")
            continue
        for epochs in lengths[:1] if arguments.quick else lengths:
            found += trials(TASKS[name], seeds, epochs)
    for schedule in ("constant", "cosine"):
        report(f"{schedule} rate", [t for t in found if t.schedule == schedule])
    report("constant rate, clean labels", [t for t in found if t.schedule == "constant" and not t.noisy])


if __name__ == "__main__":
    main()
