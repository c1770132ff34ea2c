"""A stack: several members' weights, gradients and moments, moved one step at a time for all of them."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automode.backends.base import StackableSegment
from automode.backends.stackability import plain_settings, settings_of
from automode.backends.stacked_gradients import TOLERANCES, Batches, CannotStackError, StackedGradients
from automode.backends.stacked_optimizers import Groups, stacked_optimizer
from automode.backends.stacked_parameters import Layout, StackedParameters


@dataclass(frozen=True, slots=True)
class Reference:
    """A member's own loss and gradients.

    Attributes:
        loss: The loss.
        gradients: By parameter; None where the loss does not reach it.
        random: Whether the pass drew random numbers, so that no two passes agree.
    """

    loss: Tensor
    gradients: dict[str, Tensor | None]
    random: bool


class Stack:
    """Members trained together, from where each of them stands.

    Args:
        segments: The members; of one likeness.
        rows: At least as many; more of them pad.
        unused: Parameters that the loss does not reach.

    Raises:
        CannotStackError: The members' states do not go together.
    """

    def __init__(self, segments: Sequence[StackableSegment], rows: int, unused: frozenset[str]) -> None:
        first = segments[0]
        self.rows = rows
        self._segments = list(segments)
        self._guarded = any(s.guarded for s in segments)
        self._limits: list[float | None] = [s.clip_norm for s in segments] + [None] * (rows - len(segments))
        layout = Layout.of(first.model, first.optimizer, unused)
        if not layout.columns:
            raise CannotStackError("its optimizer trains nothing that the loss reaches")
        weights = [s.job.variant.loss_weight for s in segments]
        weights += [weights[0]] * (rows - len(segments))
        self._parameters = StackedParameters(layout, [s.model for s in segments], rows)
        try:
            self._optimizer = stacked_optimizer(self._parameters, [s.optimizer for s in segments])
        except ValueError as error:
            raise CannotStackError(str(error)) from error
        self.gradients = StackedGradients(
            first.model,
            first.loss_of,
            self._parameters,
            None if all(weight == 1.0 for weight in weights) else weights,
        )
        self._parameters.bind()

    def losses(self, batches: Batches) -> list[tuple[float, float]]:
        """Take the gradient of every row; returns loss and gradient norm of each (NaN where nothing reads the norm). Nothing has moved yet."""
        losses, *gradients = self.gradients(batches)
        self._parameters.keep_gradients(gradients)
        found: list[float] = losses.tolist()
        norms = self._parameters.norms() if self._guarded else [math.nan] * len(found)
        return list(zip(found, norms, strict=True))

    def move(self, rows: Sequence[int], staying: Sequence[int]) -> None:
        """Clip, and move rows along their gradients, at the rates that stand in their members' optimizers.

        Args:
            rows: Those that move.
            staying: Those that are to be as they were, whatever their gradients are.
        """
        kept = [(row, self._parameters.matrix[row].clone(), self._optimizer.kept(row)) for row in staying]
        groups: list[Groups | None] = [None] * self.rows
        for row in rows:
            groups[row] = self._segments[row].optimizer.param_groups
        with torch.no_grad():
            self._parameters.clip(self._limits)
            self._optimizer.step(groups)
            for row, weights, moments in kept:
                self._parameters.matrix[row].copy_(weights)
                self._optimizer.put_back(row, moments)

    def release(self, row: int) -> None:
        """Give a member its weights and moments back as its own; its row goes on as padding."""
        self._parameters.release(row)
        self._optimizer.store(row, self._segments[row].optimizer)
        self._limits[row] = None

    def dissolve(self) -> None:
        """Release every member."""
        for row in range(len(self._segments)):
            self.release(row)

    def check(self, batches: Batches, references: Mapping[int, Reference]) -> None:
        """Compare the gradients of some rows with the members' own; those of networks that draw masks cannot be compared.

        Raises:
            CannotStackError: They differ by more than rounding.
        """
        losses, *gradients = self.gradients(batches)
        names = list(self._parameters.views)
        for row, reference in references.items():
            if reference.random:
                continue
            pairs = [(losses[row], reference.loss)]
            for name, gradient in zip(names, gradients, strict=True):
                own = reference.gradients[name]
                assert own is not None
                pairs.append((gradient[row], own))
            _agree(pairs)


def _agree(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if not all(bool(torch.isfinite(own).all()) for _, own in pairs):
        return  # nothing can be learned from a member that has diverged; its row is dropped when it is met
    tolerance = TOLERANCES[pairs[0][1].dtype]
    scale = max(float(torch.linalg.vector_norm(own)) for _, own in pairs[1:]) + 1e-12
    for i, (found, own) in enumerate(pairs):
        size = abs(float(own)) + 1e-3 if i == 0 else scale
        distance = float(torch.linalg.vector_norm(found - own))
        if not distance <= tolerance * size:
            raise CannotStackError(
                f"stacked and single gradients differ by {distance / size:.1e} of their size, "
                f"where {tolerance:.0e} is allowed"
            )


def reference_of(segment: StackableSegment, batch: Any) -> Reference:
    """Take a member's own gradient, and look at what its network does on the way.

    Raises:
        CannotStackError: The network changes its buffers or settings, or draws from Python's or numpy's generators:
            a recorded graph would not.
    """
    model = segment.model
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise CannotStackError("its network has nothing to train")
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    settings, plain = settings_of(model), plain_settings(model)
    chance = _foreign_chance()
    drawn = torch.get_rng_state(), _cuda_states()
    own_weight = segment.job.variant.loss_weight
    like = next(iter(parameters.values()))
    weight = None if own_weight == 1.0 else torch.tensor(own_weight, dtype=like.dtype, device=like.device)
    loss = segment.loss_of(model, batch, weight)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    random_pass = not torch.equal(drawn[0], torch.get_rng_state()) or not all(
        torch.equal(a, b) for a, b in zip(drawn[1], _cuda_states(), strict=True)
    )
    changed = [name for name, b in model.named_buffers() if not _same(b, buffers[name])]
    if changed:
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
        raise CannotStackError(f"its network changes the buffer `{changed[0]}` as it trains")
    if settings_of(model) != settings:
        for module, own in plain:
            vars(module).update(own)
        raise CannotStackError("its network keeps a count or a switch of its own as it trains")
    if _foreign_chance() != chance:
        raise CannotStackError("its network draws from Python's or numpy's random numbers")
    return Reference(
        loss=loss.detach(), gradients=dict(zip(parameters, found, strict=True)), random=random_pass
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _foreign_chance() -> Hashable:
    state = np.random.get_state(legacy=True)  # noqa: NPY002  # the network's code may draw from it
    return (random.getstate(), state[1].tobytes(), state[2:])  # type: ignore[index]


def _cuda_states() -> list[Tensor]:
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if started else []
