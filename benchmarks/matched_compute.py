"""Does a run with automode end better than what a person could have trained with the same compute?

    python benchmarks/matched_compute.py [--tasks digits4 digits4_n20 ...] [--seeds 10] [--first-seed 1000] [--quick] [--json]

Every row is one way to spend the same number of sample passes on a classifier with one hidden layer: the script as it is (constant
rate, raw weights), cosine, the best of nine averaged and annealed monoliths (the best by its mean over these very seeds on the test
set, which flatters it), a network three times as wide for a third of the steps, and the script as it is with ``automode=True`` under
the default policy. Rate and weight decay are chosen for the cosine monolith on validation data, with seeds of their own. Splits, wrong
labels, first weights and orders of the data follow from the seed; differences are paired by seed, with 95 % intervals (Student's t).
Accuracy is on clean test data, in percent; ``worst`` is that on the worst source (view).

Tasks named ``mkn_...`` need the images that the environment variable AUTOMODE_DATA points to, and are left out without them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _matched_tasks import CLASSES, TASKS, Data, Split, Task
from _monoliths import AVERAGES, BEST_OF, SCHEDULES, train
from scipy.stats import t as student
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer

RATES = (1e-3, 3e-3, 1e-2)
DECAYS = (0.01, 0.3)
CHOOSING_SEEDS = (100, 101)
Floats = npt.NDArray[np.float64]


@dataclass
class Row:
    """One way to spend the compute: accuracy and worst-source accuracy by seed, in percent."""

    name: str
    test: Floats
    worst: Floats
    about: dict[str, Any] = field(default_factory=dict)


def steps_of(task: Task, data: Data) -> int:
    return task.epochs * -(-len(data.train.x) // task.batch)


def choose(task: Task, hidden: int, shorter: int) -> tuple[float, float]:
    """Rate and weight decay of the cosine monolith that is best on validation data."""
    data = [task.make(seed) for seed in CHOOSING_SEEDS]
    grid = [(rate, decay) for rate in RATES for decay in DECAYS]
    members = [(i, "cosine", rate, decay) for rate, decay in grid for i in range(len(data))]
    steps = steps_of(task, data[0]) // shorter
    found = train(data, members, hidden=hidden, batch=task.batch, steps=steps, seeds=CHOOSING_SEEDS)
    return grid[int(found.val.reshape(len(grid), -1).mean(axis=1).argmax())]


def monoliths(
    task: Task, data: list[Data], seeds: list[int], rate: float, decay: float, *, wider: int = 1
) -> dict[tuple[str, str], Row]:
    members = [(i, schedule, rate, decay) for schedule in SCHEDULES for i in range(len(data))]
    found = train(
        data,
        members,
        hidden=task.hidden * wider,
        batch=task.batch,
        steps=min(steps_of(task, part) for part in data) // wider,
        seeds=seeds,
    )
    rows = {}
    for k, schedule in enumerate(SCHEDULES):
        mine = slice(k * len(data), (k + 1) * len(data))
        for average in AVERAGES:
            rows[schedule, average] = Row(
                f"{schedule} {average}", found.test[average][mine], found.worst[average][mine]
            )
    return rows


def best_of(rows: dict[tuple[str, str], Row], name: str) -> Row:
    key = max(BEST_OF, key=lambda k: rows[k].test.mean())
    return Row(f"{name}: {rows[key].name}", rows[key].test, rows[key].worst)


def with_automode(
    task: Task, data: list[Data], seeds: list[int], rate: float, decay: float, policy: str, mode: Any
) -> Row:
    """The script as it is, with automode."""
    test, worst, told = [], [], []
    for part, seed in zip(data, seeds, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            model, about = one_run(task, part, seed, rate, decay, policy, mode, folder)
        with torch.no_grad():
            right = 100.0 * (model(torch.from_numpy(part.test.x)).argmax(dim=1).numpy() == part.test.y)
        test.append(right.mean())
        worst.append(min(right[part.test.source == s].mean() for s in np.unique(part.test.source)))
        told.append(about)
    return Row(f"automode={mode}", np.array(test), np.array(worst), {"runs": told})


def one_run(
    task: Task, data: Data, seed: int, rate: float, decay: float, policy: str, mode: Any, folder: str
) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(data.train.x.shape[1], task.hidden), nn.ReLU(), nn.Linear(task.hidden, CLASSES)
    )
    started = time.process_time()
    result = Trainer(
        project="matched",
        max_epochs=task.epochs,
        automode=mode,
        policy=policy,
        session_dir=folder,
        val_every_n_epochs=1,
        seed=seed,
        progress=False,
        console=False,
    ).fit(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(
            dataset(data.train),
            batch_size=task.batch,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        ),
        val_loader=DataLoader(dataset(data.val), batch_size=512),
        slices={name: np.flatnonzero(data.val.source == i).tolist() for i, name in enumerate(task.sources)},
    )
    compute = result.compute
    with result.session as session:
        verdicts = [
            f"{r.body['candidate']}: {r.body['verdict']} ({r.body['mean']:+.4f}, z {r.body['z']:.2f})"
            for r in session.events(kind="verdict_given")
        ]
        cards = [
            f"{r.body['card']['reason']}@{r.body['card']['step']}"
            for r in session.events(kind="card_proposed")
        ]
        states = [card.state for card in session.cards()]
    budget = 3 * task.epochs * len(data.train.x)
    return model, {
        "seed": seed,
        "used": (compute["trunk"] + compute["automode"]) / budget,
        "spent": compute["automode"] / budget,
        "cards": [f"{card} {state}" for card, state in zip(cards, states, strict=True)],
        "verdicts": verdicts,
        "cpu_s": time.process_time() - started,
    }


def dataset(split: Split) -> TensorDataset:
    return TensorDataset(torch.from_numpy(split.x), torch.from_numpy(split.y))


def interval(differences: Floats) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of paired differences."""
    n = differences.size
    if n < 2:
        return float(differences.mean()), float("nan")
    half = student.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return float(differences.mean()), float(half)


