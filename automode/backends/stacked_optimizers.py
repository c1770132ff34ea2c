"""SGD, Adam and AdamW for the rows of a matrix, each row with its own learning rate and weight decay.

The arithmetic is that of :mod:`torch.optim`, operation by operation, so that a row ends where its member would have ended
alone: bit by bit but for the rounding of factors to the parameters' dtype. All updates are in place.

References:
    Kingma & Ba 2015, Adam, arXiv:1412.6980; Loshchilov & Hutter 2019, Decoupled weight decay regularization,
    arXiv:1711.05101; Sutskever et al. 2013, On the importance of initialization and momentum in deep learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from automode.backends.stacked_parameters import Layout, StackedParameters, column

BLOCK_ELEMENTS = 16_384
"""Columns from which on rows are updated one by one: a row and its moments then stay in the processor's cache."""

Factor = float | Tensor
"""A number for all rows, or a column with one for each."""


class StackedOptimizer(Protocol):
    """An optimizer of several members."""

    def step(self, rates: Sequence[Sequence[float]]) -> None:
        """Move every row along its gradient. ``rates`` holds, for each row, the learning rate of each group."""
        ...

    def store(self, row: int, optimizer: torch.optim.Optimizer) -> None:
        """Write a row's state into a member's own optimizer, as tensors of its own."""
        ...


def stacked_optimizer(
    parameters: StackedParameters, optimizers: Sequence[torch.optim.Optimizer]
) -> StackedOptimizer:
    """Make the optimizer of a stack from those of its members, which are alike in kind and constants.

    Args:
        parameters: What is trained.
        optimizers: One a member, in row order; rows beyond them pad and are never moved.

    Raises:
        ValueError: The members' parameters have been updated unequally often.
    """
    if isinstance(optimizers[0], torch.optim.SGD):
        return StackedSGD(parameters, optimizers)
    return StackedAdam(parameters, optimizers)


class _Rows:
    """What both kinds share: groups, blocks of rows, and per-row numbers."""

    def __init__(
        self,
        parameters: StackedParameters,
        optimizers: Sequence[torch.optim.Optimizer],
        moments: Sequence[str],
    ) -> None:
        self._matrix = parameters.matrix
        self._gradient = parameters.gradient
        self._layout: Layout = parameters.layout
        self._rows = self._matrix.shape[0]
        self._members = len(optimizers)
        self._groups: list[dict[str, Any]] = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizers[0].param_groups
        ]
        self._decays = [
            [float(optimizer.param_groups[g]["weight_decay"]) for optimizer in optimizers]
            + [0.0] * (self._rows - self._members)
            for g in range(len(self._groups))
        ]
        self._moments = {name: torch.zeros_like(self._matrix) for name in moments}
        for name, moment in self._moments.items():
            views = self._layout.views(moment)
            for row, optimizer in enumerate(optimizers):
                for key, state in _states(self._layout, optimizer):
                    value = state.get(name)
                    if value is not None:
                        views[key][row].copy_(value)

    def _factor(self, values: Sequence[float]) -> Factor:
        first = values[0]
        return first if all(value == first for value in values) else column(values, self._matrix)

    def _each(self, update: Callable[[int, slice, slice, Sequence[int]], None]) -> None:
        """Call an update for every group, in blocks of rows."""
        for g, columns in enumerate(self._layout.groups):
            width = columns.stop - columns.start
            if not width:
                continue
            if width < BLOCK_ELEMENTS:
                update(g, columns, slice(0, self._rows), range(self._rows))
                continue
            for row in range(self._rows):
                update(g, columns, slice(row, row + 1), (row,))

    def _written(self, row: int, optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Any]]]:
        """Write the moments of a row; returns the states that were written, by parameter."""
        states = _states(self._layout, optimizer)
        for name, moment in self._moments.items():
            views = self._layout.views(moment)
            for key, state in states:
                state[name] = views[key][row].clone(memory_format=torch.contiguous_format)
        return states


