"""How often safeguards act on sound runs, and what they save of broken ones.

    python benchmarks/safeguards.py [--seeds 4] [--steps 800] [--broken-seeds 1]

Five tasks (MLP, CNN, autoencoder, regression with single-sample noise, imbalanced table), SGD with momentum and Adam, a constant
rate and a cosine. Every run is made through the Trainer with no rule allowed to propose, so that safeguards are all that acts.
Sound runs: the share in which anything was done (rewind, rate, cap, skip), with Wilson's 95 % interval. Broken runs: at a third of the
run the rate is multiplied by 10, 30 or 100 for good, or by 100 for 20 steps; a layer's weights are multiplied by 30; or 20 batches
are NaN. Each is run as it is (observe) and with safeguards (act) for the same steps. A run counts as damaged where its held-out
loss ends more than half way back up from its sound twin's to the untrained network's, and as rescued where it would have been,
and is not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.planner.events import Mode
from automode.planner.policy import Policy
from automode.session import Session

BATCH = 32
MODES: tuple[Mode, ...] = ("observe", "act")
POLICY = Policy.model_validate({"reasons": [], "diagnostics": {"enabled": False}})
ACTS = ("rewound", "rate_set", "clip_set", "safeguarded")
BREAKS = ("rate x10", "rate x30", "rate x100", "rate x100, 20 steps", "layer x30", "20 NaN batches")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, a network for it, its loss, and rates at which it trains well."""

    data: tuple[TensorDataset, TensorDataset]
    network: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]
    sgd: float
    adam: float


def _split(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[TensorDataset, TensorDataset]:
    order = np.random.default_rng(1).permutation(len(x))
    cut = len(x) * 3 // 4
    return tuple(  # type: ignore[return-value]  # two parts
        TensorDataset(torch.from_numpy(x[i]), torch.from_numpy(y[i])) for i in (order[:cut], order[cut:])
    )


def tasks() -> dict[str, Task]:
    """Make the tasks."""
    rng = np.random.default_rng(0)
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    square = images.reshape(-1, 1, 8, 8)
    x = rng.standard_normal((2400, 12)).astype(np.float32)
    noisy = (x[:, :1] * x[:, 1:2] + rng.standard_normal((2400, 1))).astype(np.float32)
    rare = ((x[:, 0] + x[:, 1] * x[:, 2]) > 2.2).astype(np.int64)

    def mlp(inputs: int, outputs: int) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(
            nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)
        )

    def cnn() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    return {
        "mlp": Task(
            data=_split(images, digits.target),
            network=mlp(64, 10),
            loss=nn.CrossEntropyLoss,
            sgd=0.05,
            adam=2e-3,
        ),
        "cnn": Task(
            data=_split(square, digits.target), network=cnn, loss=nn.CrossEntropyLoss, sgd=0.05, adam=3e-3
        ),
        "autoencoder": Task(
            data=_split(images, images), network=mlp(64, 64), loss=nn.MSELoss, sgd=0.3, adam=2e-3
        ),
        "regression": Task(data=_split(x, noisy), network=mlp(12, 1), loss=nn.MSELoss, sgd=0.01, adam=1e-3),
        "table": Task(
            data=_split(x, rare), network=mlp(12, 2), loss=nn.CrossEntropyLoss, sgd=0.05, adam=2e-3
        ),
    }


class Breaking(nn.Module):
    """A loss that does, at one batch, what a broken run needs: the only place of a script that sees every batch."""

    def __init__(self, loss: nn.Module, kind: str, at: int, model: nn.Module) -> None:
        super().__init__()
        self.loss, self.kind, self.at, self.seen = loss, kind, at, 0
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give the loss of a batch."""
        value: Tensor = self.loss(outputs, targets)
        if not torch.is_grad_enabled():
            return value
        self.seen += 1
        if self.kind == "layer x30" and self.seen == self.at:
            with torch.no_grad():
                self.layers[0].weight.data.mul_(30.0)
        if self.kind == "20 NaN batches" and self.at <= self.seen < self.at + 20:
            return value * math.nan
        return value


def factor(kind: str, at: int, step: int) -> float:
    """What a broken schedule multiplies the rate by."""
    if step < at or not kind.startswith("rate"):
        return 1.0
    if kind == "rate x100, 20 steps":
        return 100.0 if step < at + 20 else 1.0
    return float(kind.removeprefix("rate x"))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One run: held-out loss before and after, what the safeguards did, and seconds."""

    before: float
    after: float
    acts: Counter[str]
    seconds: float


