"""Nested batches: tensors inside tuples, lists and mappings, as loaders and models hand them about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def map_tensors(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply a function to the tensors of like-shaped nested structures.

    Args:
        function: Takes as many tensors as there are trees.
        trees: Tensors, or (named) tuples, lists and mappings of them, all with the structure of the first. A leaf
            that is no tensor is kept as it is in the first tree.

    Returns:
        The structure of the first tree with the function's results in place of its tensors.
    """
    first = trees[0]
    if isinstance(first, torch.Tensor):
        return function(*trees)
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, (tuple, list)):
        parts = [map_tensors(function, *column) for column in zip(*trees, strict=True)]
        if isinstance(first, list):
            return parts
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return first


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a nested structure, in order.

    Args:
        tree: As for :func:`map_tensors`.

    Yields:
        Each tensor.
    """
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)


def is_plain(value: Any) -> bool:
    """Tell whether a value can be stored and loaded safely: numbers, text, None, tensors, and lists, tuples and dicts of such."""
    if type(value) in (bool, int, float, str, bytes, type(None)) or type(value) is torch.Tensor:
        return True
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return type(value) is dict and all(map(is_plain, value.keys())) and all(map(is_plain, value.values()))


def rows_in(tree: Any) -> int | None:
    """Give the number of samples that every tensor of a structure has along its first dimension.

    Args:
        tree: As for :func:`map_tensors`.

    Returns:
        The common size, or None where there is no tensor, one without dimensions, or the sizes differ.
    """
    sizes = {tensor.shape[0] if tensor.ndim else -1 for tensor in tensors_in(tree)}
    if len(sizes) != 1:
        return None
    size = sizes.pop()
    return None if size < 0 else size


def signature_of(tree: Any) -> Any:
    """Describe a structure so that equal descriptions can be concatenated along the first dimension.

    Args:
        tree: As for :func:`map_tensors`.

    Returns:
        A hashable description: structure, dtypes, devices, and shapes without their first size.
    """
    if isinstance(tree, torch.Tensor):
        return tree.dtype, tree.device, tree.shape[1:], tree.ndim
    if isinstance(tree, Mapping):
        return tuple((key, signature_of(value)) for key, value in tree.items())
    if isinstance(tree, (tuple, list)):
        return (type(tree), *(signature_of(value) for value in tree))
    return type(tree)