def measure(task: Task, seeds: list[int], policy: str, *, verbose: bool) -> list[Row]:
    rate, decay = choose(task, task.hidden, 1)
    data = [task.make(seed) for seed in seeds]
    rows = monoliths(task, data, seeds, rate, decay)
    wide_rate, wide_decay = choose(task, 3 * task.hidden, 3)
    wide = monoliths(task, data, seeds, wide_rate, wide_decay, wider=3)
    as_is = rows["constant", "raw"]
    automode = with_automode(task, data, seeds, rate, decay, policy, True)
    table = [
        Row("as is (constant rate, raw)", as_is.test, as_is.worst, {"rate": rate, "decay": decay}),
        Row("cosine", rows["cosine", "raw"].test, rows["cosine", "raw"].worst),
        best_of(rows, "best of nine"),
        best_of(wide, "three times as wide"),
        automode,
    ]
    if verbose:
        for run in automode.about["runs"]:
            print(f"    {run}", file=sys.stderr)
    return table


def report(task: Task, table: list[Row]) -> None:
    automode = table[-1]
    about = table[0].about
    print(
        f"\n{task.name}: rate {about['rate']:g}, weight decay {about['decay']:g}, {automode.test.size} seeds"
    )
    print(
        "                                                 test   worst   automode minus it     ahead   on the worst"
    )
    for row in table:
        line = f"  {row.name:42s} {row.test.mean():8.2f} {row.worst.mean():7.2f}"
        if row is not automode:
            mean, half = interval(automode.test - row.test)
            worst, worst_half = interval(automode.worst - row.worst)
            ahead = int((automode.test > row.test).sum())
            line += f"   {mean:+6.2f} +- {half:4.2f}     {ahead:3d}/{row.test.size}   {worst:+6.2f} +- {worst_half:4.2f}"
        print(line)
    runs = automode.about["runs"]
    print(
        f"  compute used {np.mean([r['used'] for r in runs]):.3f} (at most {max(r['used'] for r in runs):.3f}) of the script's, "
        f"of it by automode {np.mean([r['spent'] for r in runs]):.3f}; {np.mean([r['cpu_s'] for r in runs]):.1f} s of CPU a run"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=None)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--policy", default="default", help="name of a preset, or a YAML file")
    parser.add_argument("--quick", action="store_true", help="two seeds of the two digit tasks")
    parser.add_argument("--verbose", action="store_true", help="every run's cards and verdicts")
    parser.add_argument("--json", action="store_true", help="one JSON line a task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.tasks or (["digits4", "digits4_n20"] if arguments.quick else list(TASKS))
    if not os.environ.get("AUTOMODE_DATA"):
        left_out = [name for name in names if name.startswith("mkn")]
        names = [name for name in names if name not in left_out]
        if left_out:
            print(f"left out, since AUTOMODE_DATA names no folder of images: {', '.join(left_out)}")
    count = 2 if arguments.quick else arguments.seeds
    for name in names:
        task = TASKS[name]
        seeds = [arguments.first_seed + i for i in range(count)]
        table = measure(task, seeds, arguments.policy, verbose=arguments.verbose)
        if arguments.json:
            print(
                json.dumps(
                    {"task": name}
                    | {r.name: {"test": r.test.tolist(), "worst": r.worst.tolist(), **r.about} for r in table}
                ),
                flush=True,
            )
        else:
            report(task, table)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
