"""What a backend costs: start-up to the first trial's step, a trial once warm, a lost worker, a pump when nothing has ended.

Every figure is taken in fresh processes, round by round with the backends interleaved, and the median over the rounds is shown. Each
process has torch and automode imported before its clock starts. Trials are real specialists of a small network that train one step
and are judged on 40 samples, one under way at a time. A backend's overhead is what such a trial takes beyond the same one without a
backend, trained right before it: the median of the differences. An empty trial trains nothing. The pump's figure is CPU time.

Ray takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("inline", "forkserver", "fork", "spawn", "ray")
COLUMNS = {
    "start": "made, s",
    "first": "first step, s",
    "alone": "no backend, ms",
    "overhead": "overhead, ms",
    "scripted": "empty trial, ms",
    "lost": "after a kill, s",
    "pump": "idle pump, us",
}
TRIALS = 40
PUMPS = 5000


def measure(kind: str) -> dict[str, float]:
    """Measure one backend in this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from automode.planner.recipes import Variant
    from automode.testing.bench import make_bench

    with tempfile.TemporaryDirectory() as folder:
        return measure_backend(kind, make_bench(Path(folder)), Variant(name="plain"))


def measure_backend(kind: str, bench: Any, plain: Any) -> dict[str, float]:
    from automode.testing.scripted import ScriptedRunner, scripted_job

    began = time.perf_counter()
    backend = made(kind, bench.runner, bench)
    found = {"start": time.perf_counter() - began}
    try:
        run(backend, bench.job(plain, end=1))
        found["first"] = time.perf_counter() - began
        alone, overhead = [], []
        for trial in range(TRIALS):
            job = bench.job(plain, trial=trial, end=1)
            alone.append(1e3 * seconds(lambda job=job: bench.train(job)))  # type: ignore[misc]  # bound now
            bench.checkpoints.collect([bench.base])
            overhead.append(1e3 * seconds(lambda job=job: run(backend, job)) - alone[-1])  # type: ignore[misc]
            bench.checkpoints.collect([bench.base])
        found["alone"], found["overhead"] = statistics.median(alone), statistics.median(overhead)
        found["pump"] = idle_pump(backend)
        if kind not in ("inline", "ray"):
            found["lost"] = after_a_kill(backend, lambda: bench.job(plain, end=1))
    finally:
        backend.close()
    backend = made(kind, ScriptedRunner(), None)
    try:
        run(backend, scripted_job(end=1))
        job = scripted_job(end=1)
        found["scripted"] = 1e3 * statistics.median(seconds(lambda: run(backend, job)) for _ in range(TRIALS))
    finally:
        backend.close()
    return found


def made(kind: str, runner: Any, bench: Any) -> Any:
    """Make a backend over specialists (with a bench) or over a plain runner."""
    from automode.backends.inline import InlineBackend
    from automode.backends.process import ProcessBackend
    from automode.backends.ray import RayBackend
    from automode.backends.remote import ReadyMade, no_brief
    from automode.trainer.worker_runner import CardBriefs

    if kind == "inline":
        return InlineBackend(runner)
    factory = ReadyMade(runner) if bench is None else bench.factory()
    brief = no_brief if bench is None else CardBriefs(runner)
    match kind:
        case "ray":
            return RayBackend(factory, slots=1, brief=brief)
        case "forkserver" | "fork" | "spawn":
            return ProcessBackend(factory, slots=1, brief=brief, start=kind)  # type: ignore[arg-type]  # of KINDS
    raise ValueError(kind)


def run(backend: Any, job: Any) -> None:
    """Run one job to its end."""
    backend.submit(job)
    wait = getattr(backend, "wait", None)
    while backend.busy:
        if wait is not None:
            wait(1.0)
        for result in backend.pump(1):
            assert type(result).__name__ == "SegmentDone", result


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def idle_pump(backend: Any) -> float:
    began = time.process_time()
    for _ in range(PUMPS):
        backend.pump(1)
    return 1e6 * (time.process_time() - began) / PUMPS


def after_a_kill(backend: Any, job: Callable[[], Any]) -> float:
    """Seconds from a worker's death to the end of the next trial, which a fresh worker trains."""
    times = []
    workers = backend._workers  # noqa: SLF001  # from outside a worker's death is what the process table shows, no sooner
    for _ in range(5):
        workers[0].started.process.kill()
        began = time.perf_counter()
        while workers:
            backend.pump(1)
        run(backend, job())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def rounds(kinds: list[str], n: int) -> dict[str, dict[str, list[float]]]:
    """Measure every kind n times, each time in a fresh process."""
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    for _ in range(n):
        for kind in kinds:
            done = subprocess.run(
                [sys.executable, __file__, "--measure", kind], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                found[kind].setdefault(name, []).append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=KINDS, help="measure one backend in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    import multiprocessing

    ways = multiprocessing.get_all_start_methods()
    known = {"inline", *ways} | ({"ray"} if importlib.util.find_spec("ray") else set())
    found = rounds([kind for kind in KINDS if kind in known], arguments.rounds)
    print(f"{'':12}" + "".join(f"{title:>17}" for title in COLUMNS.values()))
    for kind, values in found.items():
        cells = [
            f"{statistics.median(values[name]):17.3f}" if name in values else f"{'-':>17}" for name in COLUMNS
        ]
        print(f"{kind:12}" + "".join(cells))
    if "ray" not in known:
        print("ray: not installed")


if __name__ == "__main__":
    main()
