"""What the room merges: state dicts, and the checks that make two of them comparable.

A merge is a function of state dicts. Before any arithmetic, :func:`check_compatible` refuses states that differ in
keys, shapes or dtypes, because a merge that pads, skips or broadcasts gives a model that fails quietly later. Three
kinds of entry get their own treatment everywhere in this room:

* integer and boolean tensors (counters, masks, ``num_batches_tracked``) are copied from the parent, never averaged;
* tied weights (several keys over the same memory) are merged once and written to every key of the group, so that the
  order in which keys are loaded cannot matter;
* running norm statistics are recognised, so that a caller knows that they must be recomputed
  (:mod:`automode.merges.norm_statistics`) and that no Fisher information exists for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from automode.errors import MergeError

StateDict: TypeAlias = Mapping[str, Tensor]
"""Names to tensors, as ``nn.Module.state_dict()`` gives them. Never written to by this room."""

_NORM_SUFFIXES = ("running_mean", "running_var")


def is_averaged(tensor: Tensor) -> bool:
    """Whether a merge averages this tensor: floating and complex entries are, integers and booleans are copied."""
    return tensor.is_floating_point() or tensor.is_complex()


def norm_statistics_keys(state: StateDict) -> frozenset[str]:
    """Return the keys of running means and variances (BatchNorm, and InstanceNorm that tracks them).

    A key counts only when both of its pair are present, so a parameter that merely ends in ``running_mean`` does not.
    """
    keys = set()
    for key in state:
        prefix, _, leaf = key.rpartition(".")
        if leaf == _NORM_SUFFIXES[0]:
            pair = f"{prefix}.{_NORM_SUFFIXES[1]}" if prefix else _NORM_SUFFIXES[1]
            if pair in state:
                keys |= {key, pair}
    return frozenset(keys)


def alias_groups(state: StateDict) -> tuple[tuple[str, ...], ...]:
    """Return the groups of two or more keys that view exactly the same memory (tied weights), in key order.

    Aliases can be seen only while the tensors still share storage: as ``state_dict()`` returns them, not after a
    clone of each entry or a round trip through a file.
    """
    views: dict[tuple[object, ...], list[str]] = {}
    for key, tensor in state.items():
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        view = (
            str(tensor.device),
            tensor.data_ptr(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        views.setdefault(view, []).append(key)
    return tuple(tuple(keys) for keys in views.values() if len(keys) > 1)


def cloned(state: StateDict) -> dict[str, Tensor]:
    """Copy every tensor, detached; keys that are tied stay one tensor."""
    first_of = {key: group[0] for group in alias_groups(state) for key in group}
    fresh: dict[str, Tensor] = {}
    for key, tensor in state.items():
        first = first_of.get(key, key)
        fresh[key] = tensor.detach().clone() if first == key else fresh[first]
    return fresh


def overlapping_keys(state: StateDict) -> tuple[str, str] | None:
    """Return two keys that share memory without being the same view (a transposed tie, say), or None.

    Operations that treat every element alike are safe on such keys; element-wise weights are not, because the two
    keys would be given different values for one number. Views of disjoint ranges (flattened recurrent weights) pass.
    """
    ranges: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    for key, tensor in state.items():
        if tensor.numel() == 0 or tensor.is_meta:
            continue
        first = int(tensor.storage_offset())
        last = first
        for size, step in zip(tensor.shape, tensor.stride(), strict=True):
            last = last + (int(size) - 1) * int(step)
        home = (str(tensor.device), tensor.untyped_storage().data_ptr())
        ranges.setdefault(home, []).append((first, last, key))
    same = {frozenset((a, b)) for group in alias_groups(state) for a in group for b in group}
    for spans in ranges.values():
        spans.sort()
        for (_, last, key), (first, _, other) in itertools.pairwise(spans):
            if first <= last and frozenset((key, other)) not in same:
                return key, other
    return None


def incompatibility(parent: StateDict, members: Sequence[StateDict]) -> str | None:
    """Say why these states cannot be merged element by element, or return None when they can.

    Args:
        parent: the state that fixes keys, shapes, dtypes and tied weights.
        members: the states to merge, at least one.

    Returns:
        A sentence that names the key, what came, what was needed and what to do; None when all is well.
    """
    if not members:
        return "there is nothing to merge: 0 member states came and at least 1 is needed"
    entries: Mapping[str, object] = parent  # annotated as tensors, but a module's extra state can be anything
    for key, entry in entries.items():
        if not isinstance(entry, Tensor):
            return (
                f"the parent holds a {type(entry).__name__} under {key!r} where a tensor is needed: "
                f"extra state cannot be merged, remove it from the state dict first"
            )
        if entry.layout is not torch.strided or entry.is_quantized:
            return (
                f"{key!r} is sparse or quantized: merge the dense, unquantized states and convert afterwards"
            )
    groups = alias_groups(parent)
    for index, member in enumerate(members):
        reason = _difference(parent, member, f"member {index}") or _untied(groups, member, f"member {index}")
        if reason is not None:
            return reason
    return None


def check_compatible(parent: StateDict, members: Sequence[StateDict]) -> None:
    """Refuse states that cannot be merged element by element.

    Raises:
        MergeError: keys, shapes or dtypes differ, a tied weight came untied, or there is no member at all.
    """
    reason = incompatibility(parent, members)
    if reason is not None:
        raise MergeError(reason)


def merge_entries(
    parent: StateDict, members: Sequence[StateDict], combine: Callable[[str, list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Build a new state: ``combine`` for every distinct averaged entry, the parent's copy for all others.

    Args:
        parent: fixes keys, order, dtypes, devices, tied weights, and the integer and boolean entries.
        members: compatible states (checked here).
        combine: gets a key and the members' tensors for it (on the parent's device) and returns the merged tensor
            of the same shape; it is called once for each group of tied keys.

    Returns:
        Fresh tensors in the parent's key order; tied keys share one tensor, as they do in the parent.

    Raises:
        MergeError: the states are not compatible.
    """
    check_compatible(parent, members)
    first_of = {key: group[0] for group in alias_groups(parent) for key in group}
    merged: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, own in parent.items():
            first = first_of.get(key, key)
            if first != key:
                merged[key] = merged[first]
            elif is_averaged(own) and own.numel() > 0:
                tensors = [member[key].detach().to(own.device) for member in members]
                merged[key] = combine(key, tensors).to(own.dtype)
            else:
                merged[key] = own.detach().clone()
    return merged