class StackedAdam(_Rows):
    """Adam and AdamW.

    Args:
        parameters: What is trained.
        optimizers: One a member, in row order.

    Raises:
        ValueError: A member's parameters have been updated unequally often.
    """

    def __init__(self, parameters: StackedParameters, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(parameters, optimizers, ("exp_avg", "exp_avg_sq"))
        self._decoupled = isinstance(optimizers[0], torch.optim.AdamW) or bool(
            self._groups[0].get("decoupled_weight_decay")
        )
        self._steps = [_steps_of(self._layout, optimizer) for optimizer in optimizers]
        self._steps += [self._steps[0]] * (self._rows - self._members)
        self._scratch = torch.empty_like(self._matrix)

    def step(self, rates: Sequence[Sequence[float]]) -> None:
        """Move every row along its gradient."""
        self._steps = [steps + 1 for steps in self._steps]
        self._each(lambda g, columns, block, rows: self._update(g, columns, block, rows, rates))

    def _update(
        self, g: int, columns: slice, block: slice, rows: Sequence[int], rates: Sequence[Sequence[float]]
    ) -> None:
        group = self._groups[g]
        beta1, beta2 = group["betas"]
        lr = [rates[row][g] for row in rows]
        decay = [self._decays[g][row] for row in rows]
        steps = [self._steps[row] for row in rows]
        p, grad = self._matrix[block, columns], self._gradient[block, columns]
        mean, square = self._moments["exp_avg"][block, columns], self._moments["exp_avg_sq"][block, columns]
        if any(decay):
            if self._decoupled:
                p.mul_(self._factor([1.0 - a * w for a, w in zip(lr, decay, strict=True)]))
            else:
                _add(grad, p, self._factor(decay))
        mean.lerp_(grad, 1.0 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        size = self._factor([a / (1.0 - beta1**t) for a, t in zip(lr, steps, strict=True)])
        root = torch.sqrt(square, out=self._scratch[: len(rows), columns])
        root.div_(self._factor([math.sqrt(1.0 - beta2**t) for t in steps])).add_(group["eps"])
        if isinstance(size, float):
            p.addcdiv_(mean, root, value=-size)
        else:
            p.sub_(torch.div(mean, root, out=root).mul_(size))

    def store(self, row: int, optimizer: torch.optim.Optimizer) -> None:
        """Write a row's moments and its count of steps into a member's own optimizer."""
        for _, state in self._written(row, optimizer):
            steps = float(self._steps[row])
            state["step"] = torch.full_like(state["step"], steps) if "step" in state else torch.tensor(steps)


class StackedSGD(_Rows):
    """SGD, with momentum (Nesterov's or plain) or without.

    Args:
        parameters: What is trained.
        optimizers: One a member, in row order.
    """

    def __init__(self, parameters: StackedParameters, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        momentum = any(group["momentum"] for group in optimizers[0].param_groups)
        super().__init__(parameters, optimizers, ("momentum_buffer",) if momentum else ())

    def step(self, rates: Sequence[Sequence[float]]) -> None:
        """Move every row along its gradient."""
        self._each(lambda g, columns, block, rows: self._update(g, columns, block, rows, rates))

    def _update(
        self, g: int, columns: slice, block: slice, rows: Sequence[int], rates: Sequence[Sequence[float]]
    ) -> None:
        group = self._groups[g]
        momentum = group["momentum"]
        p, grad = self._matrix[block, columns], self._gradient[block, columns]
        decay = [self._decays[g][row] for row in rows]
        if any(decay):
            _add(grad, p, self._factor(decay))
        if momentum:
            buffer = self._moments["momentum_buffer"][block, columns]
            buffer.mul_(momentum).add_(grad)
            if group["nesterov"]:
                grad.add_(buffer, alpha=momentum)
            else:
                grad = buffer
        _add(p, grad, self._factor([-rates[row][g] for row in rows]))

    def store(self, row: int, optimizer: torch.optim.Optimizer) -> None:
        """Write a row's momentum into a member's own optimizer."""
        self._written(row, optimizer)


def _add(target: Tensor, value: Tensor, factor: Factor) -> None:
    if isinstance(factor, float):
        target.add_(value, alpha=factor)
    else:
        target.addcmul_(value, factor)


def _states(layout: Layout, optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Any]]]:
    """The state of each trained parameter, in the layout's order."""
    return [
        (own.name, optimizer.state[optimizer.param_groups[own.group]["params"][own.index]])
        for own in layout.columns
    ]


def _steps_of(layout: Layout, optimizer: torch.optim.Optimizer) -> int:
    counts = {int(state["step"]) if "step" in state else 0 for _, state in _states(layout, optimizer)}
    if len(counts) > 1:
        raise ValueError(f"its parameters have been updated unequally often: {sorted(counts)} steps")
    return counts.pop()
