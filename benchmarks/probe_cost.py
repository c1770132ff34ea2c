"""What the probe costs a training step: ids, gradient norm, record, and the drain with per-sample losses and ledger.

    python benchmarks/probe_cost.py [--windows 20] [--classes 2]

An MLP 32-64-C is trained with AdamW through a shuffling DataLoader, batch 128, one CPU thread. Each part is timed inside
that loop in process CPU time and given in microseconds a step (median over rounds of 20 steps, drain included). The
target is 35 microseconds a step for everything, with two classes.
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


def measure(windows: int, classes: int) -> dict[str, float]:
    """Train, and give the median microseconds a step of each part."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(SAMPLES, FEATURES), torch.randint(0, classes, (SAMPLES,)))
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorded = RecordedLoader(DataLoader(data, batch_size=BATCH, shuffle=True))
    twin = per_sample_twin(loss_fn)
    probe = Probe(model.parameters(), twin, recorded, SampleLedger(SAMPLES), max_age=60.0)
    batches = endless(recorded)
    clock = time.thread_time
    timer = statistics.median(-clock() + clock() for _ in range(2000))
    spent: dict[str, list[float]] = {"step": [], "record": [], "drain": []}
    for _ in range(windows + 1):
        window = dict.fromkeys(spent, 0.0)
        for step in range(WINDOW):
            begin = clock()
            inputs, targets = next(batches)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            before = clock()
            full = probe.record(step, loss, None, (1e-3,), True, outputs, targets, recorded.ids_of_batch())
            after = clock()
            optimizer.step()
            end = clock()
            window["step"] += before - begin + end - after - 2 * timer
            window["record"] += after - before - timer
            if full:
                begin = clock()
                probe.drain()
                window["drain"] += clock() - begin - timer
        for part, seconds in window.items():
            spent[part].append(seconds)
    assert probe.reason is None, probe.reason
    return {part: statistics.median(seconds[1:]) / WINDOW * 1e6 for part, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--classes", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.windows, options.classes)
    step = found.pop("step")
    print(f"MLP {FEATURES}-{HIDDEN}-{options.classes}, batch {BATCH}: a bare step takes {step:.0f} us of CPU")
    for part, microseconds in found.items():
        print(f"  {part:16}{microseconds:8.1f} us a step")
    total = sum(found.values())
    verdict = "within" if total <= TARGET_US else "over"
    print(f"  {'all':16}{total:8.1f} us a step ({verdict} the target of {TARGET_US:.0f})")


if __name__ == "__main__":
    main()
