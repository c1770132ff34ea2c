"""Does the loader keep up with the model?"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from automode.errors import NotExecutableError
from automode.trainer.health.ground import Finding, Ground
from automode.trainer.random_state import seeded_rng
from automode.trainer.step_choice import step_of
from automode.trainer.tensor_loader import TensorLoader

WAITING = 0.3
"""Share of a step spent waiting for its batch, from which the loader is doubtful."""


class _Unguarded:
    guard = False


def check(ground: Ground) -> Finding:
    """Time the reading of batches as the loader reads them, and the training of steps, one apart from the other."""
    batches = ground.batches()
    load, read = _loading(ground)
    compute = _computing(ground, batches)
    workers = getattr(ground.parts.request.train_loader, "num_workers", 0)
    # Workers read while the model computes; without them one waits for the other.
    waiting = max(0.0, load - compute) / max(load, compute) if workers else load / (load + compute)
    numbers = {
        "load_ms": load * 1e3,
        "compute_ms": compute * 1e3,
        "waiting_share": waiting,
        "workers": float(workers),
        "batches_read": float(read),
    }
    each = f"a batch takes {load * 1e3:.3g} ms to read ({workers} workers) and {compute * 1e3:.3g} ms to train on"
    if waiting > WAITING:
        why = f"{each}: the model waits for {waiting:.0%} of the time; give the loader more workers, or tensors that are in memory"
        return Finding(verdict="doubtful", why=why, numbers=numbers)
    return Finding(verdict="good", why=each, numbers=numbers)


def _computing(ground: Ground, batches: list[Any]) -> float:
    """Seconds of a step, the fastest of some: what else the machine does is not the model's fault."""
    trunk, device = ground.parts.trunk, ground.parts.trunk.device
    best = float("inf")
    with ground.undisturbed():
        train = step_of(ground.parts, _Unguarded())
        try:
            for batch in [batches[0], *batches]:  # the first one warms up
                _wait_for(device)
                began = time.perf_counter()
                taken = train(batch, ground.loop.epoch)
                if taken.pending:
                    trunk.optimizer.step()
                _wait_for(device)
                best = min(best, time.perf_counter() - began)
        finally:
            train.close()
    return best


def _loading(ground: Ground) -> tuple[float, int]:
    """Seconds until the next batch is there, once the loader runs, and how many batches were read to tell."""
    given: Any = ground.parts.request.train_loader
    if isinstance(given, list | tuple):
        return 0.0, 0
    if not isinstance(given, DataLoader) or given.batch_sampler is None:
        raise NotExecutableError(f"a {type(given).__name__} cannot be read beside the run")
    size = max(1, len(ground.batches()[0][0]) if _countable(ground) else 1)
    ahead = given.num_workers * (given.prefetch_factor or 0)
    count = ground.steps + ahead + 1
    lists = [[(i * size + j) % len(given.dataset) for j in range(size)] for i in range(count)]  # type: ignore[arg-type]
    with ground.undisturbed(), seeded_rng(ground.parts.seed & 0xFFFFFFFF):
        batches = iter(_alike(given, lists))
        next(batches)
        began = time.perf_counter()
        read = sum(1 for _ in batches)
        return (time.perf_counter() - began) / max(1, read), read


def _countable(ground: Ground) -> bool:
    first = ground.batches()[0]
    return isinstance(first, list | tuple) and bool(first) and hasattr(first[0], "__len__")


def _alike(given: DataLoader[Any], lists: list[list[int]]) -> DataLoader[Any]:
    """A loader that reads as the user's does, with workers of its own and without its sampler."""
    if isinstance(given, TensorLoader):
        return TensorLoader(given.dataset, batch_size=len(lists[0]))
    more: dict[str, Any] = {}
    if given.num_workers:
        more = {
            "prefetch_factor": given.prefetch_factor,
            "multiprocessing_context": given.multiprocessing_context,
            "worker_init_fn": given.worker_init_fn,
        }
    return DataLoader(
        given.dataset,
        batch_sampler=lists,
        collate_fn=given.collate_fn,
        num_workers=given.num_workers,
        pin_memory=given.pin_memory,
        **more,
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