def run(task: Task, optimizer: str, schedule: str, seed: int, steps: int, mode: Mode, kind: str = "") -> Seen:
    """Train once."""
    torch.manual_seed(seed)
    model = task.network()
    at = steps // 3
    if optimizer == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=task.sgd, momentum=0.9)
    else:
        made = torch.optim.Adam(model.parameters(), lr=task.adam)

    def rate(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) if schedule == "cosine" else 1.0
        return decay * factor(kind, at, step)

    train, held = task.data
    before = _loss(model, task, held)
    loss = task.loss() if not kind or kind.startswith("rate") else Breaking(task.loss(), kind, at, model)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            automode=mode,
            policy=POLICY,
            max_steps=steps,
            seed=seed,
            progress=False,
            console=False,
            session_dir=folder,
            scheduler_interval="step",
        ).fit(
            model=model,
            optimizer=made,
            loss_fn=loss,
            train_loader=DataLoader(
                train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed)
            ),
            val_loader=DataLoader(held, 256),
            scheduler=torch.optim.lr_scheduler.LambdaLR(made, rate),
        )
        (path,) = [p.parent for p in Path(folder).glob("*/*/session.db")]
        with Session.open(path) as session:
            acts = Counter(r.kind for r in session.events() if r.kind in ACTS)
    return Seen(before=before, after=_loss(model, task, held), acts=acts, seconds=time.perf_counter() - began)


@torch.no_grad()
def _loss(model: nn.Module, task: Task, held: TensorDataset) -> float:
    training = model.training
    model.eval()
    x, y = held.tensors
    value = float(task.loss()(model(x), y))
    model.train(training)
    return value


def interval(k: int, n: int, z: float = 1.96) -> str:
    """A share with Wilson's interval."""
    if not n:
        return "-"
    p, d = k / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return f"{k}/{n} = {p:.3f} [{max(0.0, middle - half):.3f}, {min(1.0, middle + half):.3f}]"


def sound_runs(seeds: int, steps: int) -> dict[tuple[str, str], float]:
    """Print what safeguards did on sound runs; returns the held-out loss that each task ends at."""
    fired, steps_run, worse = [], 0, []
    ends: dict[tuple[str, str], list[float]] = {}
    for name, task in tasks().items():
        for optimizer in ("sgd", "adam"):
            for seed in range(seeds):
                schedule = ("constant", "cosine")[seed % 2]
                seen = run(task, optimizer, schedule, seed, steps, "act")
                steps_run += steps
                ends.setdefault((name, optimizer), []).append(seen.after)
                if seen.acts:
                    fired.append((name, optimizer, schedule, seed, dict(seen.acts)))
                worse.append(seen.seconds)
    n = len(worse)
    rewound = sum(bool(acts.get("rewound") or acts.get("rate_set")) for *_, acts in fired)
    capped = sum(bool(acts.get("clip_set")) for *_, acts in fired)
    print(f"sound runs: {n} runs, {steps_run} steps")
    print(f"  went back or lowered the rate  {interval(rewound, n)}")
    print(f"  capped the gradient norm       {interval(capped, n)}")
    for what in fired:
        print("   ", *what)
    return {key: statistics.median(values) for key, values in ends.items()}


def broken_runs(seeds: int, steps: int, ends: dict[tuple[str, str], float]) -> None:
    """Print what broken runs end at, as they are and with safeguards."""
    print(
        "\nbroken runs                 damaged as is   of these rescued                  better   worse by 10 %"
    )
    totals = [0, 0, 0, 0, 0]
    for kind in BREAKS:
        counts = _broken(kind, seeds, steps, ends)
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        _tell(kind, counts)
    _tell("all", totals)


def _broken(kind: str, seeds: int, steps: int, ends: dict[tuple[str, str], float]) -> list[int]:
    n = damaged = rescued = better = worse = 0
    for name, task in tasks().items():
        for optimizer in ("sgd", "adam"):
            for seed in range(seeds):
                pair = [run(task, optimizer, "constant", seed, steps, mode, kind) for mode in MODES]
                plain, guarded = (_finite(seen.after) for seen in pair)
                sound = ends[name, optimizer]
                bar = sound + 0.5 * (pair[0].before - sound)
                n += 1
                damaged += plain > bar
                rescued += plain > bar >= guarded
                better += guarded < 0.9 * plain
                worse += guarded > 1.1 * plain
    return [n, damaged, rescued, better, worse]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _tell(kind: str, counts: Sequence[int]) -> None:
    n, damaged, rescued, better, worse = counts
    print(
        f"  {kind:<24}  {damaged:>3}/{n:<3}         {interval(rescued, damaged):<32}  {better:>3}/{n:<3}  {worse:>3}/{n}"
    )


def main() -> int:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--broken-seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    ends = sound_runs(arguments.seeds, arguments.steps)
    broken_runs(arguments.broken_seeds, arguments.steps, ends)
    print(f"\n{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
