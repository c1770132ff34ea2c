"""The fast path for tensors: automode's loop with TensorLoader and FlatAdamW against loops by hand, DataLoader and Lightning.

    python benchmarks/fast_path.py [--rounds 20] [--case tiny]

Every loop trains the same network on the same data in memory, with AdamW at its defaults (``flat`` has the same arithmetic, in one
buffer), one thread. A round gives each loop the same number of steps, one after the other in turning order, so that a busy moment
of the machine hits all; the measure is CPU time a step, the median over rounds. Set-up is left out for everyone: Lightning is
timed from ``on_train_start`` to ``on_train_end``, everything switched off; automode's loop is held between steps.

``by hand, DataLoader`` is the loop of every tutorial. ``by hand, gathered`` indexes each batch out of the tensors and notes its
loss. ``by hand, permuted`` draws one permutation an epoch, gathers all rows
with ``index_select`` and slices: the fastest that a person writes without touching the optimizer; it records nothing.
``by hand, permuted, losses`` also notes its loss, which is the least that automode does: in mode off it records loss, gradient norm,
learning rate and time of every step in its session, and in ``observe`` per-sample losses, signals and rules besides. Torch's own AdamW
ends with the same bits in all loops that have it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import FlatAdamW, TensorLoader
from automode.planner.policy import Policy
from automode.trainer.assembly import open_driver
from automode.trainer.fit_request import FitRequest
from automode.trainer.run_parts import prepare
from automode.trainer.running import begin
from automode.trainer.settings import Settings

FOREVER = 1 << 40
YARDSTICK = "by hand, permuted"


@dataclass(frozen=True)
class Case:
    """A network, its data, and the steps of a round."""

    rows: int
    widths: tuple[int, ...]
    batch: int
    steps: int


CASES = {
    "tiny": Case(rows=1024, widths=(10, 32, 2), batch=32, steps=96),
    "small": Case(rows=10240, widths=(20, 64, 64, 2), batch=256, steps=40),
    "wide": Case(rows=10240, widths=(64, 256, 256, 2), batch=256, steps=20),
}


def network(case: Case) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(case.widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data(case: Case) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(case.rows, case.widths[0], generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def by_hand(
    case: Case, batches: Callable[[], Iterator[Any]], *, notes: list[float] | None = None
) -> Iterator[None]:
    model, loss_fn = network(case), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters())
    while True:
        for inputs, targets in batches():
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            if notes is not None:
                notes.append(loss.item())
            yield


def loaded(case: Case) -> Iterator[None]:
    loader = DataLoader(data(case), batch_size=case.batch, shuffle=True)
    return by_hand(case, lambda: iter(loader))


def permuted(case: Case, *, notes: list[float] | None = None) -> Iterator[None]:
    inputs, targets = data(case).tensors

    def batches() -> Iterator[Any]:
        order = torch.randperm(len(inputs))
        shuffled = inputs.index_select(0, order), targets.index_select(0, order)
        return zip(*(part.split(case.batch) for part in shuffled), strict=True)

    return by_hand(case, batches, notes=notes)


def gathered(case: Case) -> Iterator[None]:
    inputs, targets = data(case).tensors

    def batches() -> Iterator[Any]:
        for rows in torch.randperm(len(inputs)).split(case.batch):
            yield inputs[rows], targets[rows]

    return by_hand(case, batches, notes=[])


def automode(case: Case, folder: str, loader: Any, optimizer: Any, mode: Any = "off") -> Iterator[None]:
    """A run as ``Trainer.fit`` makes it, held between two steps."""
    model = network(case)
    request = FitRequest(
        model=model,
        optimizer=optimizer(model.parameters()),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=loader(data(case), batch_size=case.batch, shuffle=True),
    )
    settings = Settings(max_steps=FOREVER, automode=mode, session_dir=folder, progress=False, console=False)
    parts = prepare(settings, Policy(), request, None)
    loop = begin(parts, open_driver(parts))
    loop.companions.start()
    for _ in loop.steps():
        yield


def lightning(case: Case) -> Callable[[], float]:
    """Give a function that trains one round with Lightning, and returns its CPU seconds a step."""
    warnings.filterwarnings("ignore")
    import logging

    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(case)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    class Clock(pl.Callback):
        spent = 0.0

        def on_train_start(self, *_: Any) -> None:
            self.spent = -time.process_time()

        def on_train_end(self, *_: Any) -> None:
            self.spent += time.process_time()

    module, loader = Module(), DataLoader(data(case), batch_size=case.batch, shuffle=True)

    def run() -> float:
        clock = Clock()
        trainer = pl.Trainer(
            max_steps=case.steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(module, loader)
        return clock.spent / case.steps

    return run


def stepped(steps: Iterator[None], count: int) -> Callable[[], float]:
    def run() -> float:
        start = time.process_time()
        for _ in range(count):
            next(steps)
        return (time.process_time() - start) / count

    return run


def loops(case: Case, folder: str) -> dict[str, Callable[[], float]]:
    plain = torch.optim.AdamW
    held = {
        YARDSTICK: permuted(case),
        "by hand, permuted, again": permuted(case),
        "by hand, permuted, losses": permuted(case, notes=[]),
        "by hand, gathered": gathered(case),
        "by hand, DataLoader": loaded(case),
        "automode, DataLoader, off": automode(case, folder, DataLoader, plain),
        "automode, TensorLoader, off": automode(case, folder, TensorLoader, plain),
        "the same, observe": automode(case, folder, TensorLoader, plain, "observe"),
        "with FlatAdamW, off": automode(case, folder, TensorLoader, FlatAdamW),
        "with FlatAdamW, observe": automode(case, folder, TensorLoader, FlatAdamW, "observe"),
    }
    return {name: stepped(steps, case.steps) for name, steps in held.items()} | {"Lightning": lightning(case)}


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """CPU microseconds a step of every loop, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        runs = loops(case, folder)
        spent: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for turn in range(rounds + 2):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds = runs[name]()
                if turn >= 2:  # the first two warm up
                    spent[name].append(1e6 * seconds)
    return spent


def report(name: str, case: Case, spent: dict[str, list[float]]) -> None:
    print(
        f"\n{name}: {case.rows} x {case.widths[0]}, MLP {'-'.join(map(str, case.widths))}, batches of {case.batch}"
    )
    print(f"{'loop':<30}{'us a step':>12}{'quickest fourth':>18}{'times as fast as ' + YARDSTICK:>40}")
    for loop, values in spent.items():
        ratios = [theirs / mine for theirs, mine in zip(spent[YARDSTICK], values, strict=True)]
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        quick = quantiles(values, n=4, method="inclusive")[0]
        print(
            f"{loop:<30}{median(values):>12.0f}{quick:>18.0f}{f'{median(ratios):.2f} [{low:.2f}, {high:.2f}]':>40}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--case", choices=CASES, help="only this network")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if given.case in (None, name):
            report(name, case, measure(case, given.rounds))
    print(
        f"\n{Path(__file__).name}: torch {torch.__version__}, one thread, {os.cpu_count()} cores",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
