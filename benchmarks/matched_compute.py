"""Does a run with automode end better than what a person could have trained with the same compute?

    python benchmarks/matched_compute.py [--tasks digits4 digits4_n20 ...] [--seeds 10] [--first-seed 1000] [--quick] [--smoke] [--json]

Every row is one way to spend the same number of sample passes on a classifier with one hidden layer: the script as it is (constant
rate, raw weights), cosine, the best of nine averaged and annealed monoliths (the best by its mean over these very seeds on the test
set, which flatters it), a network three times as wide for a third of the steps, and the script as it is with ``automode=True`` under
the default policy. Rate and weight decay are chosen for the cosine monolith on validation data, with seeds of their own. Splits, wrong
labels, first weights and orders of the data follow from the seed; differences are paired by seed, with 95 % intervals (Student's t).
Accuracy is on clean test data, in percent; ``worst`` is that on the worst source (view); ``active`` and ``total`` are the parameters
that an answer is computed with, and that there are.

Where automode trained on a subset of its own choosing, the same is done with as many random samples (``_random_control``), and both
stand beside each other. A mixture that was adopted is stored beside the model and scored in a line of its own.

Tasks named ``mkn_...`` need the images that the environment variable AUTOMODE_DATA points to, and are left out without them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _matched_tasks import CLASSES, TASKS, Data, Split, Task
from _monoliths import AVERAGES, BEST_OF, SCHEDULES, train
from _random_control import Subset, subsets
from scipy.stats import t as student
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.merges.moe_files import load as load_mixture
from automode.session import Session

RATES = (1e-3, 3e-3, 1e-2)
DECAYS = (0.01, 0.3)
CHOOSING_SEEDS = (100, 101)
SMOKE_EPOCHS, SMOKE_RATE = 12, (1e-2, 0.01)
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
        overall, lowest = accuracies(model, part.test)
        test.append(overall)
        worst.append(lowest)
        told.append(about)
    size = parameters(network(task, data[0], 1))
    return Row(
        f"automode={mode}", np.array(test), np.array(worst), {"runs": told, "active": size, "total": size}
    )


@torch.no_grad()
def accuracies(model: nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy, and that on the worst source, in percent."""
    right = 100.0 * (model(torch.from_numpy(split.x)).argmax(dim=1).numpy() == split.y)
    return float(right.mean()), float(min(right[split.source == s].mean() for s in np.unique(split.source)))


