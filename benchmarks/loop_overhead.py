"""What watching costs: a training step under ``automode="observe"`` against the same step of a bare PyTorch loop.

    python benchmarks/loop_overhead.py [--quick] [--processes 10] [--case small] [--loop observe] [--stages]

Every process trains the same network twice at once, bare and watched, in turns of four steps (small) or one step (wide), each
first in every other turn, so that a busy moment of the machine hits both. The measure is the process's CPU time, summed
over every turn: what happens only now and then (a block of rows handed over, a commit, a scan) is in it. ``bare again``
is the bare loop against itself: its distance from nought is the measurement's error. Figures are medians over fresh
processes, with quartiles; differences and ratios are taken within a process.

The bare loop fetches a batch from a ``DataLoader`` and does zero_grad, forward, loss, backward, step, and nothing else.
``observe`` adds, at every step, the loss, the gradient norm, the learning rate and the per-sample losses with their sample
ids, all signals and rules, and the session's file; ``act`` also reads every gradient norm before the step that it may have to
leave out (one rule is on, and nothing fires; averages of the weights apart); ``off`` records the scalars only. A scan clusters some samples and
weighs label noise; it comes every 400 steps in a long run, and ``observe, no scans`` is without it. ``watch`` is the
bare loop inside ``with watch.step()`` and ``s.loss(loss)``; ``watch, samples`` tells outputs, targets and (by
``watch.batches()``) sample ids too, without scans and diagnostics.

Of torch's own Adam and AdamW automode makes the same step in fewer calls (decision 42), which a loop by hand does not. That is a
gain, and no smaller cost of watching; ``torch's step`` names rows without it, in which the optimizer is a subclass on both sides.

``--stages`` says what each layer costs: it begins with a loop that records nothing and adds one layer a row, all with torch's step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import watch
from automode.planner.policy import AveragePolicy, DiagnosticPolicy, Policy, ScanPolicy
from automode.trainer.assembly import open_driver
from automode.trainer.fit_request import FitRequest
from automode.trainer.run_parts import prepare
from automode.trainer.running import begin
from automode.trainer.settings import Settings

BATCH = 128
LONG = 100_000


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network, and how its steps are measured.

    ``turn`` is in steps; ``turns`` and ``warm_up`` are in turns.
    """

    widths: tuple[int, ...]
    rows: int
    turn: int
    turns: int
    warm_up: int
    target: str


CASES = {
    "small": Case(
        widths=(32, 64, 2), rows=4096, turn=4, turns=600, warm_up=50, target="at most 40 us a step more"
    ),
    "wide": Case(
        widths=(256, 1024, 1024, 2), rows=4096, turn=1, turns=160, warm_up=10, target="at most 1.01 times"
    ),
}
LOOPS = (
    "bare again",
    "off",
    "observe, no scans",
    "observe",
    "observe, no scans, torch's step",
    "act",
    "act, torch's step",
    "act, averages",
    "watch",
    "watch, samples",
)

STAGES = {
    "off, no norms, no rows": "the loop itself",
    "off, no rows": "gradient norms",
    "off": "rows, in the session's file",
    "observe, no fold": "per-sample losses and the ledger",
    "observe, no scans": "signals and rules",
    "observe": "scans and diagnostics",
}
"""What each row of ``--stages`` has more than the one before it."""
PLAIN = ", torch's step"


class NamedAdam(torch.optim.Adam):
    """Torch's Adam under another name, so that its own step is called."""


