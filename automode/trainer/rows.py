"""Rows of a batch, whatever it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from automode.trainer.sample_source import Ids


def rows_of(part: Any, rows: Ids, size: int) -> Any:
    """Take some rows of a batch: tensors, arrays and lists with one row a sample along the first dimension, in containers of any depth.

    Args:
        part: The batch; whatever else it holds stays as it is.
        rows: Which rows.
        size: Samples of the batch.
    """
    match part:
        case Tensor():
            if part.dim() == 0 or part.shape[0] != size:
                return part
            return part.index_select(0, torch.from_numpy(rows).to(part.device))
        case np.ndarray():
            return part[rows] if part.ndim and part.shape[0] == size else part
        case dict():
            return type(part)((key, rows_of(value, rows, size)) for key, value in part.items())
        case tuple() if hasattr(part, "_fields"):
            return type(part)(*(rows_of(value, rows, size) for value in part))
        case list() | tuple() if len(part) == size and not any(isinstance(p, Tensor) for p in part):
            return type(part)(part[row] for row in rows.tolist())
        case list() | tuple():
            return type(part)(rows_of(value, rows, size) for value in part)
        case _:
            return part
