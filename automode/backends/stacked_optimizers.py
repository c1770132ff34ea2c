"""SGD, Adam and AdamW for the rows of a matrix, each row with its own learning rate and weight decay.

The arithmetic is that of :mod:`torch.optim`, operation by operation, so that a row ends where its member would have ended
alone: bit by bit but for the rounding of factors to the parameters' dtype. All updates are in place.

References:
    Kingma & Ba 2015, Adam, arXiv:1412.6980; Loshchilov & Hutter 2019, Decoupled weight decay regularization,
    arXiv:1711.05101; Sutskever et al. 2013, On the importance of initialization and momentum in deep learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from automode.backends.stacked_parameters import Layout, StackedParameters, column

BLOCK_ELEMENTS = 16_384
"""Columns from which on rows are updated one by one: a row and its moments then stay in the processor's cache."""

Factor = float | Tensor
"""A number for all rows, or a column with one for each."""

Groups = Sequence[Mapping[str, Any]]
"""The parameter groups of a member's own optimizer, with the rates and constants of the moment."""


Kept = tuple[dict[str, Tensor], int]
"""A row's moments by name, and how many steps they are of."""


class StackedOptimizer(Protocol):
    """An optimizer of several members."""

    def step(self, rows: Sequence[Groups | None]) -> None:
        """Move every row along its gradient, as its groups say; rows without groups are not moved."""
        ...

    def store(self, row: int, optimizer: torch.optim.Optimizer) -> None:
        """Write a row's state into a member's own optimizer, as tensors of its own."""
        ...

    def kept(self, row: int) -> Kept:
        """Copy a row's state, for :meth:`put_back`."""
        ...

    def put_back(self, row: int, kept: Kept) -> None:
        """Let a row's state be what it was."""
        ...