def network(task: Task, data: Data, wider: int) -> nn.Sequential:
    """One hidden layer."""
    hidden = task.hidden * wider
    return nn.Sequential(nn.Linear(data.train.x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def one_run(
    task: Task, data: Data, seed: int, rate: float, decay: float, policy: str, mode: Any, folder: str
) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(seed)
    model = network(task, data, 1)
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
        slices={name: of_source(data, i) for i, name in enumerate(task.sources)},
    )
    compute, cpu = result.compute, time.process_time() - started
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
        mixtures = mixtures_of(session, task, data)
        mined = subsets(
            session, data, network(task, data, 1), seed=seed, steps=steps_of(task, data), batch=task.batch
        )
    budget = 3 * task.epochs * len(data.train.x)
    return model, {
        "seed": seed,
        "used": (compute["trunk"] + compute["automode"]) / budget,
        "spent": compute["automode"] / budget,
        "cards": [f"{card} {state}" for card, state in zip(cards, states, strict=True)],
        "verdicts": verdicts,
        "mixtures": mixtures,
        "mined": [asdict(subset) for subset in mined],
        "cpu_s": cpu,
    }


def mixtures_of(session: Session, task: Task, data: Data) -> list[dict[str, float]]:
    """Test accuracy and parameters of the mixtures that were adopted: each stands as it was when its card ended."""
    found = []
    for folder in sorted((session.path / "exports").glob("*")):
        mixture = load_mixture(folder, lambda: network(task, data, 1))
        test, worst = accuracies(mixture, data.test)
        found.append({"test": test, "worst": worst, "parameters": parameters(mixture)})
    return found


def of_source(data: Data, source: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A slice as somebody would report it who knows where each sample is from, in training and validation alike."""
    known = {row.tobytes() for part in (data.train, data.val) for row in part.x[part.source == source]}

    def mask(inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.tensor([row.tobytes() in known for row in inputs.numpy()])

    return mask


def dataset(split: Split) -> TensorDataset:
    return TensorDataset(torch.from_numpy(split.x), torch.from_numpy(split.y))


def interval(differences: Floats) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of paired differences."""
    n = differences.size
    if n < 2:
        return float(differences.mean()), float("nan")
    half = student.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return float(differences.mean()), float(half)


def measure(
    task: Task,
    seeds: list[int],
    policy: str,
    *,
    verbose: bool,
    settings: tuple[float, float] | None = None,
) -> list[Row]:
    """Train everything; ``settings`` are rate and weight decay of every network, chosen for each where None is given."""
    rate, decay = settings or choose(task, task.hidden, 1)
    data = [task.make(seed) for seed in seeds]
    rows = monoliths(task, data, seeds, rate, decay)
    wide_rate, wide_decay = settings or choose(task, 3 * task.hidden, 3)
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
    for row, wider in zip(table[:-1], (1, 1, 1, 3), strict=True):
        size = parameters(network(task, data[0], wider))
        row.about |= {"active": size, "total": size}
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
    print(f"  {'':42s}     test   worst   active    total   automode minus it     ahead   on the worst")
    for row in table:
        line = f"  {row.name:42s} {row.test.mean():8.2f} {row.worst.mean():7.2f} {row.about['active']:8d} {row.about['total']:8d}"
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
    for mixture in (m for run in runs for m in run["mixtures"]):
        print(
            f"  a mixture stands beside the model: {mixture['test']:.2f}, worst {mixture['worst']:.2f}, {mixture['parameters']} parameters, all active"
        )
    report_mined([Subset(**subset) for run in runs for subset in run["mined"]])


def report_mined(found: list[Subset]) -> None:
    """Print the arms on mined samples beside those on as many random ones."""
    for reason in sorted({subset.card.partition("@")[0] for subset in found}):
        mine = [subset for subset in found if subset.card.startswith(f"{reason}@")]
        mined, random, everything = (
            np.array([getattr(subset, name) for subset in mine]) for name in ("mined", "random", "everything")
        )
        against, half = interval(mined - random)
        whole, whole_half = interval(mined - everything)
        print(
            f"  {reason}, {len(mine)} subsets of {np.mean([s.share for s in mine]):.0%}, trained on to the end: mined {mined.mean():.2f}, "
            f"as many at random {random.mean():.2f} ({against:+.2f} +- {half:.2f}), all {everything.mean():.2f} ({whole:+.2f} +- {whole_half:.2f})"
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
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"the same, {SMOKE_EPOCHS} epochs, nothing chosen: whether it works, not how well",
    )
    parser.add_argument("--verbose", action="store_true", help="every run's cards and verdicts")
    parser.add_argument("--json", action="store_true", help="one JSON line a task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    short = arguments.quick or arguments.smoke
    names = arguments.tasks or (["digits4", "digits4_n20"] if short else list(TASKS))
    if not os.environ.get("AUTOMODE_DATA"):
        left_out = [name for name in names if name.startswith("mkn")]
        names = [name for name in names if name not in left_out]
        if left_out:
            print(f"left out, since AUTOMODE_DATA names no folder of images: {', '.join(left_out)}")
    count = 2 if short else arguments.seeds
    for name in names:
        task = replace(TASKS[name], epochs=SMOKE_EPOCHS) if arguments.smoke else TASKS[name]
        seeds = [arguments.first_seed + i for i in range(count)]
        table = measure(
            task,
            seeds,
            arguments.policy,
            verbose=arguments.verbose,
            settings=SMOKE_RATE if arguments.smoke else None,
        )
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