def training(case: Case, name: str) -> dict[str, Any]:
    """Make what a user's script makes."""
    adam = NamedAdam if name.endswith(PLAIN) else torch.optim.Adam
    layers: list[nn.Module] = []
    for inputs, outputs in zip(case.widths, case.widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    features = torch.randn(case.rows, case.widths[0])
    dataset = TensorDataset(features, (features[:, :6].sum(1) > 0).long())
    return {
        "model": model,
        "optimizer": adam(model.parameters(), lr=3e-4),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(dataset, batch_size=BATCH, shuffle=True),
    }


def bare_steps(case: Case, name: str) -> Iterator[int]:
    made = training(case, name)
    model, optimizer, loss_fn = made["model"], made["optimizer"], made["loss_fn"]
    step = 0
    while True:
        for inputs, targets in made["train_loader"]:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            step += 1
            yield step


def watched_steps(case: Case, name: str, folder: str) -> tuple[Iterator[int], Callable[[], None]]:
    """Open a run as ``Trainer.fit`` does, held between two steps; also how to end it."""
    mode: Any = name.partition(",")[0]
    policy = Policy(scan=ScanPolicy(every=LONG)) if "no scans" in name else Policy()
    made = training(case, name)
    if mode == "act":
        averages = AveragePolicy(enabled="averages" in name)
        policy = Policy(reasons=("instability_spike",), averages=averages)
        made["val_loader"] = training(case, name)["train_loader"]
    settings = Settings(max_steps=LONG, automode=mode, session_dir=folder, progress=False, console=False)
    parts = prepare(settings, policy, FitRequest(**made), None)
    driver = open_driver(parts)
    loop = begin(parts, driver)
    without(loop, driver, name)

    def end() -> None:
        loop.flush()
        driver.finish(parts.trunk.step, "measured")
        loop.close()

    return loop.steps(), end


def without(loop: Any, driver: Any, name: str) -> None:
    """Take out the layers that a stage is without."""
    if "no norms" in name:
        loop.probe.take = lambda row: math.nan
    if "no rows" in name:
        driver.block = lambda block: None
    if "no fold" in name:
        driver.state.mode = "off"  # the fold counts rows, and looks at none


def hand_watched_steps(case: Case, name: str, folder: str) -> tuple[Iterator[int], Callable[[], None]]:
    """Watch the bare loop; also how to end it."""
    made = training(case, name)
    model, optimizer, loss_fn = made["model"], made["optimizer"], made["loss_fn"]
    samples = name.endswith("samples")
    more: dict[str, Any] = {}
    if samples:
        quiet = Policy(scan=ScanPolicy(every=LONG), diagnostics=DiagnosticPolicy(enabled=False))
        more = {"loss_fn": loss_fn, "train": made["train_loader"], "policy": quiet}
    watched = watch(model, optimizer, session_dir=folder, console=False, **more)

    def steps() -> Iterator[int]:
        step = 0
        while True:
            for inputs, targets in watched.batches() if samples else made["train_loader"]:
                with watched.step() as s:
                    optimizer.zero_grad(set_to_none=True)
                    outputs = model(inputs)
                    loss = loss_fn(outputs, targets)
                    loss.backward()
                    if samples:
                        s.loss(loss, outputs, targets)
                    else:
                        s.loss(loss)
                    optimizer.step()
                step += 1
                yield step

    return steps(), watched.close


def measure(case: Case, name: str, turns: int) -> tuple[float, float]:
    """CPU microseconds a step of the bare loop and of another, in one process."""
    torch.set_num_threads(1)
    bare, end = bare_steps(case, name), None
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("bare again"):
            other = bare_steps(case, name)
        elif name.startswith("watch"):
            other, end = hand_watched_steps(case, name, folder)
        else:
            other, end = watched_steps(case, name, folder)
        spent = [0.0, 0.0]
        for turn in range(case.warm_up + turns):
            pair = list(enumerate((bare, other)))
            for role, steps in pair if turn % 2 else reversed(pair):
                start = time.process_time()
                for _ in range(case.turn):
                    next(steps)
                if turn >= case.warm_up:
                    spent[role] += time.process_time() - start
        if end is not None:
            end()
    per_step = 1e6 / (turns * case.turn)
    return spent[0] * per_step, spent[1] * per_step


def in_fresh_processes(
    case: str, loops: list[str], turns: int, processes: int
) -> dict[str, list[tuple[float, float]]]:
    """Measure each loop in as many processes, the loops taking turns."""
    found: dict[str, list[tuple[float, float]]] = {loop: [] for loop in loops}
    for _ in range(processes):
        for loop in loops:
            command = [
                sys.executable,
                __file__,
                "--measure",
                "--case",
                case,
                "--loop",
                loop,
                "--turns",
                str(turns),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            bare, other = json.loads(done.stdout.splitlines()[-1])
            found[loop].append((bare, other))
            sys.stderr.write(".")
            sys.stderr.flush()
    sys.stderr.write("\n")
    return found


def spread(values: list[float], digits: int) -> str:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{median(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(name: str, found: dict[str, list[tuple[float, float]]]) -> None:
    case = CASES[name]
    network, processes = "-".join(map(str, case.widths)), len(next(iter(found.values())))
    print(
        f"\nMLP {network}, batch {BATCH}, Adam, DataLoader: {processes} processes a row; target: {case.target}"
    )
    print(f"{'loop':<33}{'bare, us a step':>28}{'us a step':>28}{'us more':>24}{'times bare':>24}")
    for loop, runs in found.items():
        bare, other = [run[0] for run in runs], [run[1] for run in runs]
        more = [b - a for a, b in runs]
        ratio = [b / a for a, b in runs]
        print(
            f"{loop:<33}{spread(bare, 1):>28}{spread(other, 1):>28}{spread(more, 1):>24}{spread(ratio, 3):>24}",
            flush=True,
        )


def report_stages(name: str, found: dict[str, list[tuple[float, float]]]) -> None:
    case = CASES[name]
    network, processes = "-".join(map(str, case.widths)), len(next(iter(found.values())))
    bare = median(bare for runs in found.values() for bare, _ in runs)
    print(f"\nMLP {network}: what each layer costs; bare step {bare:.1f} us, {processes} processes a row")
    print(f"{'layer':<33}{'us more than bare':>24}{'us more than the row before':>30}")
    before = 0.0
    for loop, runs in found.items():
        more = [other - bare for bare, other in runs]
        added = median(more) - before
        own = loop.removesuffix(PLAIN) in STAGES
        label = STAGES[loop.removesuffix(PLAIN)] if own else "the bare loop again"
        print(f"{label:<33}{spread(more, 1):>24}{f'{added:.1f}' if own else '':>30}", flush=True)
        before = median(more) if own else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=10, help="fresh processes a row")
    parser.add_argument("--case", choices=CASES, help="only this network")
    parser.add_argument("--loop", help=f"only this loop: {'; '.join(LOOPS)}")
    parser.add_argument("--quick", action="store_true", help="three processes and a third of the turns")
    parser.add_argument("--stages", action="store_true", help="what each layer costs, one after the other")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(CASES[given.case], given.loop, given.turns)))
        return 0
    processes = 3 if given.quick else given.processes
    if given.loop is not None and given.loop not in LOOPS:
        parser.error(f"there is no loop {given.loop!r}; the loops are {'; '.join(LOOPS)}")
    loops = list(LOOPS) if given.loop is None else [given.loop]
    if given.stages:
        loops = [f"{loop}{PLAIN}" for loop in ("bare again", *STAGES)]
    for name, case in CASES.items():
        if given.case in (None, name):
            turns = case.turns // 3 if given.quick else case.turns
            found = in_fresh_processes(name, loops, turns, processes)
            (report_stages if given.stages else report)(name, found)
    print(f"\n{Path(__file__).name}: torch {torch.__version__}, one thread, {os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
