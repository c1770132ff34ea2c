"""Rows of observations: as the probe notes them, and as the block of floats that the log and the planner get."""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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


class OpenRows:
    """Rows as a training loop notes them, one at a step, until they are taken as blocks.

    Numbers go straight into an array: nothing is made at a step that the garbage collector has to look at. Those that are still on
    a device stand aside with their place, and are read together.

    Attributes:
        count: Rows since the last :meth:`take`.
        values: Rows of the open block one after the other; :meth:`add` appends to it, and whoever is in a hurry.
        plain: Learning rates of a row of the open block, where it has no metrics and a hurried row of as many fits; -1 otherwise.
    """

    __slots__ = ("_aside", "_closed", "_metrics", "_rates", "count", "plain", "values")

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.count = 0
        self.values = array("d")
        self.plain = -1
        self._rates = -1
        self._metrics: tuple[str, ...] = ()
        self._closed: list[tuple[array[float], int, tuple[str, ...]]] = []
        self._aside: list[tuple[array[float], int, Tensor]] = []

    def add(
        self,
        numbers: tuple[int, float, float | Tensor, float | Tensor],
        lr: tuple[float, ...],
        applied: bool,
        metrics: Mapping[str, float | Tensor],
    ) -> None:
        """Append a row.

        Args:
            numbers: Step, time, loss, gradient norm.
            lr: Learning rate of each parameter group.
            applied: Whether the optimizer stepped.
            metrics: More numbers by name; other names than before, or another number of rates, begin another block.
        """
        self.shape(len(lr), tuple(metrics))
        values = self.values
        for number in (*numbers, *lr, float(applied), 0.0, *metrics.values()):
            if isinstance(number, Tensor):
                self._aside.append((values, len(values), number))
                values.append(math.nan)
            else:
                values.append(number)
        self.count += 1

    def shape(self, rates: int, metrics: tuple[str, ...] = ()) -> None:
        """Begin another block, unless rows of so many learning rates and these metrics fit into the open one."""
        if rates == self._rates and metrics == self._metrics:
            return
        if self.values:
            self._closed.append((self.values, self._rates, self._metrics))
        self.values = array("d")
        self._rates, self._metrics = rates, metrics
        self.plain = -1 if metrics else rates

    def take(self, first_row: int, norms: Mapping[int, float]) -> list[Block]:
        """Give everything as blocks, and begin anew.

        Args:
            first_row: Number of the first row.
            norms: Gradient norms that were taken later, by row number.

        Returns:
            One block, or more where the number of learning rates or the names of metrics changed.
        """
        _read(self._aside)
        blocks = []
        for values, rates, metrics in (*self._closed, (self.values, self._rates, self._metrics)):
            if values:
                blocks.append(_block(values, rates, metrics, first_row, norms))
                first_row += len(blocks[-1].rows)
        self._begin()
        return blocks


@functools.lru_cache
def _names(lr_groups: int, metrics: tuple[str, ...]) -> tuple[str, ...]:
    rates = [f"lr_{group}" for group in range(lr_groups)]
    return ("step", "time", "loss", "grad_norm", *rates, "applied", "finite", *metrics)


def _block(
    values: array[float], rates: int, metrics: tuple[str, ...], first_row: int, norms: Mapping[int, float]
) -> Block:
    names = _names(rates, metrics)
    width = len(names)
    # In the array and not in its view: an element of a numpy array is set at ten times the price.
    for row, norm in norms.items():
        at = (row - first_row) * width + _NORM
        if 0 <= at < len(values):
            values[at] = norm
    rows = np.frombuffer(values).reshape(-1, width)
    rows[:, 5 + rates] = np.isfinite(rows[:, _LOSS] + rows[:, _NORM])
    return Block(names=names, rows=rows, first_row=first_row)


def _read(aside: Sequence[tuple[array[float], int, Tensor]]) -> None:
    """Put the numbers that are still on devices into their places, each device's read in one transfer."""
    by_device: dict[torch.device, list[tuple[array[float], int, Tensor]]] = {}
    for place in aside:
        by_device.setdefault(place[2].device, []).append(place)
    for places in by_device.values():
        read = torch.stack([number for _, _, number in places]).tolist()
        for (values, index, _), number in zip(places, read, strict=True):
            values[index] = number
