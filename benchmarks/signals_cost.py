"""What does each streaming signal cost in CPU microseconds per step?

Usage: python benchmarks/signals_cost.py [--steps 40000] [--repeats 5] [--limit 10]

CPU time of this process, the smallest of several repeats, on a loss that falls as a power law under 10 % noise and a heavy-tailed
gradient norm; lists of Python floats, as the fold sees them. ``--limit``: exit with status 1 when the whole set costs more.
The single signals do not sum to the whole: calling each costs something, and the whole also compares and counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from time import process_time

import numpy as np

from automode.planner.signals import (
    BlockTrend,
    LevelShift,
    MannKendall,
    NonFinite,
    PageHinkley,
    RobustZ,
    SignalSuite,
    SpikeBurst,
)

WHOLE = "all, observe() per step"


def measure(make: Callable[[], Callable[[], None]], steps: int, repeats: int) -> float:
    """Smallest CPU microseconds a step of a pass that `make` prepares."""
    best = float("inf")
    for _ in range(repeats):
        run = make()
        begin = process_time()
        run()
        best = min(best, process_time() - begin)
    return best / steps * 1e6


def cases(n: int) -> list[tuple[str, Callable[[], Callable[[], None]]]]:
    """Name of each row, and what prepares one pass over `n` steps."""
    rng = np.random.default_rng(0)
    t = np.arange(n)
    losses = ((2.0 * (t + 50.0) ** -0.3 + 0.3) * np.exp(0.1 * rng.standard_normal(n))).tolist()
    norms = np.exp(0.2 * rng.standard_t(4, n)).tolist()
    scores = rng.standard_normal(n).tolist()
    rates = (0.05 * (1.0 + np.cos(np.pi * t / n))).tolist()
    columns = {"step": t, "loss": losses, "grad_norm": norms, "lr": rates, "applied": [True] * n}

    def one(update: Callable[[float], object], values: list[float]) -> Callable[[], None]:
        def run() -> None:
            for value in values:
                update(value)

        return run

    def non_finite() -> Callable[[], None]:
        update = NonFinite().update

        def run() -> None:
            for loss, norm in zip(losses, norms, strict=True):
                update(loss, norm, True)

        return run

    def whole() -> Callable[[], None]:
        observe = SignalSuite().observe

        def run() -> None:
            for step, (loss, norm, rate) in enumerate(zip(losses, norms, rates, strict=True)):
                observe(step, loss, norm, rate, True)

        return run

    def block() -> Callable[[], None]:
        suite = SignalSuite()

        def run() -> None:
            suite.observe_block(columns)

        return run

    burst = SpikeBurst()
    return [
        ("S0 non-finite, skipped steps", non_finite),
        ("S1 robust z, loss (w=101)", lambda: one(RobustZ(base=5.5).update, losses)),
        ("S1 robust z, gradient norm", lambda: one(RobustZ(base=8.0, signed=False).update, norms)),
        ("   spike burst", lambda: one(lambda _: burst.update(False), losses)),
        ("S2 level shift", lambda: one(LevelShift().update, scores)),
        ("   Page-Hinkley", lambda: one(PageHinkley().update, scores)),
        ("S3 + S4 trend, B=800", lambda: one(BlockTrend(budget=800).update, losses)),
        ("S3 + S4 trend, B=100", lambda: one(BlockTrend(budget=100).update, losses)),
        ("   Mann-Kendall on every step, w=800", lambda: one(MannKendall(window=800).update, losses)),
        (WHOLE, whole),
        ("all, observe_block()", block),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--limit", type=float, default=None, help="exit with 1 when the whole set costs more, in us"
    )
    options = parser.parse_args()
    cost = {}
    for name, make in cases(options.steps):
        cost[name] = measure(make, options.steps, options.repeats)
        print(f"{name:<40} {cost[name]:6.2f} us/step")
    total = cost[WHOLE]
    print(f"share of a 5 ms step: {total / 5000:.3%}")
    if options.limit is not None and total > options.limit:
        print(f"the whole set costs {total:.2f} us a step, more than {options.limit:g}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
