"""The weights of several members as the rows of one matrix, and everything that trains none of them.

A row holds one member's trained parameters end to end, in the optimizer's order, each parameter group in columns of its
own. An optimizer's update, a norm or a copy is then one call for all members. The members' own networks look into their
rows: what reads a member's parameters (averages, an EMA) sees them live, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Elements that a parameter's first column is a multiple of, so that its vector loads are aligned."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where one parameter stands in a row.

    Attributes:
        name: The parameter's name in the network.
        group: Its group in the optimizer.
        index: Its place in the group.
        start: Its first column.
        shape: Its shape.
    """

    name: str
    group: int
    index: int
    start: int
    shape: torch.Size

    def view(self, matrix: Tensor) -> Tensor:
        """The parameter of every row [rows, *shape]."""
        part = matrix[:, self.start : self.start + self.shape.numel()]
        return part.view(matrix.shape[0], *self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a row is laid out.

    Attributes:
        columns: The trained parameters, in the optimizer's order.
        groups: Columns of each parameter group; empty where nothing of a group is trained.
        width: Columns in all.
    """

    columns: tuple[Column, ...]
    groups: tuple[slice, ...]
    width: int

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer, unused: Set[str]) -> Layout:
        """Lay out what an optimizer trains of a network; ``unused`` names parameters that the loss does not reach."""
        names = {id(p): name for name, p in model.named_parameters()}
        columns: list[Column] = []
        groups: list[slice] = []
        end = 0
        for g, group in enumerate(optimizer.param_groups):
            first = end
            for i, p in enumerate(group["params"]):
                if p.requires_grad and names[id(p)] not in unused:
                    columns.append(Column(names[id(p)], g, i, end, p.shape))
                    end += -(-p.numel() // ALIGNMENT) * ALIGNMENT
            groups.append(slice(first, end))
        return cls(tuple(columns), tuple(groups), end)

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Each parameter of all rows, by name."""
        return {column.name: column.view(matrix) for column in self.columns}


class StackedParameters:
    """Trained parameters of several networks of one architecture, and their gradients.

    Args:
        layout: How a row is laid out.
        models: One a row.
        rows: At least as many; rows beyond the models copy the first one's, and pad.

    Attributes:
        layout: The layout.
        matrix: Parameters [rows, width].
        gradient: Their gradients [rows, width].
        views: Each parameter of all rows, by name.
        constants: Tensors that are not trained, by name: one for all where the members agree, stacked otherwise.
        stacked_constants: Names of the stacked ones.
    """

    def __init__(self, layout: Layout, models: Sequence[nn.Module], rows: int) -> None:
        self.layout = layout
        like = next(models[0].parameters())
        self.matrix = torch.zeros(rows, layout.width, dtype=like.dtype, device=like.device)
        self.gradient = torch.zeros_like(self.matrix)
        self.views = layout.views(self.matrix)
        self._gradient_views = list(layout.views(self.gradient).values())
        self._parameters = [dict(model.named_parameters()) for model in models]
        with torch.no_grad():
            for name, view in self.views.items():
                for row in range(rows):
                    view[row].copy_(self._of(row)[name])
        self.constants, self.stacked_constants = _constants(models, set(self.views), rows)

    def _of(self, row: int) -> dict[str, nn.Parameter]:
        return self._parameters[row if row < len(self._parameters) else 0]

    def bind(self) -> None:
        """Let the members' networks look into their rows."""
        for row, parameters in enumerate(self._parameters):
            for name, view in self.views.items():
                parameters[name].data = view[row]

    def release(self, row: int) -> None:
        """Give a member its parameters back as tensors of its own, with the values of now."""
        with torch.no_grad():
            for name, view in self.views.items():
                parameter = self._parameters[row][name]
                parameter.data = view[row].clone(memory_format=torch.contiguous_format)
                parameter.grad = None

    def keep_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Copy gradients, in the order of :attr:`views`, into their rows."""
        torch._foreach_copy_(self._gradient_views, list(gradients))

    def norms(self) -> list[float]:
        """The norm of each row's gradient."""
        found: list[float] = torch.linalg.vector_norm(self.gradient, dim=1).tolist()
        return found

    def clip(self, limits: Sequence[float | None]) -> None:
        """Scale each row's gradient down to a norm of at most its limit, as ``clip_grad_norm_`` does for one network."""
        if all(limit is None for limit in limits):
            return
        norms = self.norms()
        factors = [
            1.0 if limit is None else _clipped(limit / (norm + 1e-6))
            for norm, limit in zip(norms, limits, strict=True)
        ]
        if any(factor != 1.0 for factor in factors):
            self.gradient.mul_(column(factors, self.gradient))


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One value a row [rows, 1], of a matrix's dtype and device."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _clipped(factor: float) -> float:
    return factor if not factor >= 1.0 else 1.0


def _constants(
    models: Sequence[nn.Module], trained: Set[str], rows: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Everything of the networks that is not trained; one tensor for all where they agree."""
    found: dict[str, Tensor] = {}
    stacked: list[str] = []
    every = [{**dict(model.named_parameters()), **dict(model.named_buffers())} for model in models]
    for name, first in every[0].items():
        if name in trained:
            continue
        others = [tensors[name].detach() for tensors in every]
        if all(torch.equal(first, other) for other in others[1:]):
            found[name] = first.detach()
            continue
        stacked.append(name)
        found[name] = torch.stack([*others, *[others[0]] * (rows - len(others))])
    return found, tuple(stacked)
