"""What a session's header says of the run: who made it, of what, and on which data."""

from __future__ import annotations

import hashlib
import platform
import sys
from typing import Any

import numpy as np
import torch

from automode import __version__
from automode.planner.events import Mode
from automode.trainer.command_line import started
from automode.trainer.ids import fingerprint, root_of
from automode.trainer.run_parts import RunParts


def header_of(parts: RunParts, mode: Mode) -> dict[str, Any]:
    """Say what a run is made of, as JSON types.

    Args:
        parts: The run.
        mode: The mode that it begins in.
    """
    trunk = parts.trunk
    return {
        "project": parts.settings.project,
        "run_name": parts.settings.run_name,
        "mode": mode,
        "automode": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": str(trunk.device),
        "threads": torch.get_num_threads(),
        "precision": trunk.precision,
        "backend": parts.settings.backend,
        "model": type(trunk.model).__name__,
        "parameters": sum(p.numel() for p in trunk.model.parameters()),
        "optimizer": type(trunk.optimizer).__name__,
        "scheduler": None if trunk.scheduler is None else type(trunk.scheduler).__name__,
        "data": {
            "train": data_of(parts.request.train_loader),
            "held_out": data_of(parts.request.val_loader),
        },
        "seed": parts.seed,
        "watched": parts.hand_written is not None,
        "command": sys.argv,
        "started": started(),
    }


def data_of(loader: Any) -> str | None:
    """Name the samples of a loader: the fingerprint of its root dataset, and of a ``Subset`` a digest of its ids too.

    Nothing is read through the dataset's ``__getitem__``. Order, batches and collation are not part of it.

    Returns:
        The name; None where there is no loader, or none with a dataset.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        return None
    root, ids = root_of(dataset)
    name = fingerprint(root)
    if ids is None:
        return name
    digest = hashlib.sha256(np.unique(np.asarray(ids, dtype="<i8")).tobytes()).hexdigest()
    return f"{name}[{len(ids)}:{digest[:16]}]"
