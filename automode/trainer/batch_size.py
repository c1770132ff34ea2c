"""How many samples a training step takes, which everything that costs compute is priced by."""

from __future__ import annotations

from typing import Any

import numpy as np

from automode.trainer.run_parts import RunParts


def batch_size_of(parts: RunParts, unknown: float = 1.0) -> float:
    """Mean samples a step; ``unknown`` where the loader does not say."""
    if parts.batch is not None:
        return parts.batch
    loader, steps = parts.request.train_loader, parts.plan.steps_per_epoch
    size = getattr(loader, "batch_size", None)
    if isinstance(size, int):
        n = len(loader.dataset) if steps and hasattr(loader.dataset, "__len__") else 0  # type: ignore[attr-defined]
        mean = n / steps if n and steps and not getattr(loader, "drop_last", False) else float(size)
        return mean if parts.trunk.held is None else mean * parts.trunk.held.trained
    if (batches := getattr(loader, "batch_sampler", None)) is not None:
        mean = _rows_of(batches, getattr(loader, "dataset", None), steps) or unknown
        return mean if parts.trunk.held is None else mean * parts.trunk.held.trained
    if isinstance(loader, list | tuple) and loader and isinstance(loader[0], list | tuple):
        return float(np.mean([len(batch[0]) for batch in loader]))
    return unknown


def _rows_of(batches: Any, dataset: Any, steps: int | None) -> float | None:
    """Mean samples a step of a batch sampler of the user's: what it says, else as if a pass read the dataset once."""
    size = getattr(batches, "batch_size", None)
    if isinstance(size, int) and size > 0:
        return float(size)
    return len(dataset) / steps if steps and hasattr(dataset, "__len__") else None