def stacked_optimizer(
    parameters: StackedParameters, optimizers: Sequence[torch.optim.Optimizer]
) -> StackedOptimizer:
    """Make the optimizer of a stack from those of its members, which are alike in kind.

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
    """What both kinds share: moments, groups, blocks of rows, and per-row numbers."""

    def __init__(
        self,
        parameters: StackedParameters,
        optimizers: Sequence[torch.optim.Optimizer],
        moments: Sequence[str],
    ) -> None:
        self._matrix = parameters.matrix
        self._gradient = parameters.gradient
        self._layout: Layout = parameters.layout
        self._moments = {name: torch.zeros_like(self._matrix) for name in moments}
        for name, moment in self._moments.items():
            views = self._layout.views(moment)
            for row, optimizer in enumerate(optimizers):
                for key, state in _states(self._layout, optimizer):
                    value = state.get(name)
                    if value is not None:
                        views[key][row].copy_(value)

    def _each(
        self, rows: Sequence[Groups | None], update: Callable[[Block, list[Mapping[str, Any] | None]], None]
    ) -> None:
        """Call an update for every group, in blocks of rows."""
        for g, columns in enumerate(self._layout.groups):
            width = columns.stop - columns.start
            groups = [None if row is None else row[g] for row in rows]
            if not width:
                continue
            if width < BLOCK_ELEMENTS:
                update(Block(slice(0, len(rows)), columns), groups)
                continue
            for row, group in enumerate(groups):
                if group is not None:
                    update(Block(slice(row, row + 1), columns), [group])

    def kept(self, row: int) -> Kept:
        """Copy a row's moments."""
        return {name: moment[row].clone() for name, moment in self._moments.items()}, 0

    def put_back(self, row: int, kept: Kept) -> None:
        """Let a row's moments be what they were."""
        for name, moment in kept[0].items():
            self._moments[name][row].copy_(moment)

    def _written(self, row: int, optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Any]]]:
        """Write the moments of a row; returns the states that were written, by parameter."""
        states = _states(self._layout, optimizer) if self._moments else []
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
            optimizers[0].param_groups[0].get("decoupled_weight_decay")
        )
        self._steps = [_steps_of(self._layout, optimizer) for optimizer in optimizers]
        self._steps += [0] * (self._matrix.shape[0] - len(optimizers))
        self._scratch = torch.empty_like(self._matrix)

    def step(self, rows: Sequence[Groups | None]) -> None:
        """Move every row along its gradient."""
        self._steps = [steps + 1 for steps in self._steps]
        self._each(rows, self._update)

    def _update(self, block: Block, groups: list[Mapping[str, Any] | None]) -> None:
        steps = self._steps[block.rows]
        lr = _numbers(groups, "lr")
        decay = _numbers(groups, "weight_decay")
        beta1, beta2 = ([0.0 if group is None else group["betas"][i] for group in groups] for i in (0, 1))
        p, grad, scratch = (block.of(m) for m in (self._matrix, self._gradient, self._scratch))
        mean, square = block.of(self._moments["exp_avg"]), block.of(self._moments["exp_avg_sq"])
        if any(decay):
            if self._decoupled:
                p.mul_(_factor([1.0 - a * w for a, w in zip(lr, decay, strict=True)], p))
            else:
                _add(grad, p, _factor(decay, p))
        mean.lerp_(grad, _factor([1.0 - beta for beta in beta1], p))
        kept = _factor(beta2, p)
        square.mul_(kept)
        if isinstance(kept, float):
            square.addcmul_(grad, grad, value=1.0 - kept)
        else:
            square.add_(torch.mul(grad, grad, out=scratch).mul_(1.0 - kept))
        size = [a / (1.0 - beta**t) for a, beta, t in zip(lr, beta1, steps, strict=True)]
        root = [math.sqrt(1.0 - beta**t) for beta, t in zip(beta2, steps, strict=True)]
        torch.sqrt(square, out=scratch)
        scratch.div_(_factor(root, p)).add_(next(group["eps"] for group in groups if group is not None))
        moved = _factor(size, p)
        if isinstance(moved, float):
            p.addcdiv_(mean, scratch, value=-moved)
        else:
            p.sub_(torch.div(mean, scratch, out=scratch).mul_(moved))

    def kept(self, row: int) -> Kept:
        """Copy a row's moments, and its count of steps."""
        return super().kept(row)[0], self._steps[row]

    def put_back(self, row: int, kept: Kept) -> None:
        """Let a row's moments and its count of steps be what they were."""
        super().put_back(row, kept)
        self._steps[row] = kept[1]

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
        momentum = any(group["momentum"] for optimizer in optimizers for group in optimizer.param_groups)
        super().__init__(parameters, optimizers, ("momentum_buffer",) if momentum else ())

    def step(self, rows: Sequence[Groups | None]) -> None:
        """Move every row along its gradient."""
        self._each(rows, self._update)

    def _update(self, block: Block, groups: list[Mapping[str, Any] | None]) -> None:
        p, grad = block.of(self._matrix), block.of(self._gradient)
        decay = _numbers(groups, "weight_decay")
        if any(decay):
            _add(grad, p, _factor(decay, p))
        if self._moments:
            momentum = _factor(_numbers(groups, "momentum"), p)
            buffer = block.of(self._moments["momentum_buffer"])
            buffer.mul_(momentum).add_(grad)
            if any(group is not None and group["nesterov"] for group in groups):
                _add(grad, buffer, momentum)
            else:
                grad = buffer
        _add(p, grad, _factor([-rate for rate in _numbers(groups, "lr")], p))

    def store(self, row: int, optimizer: torch.optim.Optimizer) -> None:
        """Write a row's momentum into a member's own optimizer."""
        self._written(row, optimizer)


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows and columns of a matrix."""

    rows: slice
    columns: slice

    def of(self, matrix: Tensor) -> Tensor:
        """The part of a matrix."""
        return matrix[self.rows, self.columns]


def _numbers(groups: Sequence[Mapping[str, Any] | None], name: str) -> list[float]:
    return [0.0 if group is None else float(group[name]) for group in groups]


def _factor(values: Sequence[float], like: Tensor) -> Factor:
    first = values[0]
    return first if all(value == first for value in values) else column(values, like)


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
