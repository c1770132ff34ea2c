"""Replay: observations per second of CPU time, and the differences found (there must be none).

Writes a session of a long simulated run in observe mode (a loss that falls in stages, with spikes and non-finite steps)
through the fold and the store, exactly as a driver does, and replays it from disk.

    python benchmarks/replay_speed.py            # 1,000,000 observations, 3 rounds
    python benchmarks/replay_speed.py --quick    # 60,000 observations, 1 round
    python benchmarks/replay_speed.py --session PATH
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from automode.engine import handle, initial
from automode.planner.events import Envelope, Rows, Run, RunEnded, SessionStarted, TrunkEnded
from automode.planner.policy import PLANNER_VERSION, Policy
from automode.session import SessionStore
from automode.session.replaying import replay, to_record

NAMES = ("step", "time", "loss", "grad_norm", "lr_0", "applied", "finite")
BLOCK = 20


def losses(n: int, seed: int = 0) -> np.ndarray:
    """A run that falls and stands still in turns, with a spike in 2,000 and a NaN in 50,000 steps."""
    rng = np.random.default_rng(seed)
    stage = max(2000, n // 20)
    level = 4.0 * 0.9 ** np.minimum(
        np.arange(n) // stage + np.exp(-(np.arange(n) % stage) / 300.0) * -1 + 1, 60
    )
    loss = level * np.exp(0.1 * rng.standard_normal(n))
    loss[rng.random(n) < 1 / 2000] *= 8.0
    loss[rng.random(n) < 1 / 50000] = np.nan
    return loss


def write(path: Path, n: int) -> tuple[int, float]:
    """Write a session; returns (events, CPU seconds)."""
    policy = Policy()
    state = initial()
    run = Run(
        total_steps=n,
        batch=32,
        train_samples=50_000,
        val_a=1000,
        val_b=1000,
        task="classification",
        averages=True,
    )
    loss = losses(n)
    steps = np.arange(1, n + 1, dtype=np.float64)
    values = np.stack(
        [
            steps,
            steps * 1e-3,
            loss,
            np.abs(loss) + 0.5,
            np.full(n, 1e-3),
            np.ones(n),
            np.isfinite(loss) * 1.0,
        ],
        axis=1,
    )
    began = time.process_time()
    with SessionStore.create(path, header={"benchmark": "replay_speed"}) as store:

        def feed(body: object) -> None:
            envelope = Envelope(seq=state.next_seq, role="input", body=body, frame_cursor=state.rows)
            _, facts, commands = handle(state, [envelope])
            told = sorted((envelope, *facts, *commands), key=lambda e: e.seq)
            store.write([to_record(e) for e in told], durable=False)

        feed(
            SessionStarted(
                session="benchmark",
                seed=1,
                mode="observe",
                asked_mode="observe",
                policy=policy.dump(),
                policy_digest=policy.digest,
                planner_version=PLANNER_VERSION,
                run=run,
            )
        )
        for first in range(0, n, BLOCK):
            rows = Rows(first=first, names=NAMES, values=values[first : first + BLOCK])
            store.add_rows("trunk", 1, NAMES, rows.values)
            _, facts, commands = handle(state, [rows])
            if facts or commands:
                told = sorted((*facts, *commands), key=lambda e: e.seq)
                store.write([to_record(e) for e in told], durable=False)
        feed(TrunkEnded(step=n, why="max_steps"))
        feed(RunEnded(step=n, why="max_steps"))
    return state.next_seq - 1, time.process_time() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--session", type=Path)
    arguments = parser.parse_args()
    n, rounds = (60_000, 1) if arguments.quick else (1_000_000, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.session
        if path is None:
            path = Path(folder) / "session"
            events, seconds = write(path, n)
            print(
                f"wrote {n:,} observations and {events:,} events in {seconds:.1f} s of CPU ({n / seconds:,.0f} a second)"
            )
        reports = [replay(path) for _ in range(rounds)]
    rates = sorted(report.rate for report in reports)
    print(
        f"{'observations':>14} {'decisions':>10} {'differences':>12} {'median a second':>16} {'slowest':>10}"
    )
    print(
        f"{reports[0].observations:>14,} {reports[0].decisions:>10,} {max(r.differences for r in reports):>12} "
        f"{statistics.median(rates):>16,.0f} {rates[0]:>10,.0f}"
    )


if __name__ == "__main__":
    main()
