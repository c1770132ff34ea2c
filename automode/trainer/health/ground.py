"""What checks stand on: training batches that nobody misses, and a run that is put back after each of them.

Batches are read by sample id beside the user's loader, or from a list that it is; the loader itself is never iterated. Whatever a
check trains, draws or writes (weights, buffers, moments, gradients, random states, generators of the user's) is undone.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from automode.errors import NotExecutableError
from automode.merges.batches import map_tensors, move
from automode.planner.controls import Verdict
from automode.trainer.batch_size import batch_size_of
from automode.trainer.first_look import source_of
from automode.trainer.live_state import LiveState
from automode.trainer.loop import Loop
from automode.trainer.random_state import forked_rng
from automode.trainer.run_parts import RunParts
from automode.trainer.sample_source import FixedPass

MOST_LAYERS = 20
"""Layers that a finding names, the worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check came to.

    Attributes:
        verdict: ``good``, ``doubtful``, ``bad``, or ``unknown`` where it could not be made.
        why: In words, with what to do.
        numbers: What was measured.
        worst: Layers by name, the worst first.
    """

    verdict: Verdict
    why: str
    numbers: dict[str, float] = field(default_factory=dict)
    worst: list[dict[str, Any]] = field(default_factory=list)


class Ground:
    """A run to be checked.

    Args:
        parts: The run.
        loop: Where it stands.
        steps: Batches that a check may use.
    """

    def __init__(self, parts: RunParts, loop: Loop, steps: int) -> None:
        self.parts = parts
        self.loop = loop
        self.steps = steps

    def batches(self) -> list[Any]:
        """Read training batches.

        Raises:
            NotExecutableError: They cannot be read beside the run, or the model cannot be called with them.
        """
        parts, given = self.parts, self.parts.request.train_loader
        if parts.own_step is not None:
            raise NotExecutableError(
                "the training step is your own: what it does with a batch, and what it remembers, is not known here"
            )
        if isinstance(given, list | tuple):
            found = [move(batch, parts.trunk.device) for batch in given[: self.steps]]
        else:
            source, ids = source_of(parts)
            if source is None:
                raise NotExecutableError(
                    f"training batches cannot be read beside the run: {parts.loader.reason or 'its samples have no ids'}"
                )
            size = max(1, round(batch_size_of(parts)))
            found = list(FixedPass(source, ids, batch_size=size, batches=self.steps, seed=parts.seed)())
        if not found:
            raise NotExecutableError("there is no training sample to check with")
        return found

    def forward(self, batch: Any) -> tuple[Tensor, Any, Any]:
        """Compute a batch's loss as training does."""
        trunk = self.parts.trunk
        with trunk.autocast():
            return trunk.step_fn(trunk.model, batch)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Put everything back after a block, also on an exception."""
        live = LiveState(self.parts.request.train_loader)
        before = live.take()
        with forked_rng(), _kept(self.parts):
            try:
                yield
            finally:
                if not _same(before, live.take()):
                    live.put(before, samplers=True)


@contextmanager
def _kept(parts: RunParts) -> Iterator[None]:
    """Keep model, loss and optimizer as they are; hooks of the user's on the optimizer hear of nothing."""
    trunk = parts.trunk
    modules = [
        trunk.model,
        *([parts.request.loss_fn] if isinstance(parts.request.loss_fn, nn.Module) else []),
    ]
    buffers = [(module, name) for root in modules for module in root.modules() for name in module._buffers]  # noqa: SLF001
    held = {(module, name): module._buffers[name] for module, name in buffers}  # noqa: SLF001
    parameters = list(dict.fromkeys([*trunk.parameters, *(p for root in modules for p in root.parameters())]))
    tensors: list[Tensor] = [*parameters, *(buffer for buffer in held.values() if buffer is not None)]
    values = [_apart(tensor) for tensor in tensors]
    gradients = [parameter.grad for parameter in parameters]
    training = [(module, module.training) for root in modules for module in root.modules()]
    with _optimizer_kept(trunk.optimizer):
        for parameter in parameters:
            # A group of batches may be half gathered. The gradients themselves are not written to: somebody may look whether they were.
            parameter.grad = None if parameter.grad is None else parameter.grad.detach().clone()
        try:
            yield
        finally:
            for (module, name), buffer in held.items():
                module._buffers[name] = buffer  # noqa: SLF001
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for module, flag in training:
                module.training = flag


@contextmanager
def _optimizer_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    state = map_tensors(_apart, copy.copy(optimizer.state_dict()))
    groups = optimizer.param_groups
    items = [{name: _value(value) for name, value in group.items() if name != "params"} for group in groups]
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = {name: getattr(optimizer, name) for name in names}
    for name in names:
        setattr(optimizer, name, OrderedDict())
    try:
        yield
    finally:
        for name, kept in hooks.items():
            setattr(optimizer, name, kept)
        optimizer.load_state_dict(state)
        # The very groups of before, which the user and the scheduler may hold.
        optimizer.param_groups = groups
        for group, kept in zip(groups, items, strict=True):
            for name in [name for name in group if name != "params" and name not in kept]:
                del group[name]
            for name, value in kept.items():
                if isinstance(value, tuple) and value and value[0] is _TENSOR:
                    group[name] = value[1].copy_(value[2])
                else:
                    group[name] = value


_TENSOR = object()


def _value(value: Any) -> Any:
    return (_TENSOR, value, value.detach().clone()) if isinstance(value, Tensor) else copy.deepcopy(value)


def _apart(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return type(left) is type(right) and bool(left == right)