def _difference(parent: StateDict, member: StateDict, who: str) -> str | None:
    for key, own in parent.items():
        if key not in member:
            return f"{who} lacks {key!r} ({_describe(own)}), which the parent has; {_CURE}"
        other: object = member[key]
        if not isinstance(other, Tensor):
            return f"{who} holds a {type(other).__name__} under {key!r} where a tensor is needed"
        if other.shape != own.shape:
            return f"{key!r} is {_describe(other)} in {who} and {_describe(own)} in the parent; {_CURE}"
        if other.dtype != own.dtype:
            return f"{key!r} is {other.dtype} in {who} and {own.dtype} in the parent: convert both to one dtype first"
    extra = next((key for key in member if key not in parent), None)
    if extra is not None:
        return f"{who} has {extra!r} ({_describe(member[extra])}), which the parent lacks; {_CURE}"
    return None


_CURE = (
    "states of different architectures or heads cannot be merged in weight space: "
    "keep them as a mixture of experts, or distil them into one network"
)


def _untied(groups: tuple[tuple[str, ...], ...], member: StateDict, who: str) -> str | None:
    for first, *rest in groups:
        for key in rest:
            if member[key].data_ptr() != member[first].data_ptr() and not torch.equal(
                member[key], member[first]
            ):
                return (
                    f"{first!r} and {key!r} are one tied weight in the parent but differ in {who}: "
                    f"tie them in that member, or untie them in the parent, before merging"
                )
    return None


def _describe(tensor: Tensor) -> str:
    return "scalar" if tensor.dim() == 0 else " x ".join(str(size) for size in tensor.shape)
