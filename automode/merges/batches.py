"""How this room looks at a batch: where its inputs are, how many samples it has, and how a model reads it.

Merges that need data (norm statistics, Fisher information, distillation) take an iterable of batches and a
``forward``. The defaults fit what most loops use; a script with its own shape of batch passes its own ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from automode.errors import MergeError

Batch: TypeAlias = Any
"""Tensors with a leading batch dimension: one tensor, or a tuple, list or mapping of them."""

Forward: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""Model and batch to outputs ``[n, ...]``."""

BatchSource: TypeAlias = Callable[[], Iterable[Batch]]
"""Gives a fresh pass over the batches each time that it is called."""


def inputs_of(batch: Batch) -> Any:
    """Return a batch's inputs: the first element of a tuple or list, else the batch itself.

    Raises:
        MergeError: the tuple or list is empty.
    """
    if isinstance(batch, tuple | list):
        if not batch:
            raise MergeError("an empty tuple came as a batch; (inputs, targets) or a tensor is needed")
        return batch[0]
    return batch


def forward_inputs(model: nn.Module, batch: Batch) -> Tensor:
    """Call the model on the batch's inputs, moved to the model's device; a mapping goes in as keyword arguments.

    Raises:
        MergeError: the model does not return a tensor.
    """
    inputs = move(inputs_of(batch), device_of(model))
    outputs: object = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if not isinstance(outputs, Tensor):
        raise MergeError(
            f"the model returned a {type(outputs).__name__} where a tensor is needed: pass a `forward` that picks it"
        )
    return outputs


def batch_size(batch: Batch) -> int:
    """Return the number of samples: the leading dimension of the first tensor in the batch.

    Raises:
        MergeError: the batch holds no tensor with a leading dimension.
    """
    for tensor in _tensors(batch):
        if tensor.dim() > 0:
            return int(tensor.shape[0])
    raise MergeError(
        f"a batch of type {type(batch).__name__} came that holds no tensor with a leading dimension"
    )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, or the CPU when it has neither."""
    tensors: Iterator[Tensor] = chain(model.parameters(), model.buffers())
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``change`` to every tensor in nested tuples, lists and mappings; other values pass through."""
    match value:
        case Tensor():
            return change(value)
        case Mapping():
            return {key: map_tensors(change, item) for key, item in value.items()}
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*(map_tensors(change, item) for item in value))
        case tuple():
            return tuple(map_tensors(change, item) for item in value)
        case list():
            return [map_tensors(change, item) for item in value]
        case _:
            return value


def move(value: Any, device: torch.device) -> Any:
    """Move every tensor of a batch to a device."""
    # not waiting is safe towards an accelerator only: a copy to the host could be read before it has arrived
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=device.type != "cpu"), value)


def rows(batch: Batch, start: int, stop: int) -> Any:
    """Return the samples ``start`` to ``stop`` of a batch; tensors without dimensions pass through."""
    return map_tensors(lambda tensor: tensor[start:stop] if tensor.dim() > 0 else tensor, batch)


@contextmanager
def training_flags_kept(model: nn.Module) -> Iterator[None]:
    """Put every submodule's ``training`` flag back on the way out, one by one, however it was."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def forked_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's global random state seeded, and put it back afterwards (CPU and the given accelerator).

    Args:
        seed: any non-negative integer.
        device: where the model computes.
    """
    others = device.type != "cpu"
    module = torch.get_device_module(device.type) if others else None
    indices = list(range(module.device_count())) if module is not None else []
    kind = device.type if others else "cuda"
    with torch.random.fork_rng(devices=indices, device_type=kind):
        torch.default_generator.manual_seed(seed)
        if module is not None:
            module.manual_seed_all(seed)
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case Mapping():
            for item in value.values():
                yield from _tensors(item)
        case tuple() | list():
            for item in value:
                yield from _tensors(item)
