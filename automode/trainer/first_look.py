"""What is known of the data and of the task before the first step: from one batch, or from the log of the run that is taken up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from automode.errors import AutomodeError
from automode.merges.batches import training_flags_kept
from automode.planner.events import Run, Task
from automode.trainer.heldout import HeldOut, Overlap, find_overlap
from automode.trainer.ids import root_of
from automode.trainer.per_sample import PerSampleLoss, per_sample_twin
from automode.trainer.reach import as_read
from automode.trainer.run_parts import RunParts
from automode.trainer.sample_source import Ids, SampleSource
from automode.trainer.user_warning import warn_user


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What is known of the held-out data and of the task before the first step."""

    overlap: Overlap
    task: Task
    per_sample: PerSampleLoss
    exact: bool
    why_inexact: str | None
    why_no_evidence: str | None


def look_at(parts: RunParts) -> Held:
    """Find out what the held-out data and the loss are good for; nothing is changed by it."""
    request, held = parts.request, parts.held_out
    if parts.mode == "off":
        return Held(
            overlap=Overlap(n=0, share=0.0, how="none"),
            task="unknown",
            per_sample=per_sample_twin(parts.trunk.loss_fn),
            exact=False,
            why_inexact="mode off only records",
            why_no_evidence="mode off only records",
        )
    why_no_evidence = "there is no validation loader" if held is None else held.reason
    overlap = Overlap(n=0, share=0.0, how="none")
    readable = held is None or held.readable
    apart = request.val_loader is not None and hasattr(request.train_loader, "dataset")
    if held is not None and readable and held.reason is None and apart:
        overlap = find_overlap(as_read(request.train_loader), as_read(request.val_loader, draw=True))
    if overlap.n:
        warn_user(
            f"{overlap.n} of the validation samples ({overlap.share:.0%} of those looked at) are training samples too, by their "
            f"{overlap.how}: such a validation proves nothing. Hold data out (torch.utils.data.random_split) to let automode act"
        )
        why_no_evidence = why_no_evidence or f"{overlap.n} validation samples are training samples too"
    per_sample = per_sample_twin(parts.trunk.loss_fn)
    task, exact, why = _task_of(parts, held, per_sample)
    if readable and parts.own_step is None and task in ("sequence", "unknown") and not exact:
        why_no_evidence = why_no_evidence or (
            f"samples cannot be judged one by one ({why}), and a batch's mean counts as one sample only"
        )
    return Held(
        overlap=overlap,
        task=task,
        per_sample=per_sample,
        exact=exact,
        why_inexact=why,
        why_no_evidence=why_no_evidence,
    )


def _task_of(
    parts: RunParts, held: HeldOut | None, per_sample: PerSampleLoss
) -> tuple[Task, bool, str | None]:
    """Read one batch without a trace; a model that fails on it will say so itself when training begins."""
    trunk = parts.trunk
    if parts.own_step is not None:
        return "unknown", False, "the training step is the user's own, and shows outputs only as it goes"
    try:
        batch = _one_batch(parts, held)
        if batch is None:
            return "unknown", False, "no sample can be read before training begins"
        with training_flags_kept(trunk.model), torch.no_grad():
            trunk.model.eval()
            with trunk.autocast():
                loss, outputs, targets = trunk.step_fn(trunk.model, batch)
        exact = per_sample.check(outputs, targets, loss)
        kind = per_sample.task(outputs, targets)
    except Exception as error:  # whatever it is, training will meet it, and tell it as it is
        return "unknown", False, f"one batch could not be read beforehand ({type(error).__name__}: {error})"
    return kind if kind != "binary" else "unknown", exact, per_sample.reason


def _one_batch(parts: RunParts, held: HeldOut | None) -> Any:
    if held is not None and held.readable and held.reason is None:
        return next(held.batches("A"))[0]
    source, ids = source_of(parts)
    return source.batch(ids[: min(8, ids.size)]) if source is not None and ids.size else None


def source_of(parts: RunParts) -> tuple[SampleSource | None, Ids]:
    """Training samples by id, and every id that training may visit; held-out samples are none of them."""
    none = np.empty(0, dtype=np.int64)
    loader = parts.request.train_loader
    if parts.loader.reason is not None or not hasattr(loader, "dataset"):
        return None, none
    try:
        dataset = as_read(loader)
        root, mapped = root_of(dataset)
        ids = np.arange(len(dataset), dtype=np.int64) if mapped is None else np.unique(mapped)
        collate: Callable[[list[Any]], Any] = getattr(loader, "collate_fn", None) or default_collate
        if parts.trunk.held is not None:
            ids = np.setdiff1d(ids, parts.trunk.held.ids)
        return SampleSource(root, collate, parts.trunk.device), np.asarray(ids, dtype=np.int64)
    except (AutomodeError, TypeError):
        return None, none


def as_recorded(parts: RunParts, run: Run) -> Held:
    """Take what the log says of the run's beginning; nothing is read, so that no generator of the user's moves."""
    return Held(
        overlap=Overlap(n=run.overlap, share=0.0, how="none"),
        task=run.task,
        per_sample=per_sample_twin(parts.trunk.loss_fn),
        exact=run.exact_losses,
        why_inexact=run.why_inexact,
        why_no_evidence=run.why_no_evidence,
    )
