"""What the trajectory averages cost, as a share of a plain training step.

    python benchmarks/averages_cost.py [--every 32] [--repeats 15]

Two networks on one CPU thread: the smallest that a script is likely to train (every overhead shows) and a wider one
(memory traffic shows), each with the cheapest optimizer (SGD, the hardest case for a share) and with AdamW. The cost of
one update is timed on its own and divided by the cadence; the check that the other steps pay is timed and added. The
target is under 0.3 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from automode.merges.trajectory import DEFAULT_EVERY, TrajectoryAverages

TARGET_PERCENT = 0.3
NETWORKS = {"mlp_32_64_2": (32, 64, 2), "mlp_256_1024_1024_2": (256, 1024, 1024, 2)}
BATCH = 128


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def measure(widths: tuple[int, ...], optimizer_name: str, every: int, repeats: int) -> dict[str, float]:
    """Time a step, an update and a check in turns, so that a busy moment of the machine hits all three."""
    torch.manual_seed(0)
    model = mlp(widths)
    optimizer: torch.optim.Optimizer
    if optimizer_name == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = torch.randn(BATCH, widths[0]), torch.randint(0, widths[-1], (BATCH,))
    parameters = dict(model.named_parameters())
    averages = TrajectoryAverages(parameters, 100_000, every=every)
    step_number = 0

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        torch.autograd.backward(loss)
        optimizer.step()

    def update() -> None:
        nonlocal step_number
        step_number += every
        averages.update(parameters, step_number)

    def check() -> None:
        averages.update(parameters, step_number)

    calls = max(3, 400_000 // sum(p.numel() for p in parameters.values()))
    rounds = [
        tuple(seconds_per_call(call, calls) for call in (step, update, check)) for _ in range(repeats + 1)
    ]
    step_s, update_s, check_s = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    share = (update_s / every + check_s) / step_s
    return {
        "step_us": step_s * 1e6,
        "update_us": update_s * 1e6,
        "check_us": check_s * 1e6,
        "cost_percent": 100 * share,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of the trajectory averages against a training step.")
    parser.add_argument("--every", type=int, default=DEFAULT_EVERY)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {
        f"{name}/{optimizer}": measure(widths, optimizer, given.every, given.repeats)
        for name, widths in NETWORKS.items()
        for optimizer in ("sgd", "adamw")
    }
    worst = max(row["cost_percent"] for row in rows.values())
    result = {
        "every": given.every,
        "batch": BATCH,
        "target_percent": TARGET_PERCENT,
        "rows": rows,
        "worst": worst,
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if worst < TARGET_PERCENT else 1


if __name__ == "__main__":
    raise SystemExit(main())
