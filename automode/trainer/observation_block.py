"""Rows of observations: as the probe notes them, and as the block of floats that the log and the planner get."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Step, time, loss, gradient norm, learning rates, applied, names of metrics, metrics. Plain tuples, because one is made
# at every training step.
Row = tuple[int, float, float, float, tuple[float, ...], bool, tuple[str, ...], Sequence[float]]
RawRow = tuple[
    int,
    float,
    float | Tensor,
    float | Tensor,
    tuple[float, ...],
    bool,
    tuple[str, ...],
    Sequence[float | Tensor],
]

_LOSS, _NORM = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Observations of consecutive steps.

    Attributes:
        names: Column names: ``step``, ``time`` (seconds, of the probe's clock), ``loss``, ``grad_norm``, ``lr_0`` and
            on, ``applied`` (1: the optimizer stepped), ``finite`` (1: loss and gradient norm are), then metrics.
        rows: [n, k], one row an attempted step.
        first_row: Number of the first row, counted from 0 over the run.
    """

    names: tuple[str, ...]
    rows: npt.NDArray[np.float64]
    first_row: int

    @property
    def first_step(self) -> int:
        """Step of the first row."""
        return int(self.rows[0, 0])


def blocks_of(rows: Sequence[Row], first_row: int, norms: Mapping[int, float]) -> list[Block]:
    """Turn rows into blocks of floats.

    Args:
        rows: Rows in order, at least one.
        first_row: Number of the first.
        norms: Gradient norms that were taken later, by row number.

    Returns:
        One block, or more where the number of learning rates or the names of metrics change.
    """
    blocks: list[Block] = []
    values = array("d")
    lr_groups, metrics = len(rows[0][4]), rows[0][6]
    for row, (step, time, loss, norm, lr, applied, names, numbers) in enumerate(rows, first_row):
        if names != metrics or len(lr) != lr_groups:
            blocks.append(_block(values, lr_groups, metrics, first_row))
            first_row += len(blocks[-1].rows)
            values, lr_groups, metrics = array("d"), len(lr), names
        values.extend((step, time, loss, norms.get(row, norm), *lr, applied, 0.0, *numbers))
    blocks.append(_block(values, lr_groups, metrics, first_row))
    return blocks


@functools.lru_cache
def _names(lr_groups: int, metrics: tuple[str, ...]) -> tuple[str, ...]:
    rates = [f"lr_{group}" for group in range(lr_groups)]
    return ("step", "time", "loss", "grad_norm", *rates, "applied", "finite", *metrics)


def _block(values: array[float], lr_groups: int, metrics: tuple[str, ...], first_row: int) -> Block:
    names = _names(lr_groups, metrics)
    rows = np.frombuffer(values).reshape(-1, len(names))
    rows[:, 5 + lr_groups] = np.isfinite(rows[:, _LOSS] + rows[:, _NORM])
    return Block(names=names, rows=rows, first_row=first_row)


def read_devices(rows: Sequence[RawRow]) -> list[Row]:
    """Read the numbers that are still on devices, each device's in one transfer.

    Args:
        rows: Rows in which some numbers are 0-dimensional tensors.

    Returns:
        The rows with floats in their place.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for row in rows:
        for part in (row[_LOSS], row[_NORM], *row[7]):
            if isinstance(part, Tensor):
                by_device.setdefault(part.device, []).append(part)
    read = {device: iter(torch.stack(parts).tolist()) for device, parts in by_device.items()}

    def number(part: float | Tensor) -> float:
        return float(next(read[part.device])) if isinstance(part, Tensor) else part

    return [
        (step, time, number(loss), number(norm), lr, applied, names, [number(metric) for metric in metrics])
        for step, time, loss, norm, lr, applied, names, metrics in rows
    ]
