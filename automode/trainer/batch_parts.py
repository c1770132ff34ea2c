"""Batches that are trained on in parts, one after another with an optimizer step each: as many samples, more steps.

The loader, its sampler and its random numbers stay the user's: a batch is drawn as ever, and is still one step of the run for everything that
counts steps (schedule, budget, averages, rows, resume). Only what happens inside of that step is another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automode.errors import NotExecutableError
from automode.planner.capability import LEAST_PART
from automode.trainer.rows import rows_of
from automode.trainer.trees import rows_in, tensors_in
from automode.trainer.user_warning import warn_user

Made = tuple[Any, Any, Any]
"""Loss, outputs and targets of a forward pass."""


def part_rows(rows: int, now: int | None, updates: int) -> int | None:
    """Return the rows of each part where as many steps are taken as so many times before; None: batches are not divided.

    Args:
        rows: Of a batch.
        now: Of the parts that batches are divided into so far; None: they are not.
        updates: Steps in the place of each one.
    """
    return now if updates == 1 else max(LEAST_PART, round((now or rows) / updates))


def parts_of(batch: Any, rows: int | None) -> list[Any]:
    """Divide a batch into parts of about so many rows each, in its own order.

    Args:
        batch: Whatever the loader gives.
        rows: Rows of a part; None: as the batch is.

    Returns:
        The parts; the batch alone where it has rows for no more than one.

    Raises:
        NotExecutableError: Not everything in the batch has one row a sample.
    """
    if rows is None:
        return [batch]
    size = rows_in(batch)
    why = _why_whole(batch, size)
    if why is not None or size is None:
        raise NotExecutableError(f"a batch cannot be trained on in parts: {why}")
    count = max(1, round(size / rows))
    if count == 1:
        return [batch]
    return [rows_of(batch, piece, size) for piece in np.array_split(np.arange(size), count)]


def _why_whole(tree: Any, size: int | None) -> str | None:
    """Say why a batch has no parts; None where everything in it has one row a sample, or is no data."""
    if size is None:
        return "its tensors are not of one length along their first dimension"
    match tree:
        case Tensor() | None | bool() | int() | float() | str():
            return None  # tensors were counted; what stands beside them holds for every sample
        case np.ndarray():
            return None if tree.ndim and tree.shape[0] == size else f"an array of shape {tree.shape}"
        case Mapping() if isinstance(tree, dict):
            return next((why for value in tree.values() if (why := _why_whole(value, size))), None)
        case list() | tuple():
            if len(tree) == size and not any(isinstance(value, Tensor) for value in tree):
                within = next(tensors_in(tree), None) is not None
                return f"a list of {size} holds tensors, for {size} samples" if within else None
            if any(isinstance(value, str | int | float) for value in tree):
                return f"a list of {len(tree)} values beside {size} samples"
            return next((why for value in tree if (why := _why_whole(value, size))), None)
        case _:
            return f"it holds a {type(tree).__name__}"


class Divided:
    """Divides the trunk's batches; one that has no parts is trained on as it is, which is said once."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, batch: Any, rows: int | None) -> list[Any]:
        """Return the parts of a batch; see :func:`parts_of`."""
        try:
            return parts_of(batch, rows)
        except NotExecutableError as error:
            if not self._warned:
                self._warned = True
                warn_user(f"{error}; it is trained on as a whole, with one step", RuntimeWarning)
            return [batch]


def whole_of(made: Sequence[Made], loss_fn: Callable[..., Tensor]) -> Made:
    """Put together what the parts of a batch came to, each before the step that was made of it.

    Args:
        made: Loss, outputs and targets of each part.
        loss_fn: (outputs, targets) to a scalar.

    Returns:
        The loss of all samples together, and outputs and targets of all; the mean of the losses, and None, where they cannot be put together.
    """
    outputs, targets = joined([part[1] for part in made]), joined([part[2] for part in made])
    if outputs is None or targets is None:
        return (
            torch.stack([torch.as_tensor(part[0]).detach().reshape(()) for part in made]).mean(),
            None,
            None,
        )
    with torch.no_grad():
        return loss_fn(outputs, targets), outputs, targets


def joined(pieces: list[Any]) -> Tensor | None:
    """Put what parts gave together again; None where that is more than one tensor a part, or of other shapes."""
    tensors = [piece.detach() for piece in pieces if isinstance(piece, Tensor)]
    if len(tensors) != len(pieces) or any(
        t.ndim == 0 or t.shape[1:] != tensors[0].shape[1:] for t in tensors
    ):
        return None
    return torch.cat(tensors)
