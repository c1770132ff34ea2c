"""What the probe costs a training step: ids, gradient norm, record, and the drain with per-sample losses and ledger.

    python benchmarks/probe_cost.py [--windows 30] [--classes 2]

An MLP 32-64-C is trained with AdamW through a shuffling DataLoader, batch 128, one CPU thread, in windows of 320 steps,
in turn with the probe and without. Given is the thread's CPU time in microseconds a step: the median window, and the one
at the lowest tenth, which other work on the machine has disturbed least. ``record`` and ``drain`` (with ledger flushes)
are timed inside the loop, the cost of the timer taken off. A watched step less a bare one also holds the reading of ids
and what the probe displaces from the caches, and not the freeing of memory that the probe merely puts off. The target is
35 for all, with two classes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode.trainer.ids import RecordedLoader
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.probe import Probe
from automode.trainer.sample_ledger import SampleLedger

SAMPLES, FEATURES, HIDDEN, BATCH, WINDOW = 4096, 32, 64, 128, 320
TARGET_US = 35.0


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def measure(windows: int, classes: int) -> dict[str, list[float]]:
    """Train, and give the microseconds a step of each part, window by window."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(SAMPLES, FEATURES), torch.randint(0, classes, (SAMPLES,)))
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorded = RecordedLoader(DataLoader(data, batch_size=BATCH, shuffle=True))
    twin = per_sample_twin(loss_fn)
    probe = Probe(model.parameters(), twin, recorded, SampleLedger(SAMPLES))
    watched, bare = endless(recorded), endless(recorded.loader)
    clock = time.thread_time
    timer = statistics.median(-clock() + clock() for _ in range(2000))

    def forward_and_backward(batches: Iterator[Any]) -> tuple[Any, Any, Any]:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = loss_fn(outputs, targets)
        loss.backward()
        return loss, outputs, targets

    spent: dict[str, list[float]] = {"bare step": [], "record": [], "drain": [], "watched step": []}
    for _ in range(windows + 1):
        start = clock()
        for _ in range(WINDOW):
            forward_and_backward(bare)
            optimizer.step()
        without = clock() - start
        record = drain = calls = 0.0
        start = clock()
        for step in range(WINDOW):
            loss, outputs, targets = forward_and_backward(watched)
            before = clock()
            full = probe.record(step, loss, None, (1e-3,), True, outputs, targets, recorded.ids_of_batch())
            record += clock() - before - timer
            optimizer.step()
            calls += 2
            if full:
                before = clock()
                probe.drain()
                drain += clock() - before - timer
                calls += 2
        observed = clock() - start - calls * timer
        for part, seconds in zip(spent, (without, record, drain, observed), strict=True):
            spent[part].append(seconds)
    assert probe.reason is None, probe.reason
    return {part: [window / WINDOW * 1e6 for window in seconds[1:]] for part, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=30)
    parser.add_argument("--classes", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.windows, options.classes)
    found["all"] = [record + drain for record, drain in zip(found["record"], found["drain"], strict=True)]
    print(f"MLP {FEATURES}-{HIDDEN}-{options.classes}, batch {BATCH}; microseconds of CPU a step")
    print(f"{'':14}{'median':>10}{'low tenth':>12}")
    for part, windows in found.items():
        low = sorted(windows)[len(windows) // 10]
        print(f"{part:14}{statistics.median(windows):10.1f}{low:12.1f}")
    print(f"target: {TARGET_US:.0f} for all")


if __name__ == "__main__":
    main()
