"""Averages of states: uniform, weighted, interpolated, and along a trajectory of snapshots.

All of them accumulate in double precision (single where the device has no doubles) and are element-wise convex: the
result of non-negative weights lies within the members' minimum and maximum, and where all members agree, also at an
infinity as in an attention mask, the result is that very value, bit by bit.

The averages that follow a live run are in :mod:`automode.merges.trajectory`.

References:
    Wortsman et al. 2022, Model soups, arXiv:2203.05482; Wortsman et al. 2022, Robust fine-tuning of zero-shot models
    (WiSE-FT), arXiv:2109.01903; Izmailov et al. 2018, Averaging weights leads to wider optima (SWA), arXiv:1803.05407.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from automode.errors import MergeError
from automode.merges.state_dicts import (
    StateDict,
    check_compatible,
    is_averaged,
    merge_entries,
    norm_statistics_keys,
)

EXTRAPOLATION_LIMITS = (-1.0, 2.0)
"""Interpolation coefficients outside of this interval are refused as a mistake."""


def uniform(members: Sequence[StateDict], *, parent: StateDict | None = None) -> dict[str, Tensor]:
    """Average states with equal weights.

    Args:
        members: compatible states, at least one.
        parent: gives integer and boolean entries and tied weights; the first member unless given.

    Raises:
        MergeError: the states are not compatible, or an entry that differs between members is not finite.
    """
    return weighted(members, [1.0] * len(members), parent=parent)


def weighted(
    members: Sequence[StateDict], weights: Sequence[float], *, parent: StateDict | None = None
) -> dict[str, Tensor]:
    """Average states with non-negative weights, which are normalised to sum to 1.

    Args:
        members: compatible states, at least one.
        weights: one finite number >= 0 for each member, not all 0.
        parent: gives integer and boolean entries and tied weights; the first member unless given.

    Raises:
        MergeError: the weights cannot be normalised, the states are not compatible, or an entry that differs between
            members is not finite.
    """
    shares = _normalised(members, weights)

    def combine(key: str, tensors: list[Tensor]) -> Tensor:
        return convex_combination(key, tensors, shares)

    return merge_entries(members[0] if parent is None else parent, members, combine)


def interpolate(a: StateDict, b: StateDict, t: float) -> dict[str, Tensor]:
    """Walk from ``a`` (t = 0) to ``b`` (t = 1), or a little beyond: ``(1 - t) a + t b``.

    Integer and boolean entries and tied weights come from ``a``. Norm statistics never extrapolate (a variance could
    become negative): for them ``t`` is clipped to [0, 1].

    Args:
        a: the parent.
        b: a state compatible with ``a``.
        t: in [-1, 2]; WiSE-FT's grid is 0 to 1.25.

    Raises:
        MergeError: ``t`` is out of range, the states are not compatible, or an entry that differs is not finite.
    """
    low, high = EXTRAPOLATION_LIMITS
    if not low <= t <= high:
        raise MergeError(f"the interpolation coefficient is {t}, but must lie in [{low}, {high}]")
    statistics = norm_statistics_keys(a)

    def combine(key: str, tensors: list[Tensor]) -> Tensor:
        share = min(max(t, 0.0), 1.0) if key in statistics else t
        if 0.0 <= share <= 1.0:
            return convex_combination(key, tensors, [1.0 - share, share])
        start, end = (accumulable(tensor) for tensor in tensors)
        same = start == end
        walked = torch.where(same, start, start + share * (end - start))
        return _finite(key, walked, same, tensors)

    return merge_entries(a, [a, b], combine)


def swa(snapshots: Iterable[StateDict], *, parent: StateDict | None = None) -> dict[str, Tensor]:
    """Average the snapshots of one run as they come, holding the running mean and one snapshot at a time.

    Args:
        snapshots: states along one trajectory, oldest first, at least one; may be a generator.
        parent: gives integer and boolean entries and tied weights; the last snapshot unless given.

    Raises:
        MergeError: there is no snapshot, a snapshot is not compatible with the first, or a mean is not finite.
    """
    means: dict[str, Tensor] = {}
    first: StateDict = {}
    last: StateDict = {}
    count = 0
    for count, last in enumerate(snapshots, start=1):
        first = last if count == 1 else first
        check_compatible(first, [last])
        for key, tensor in last.items():
            if not is_averaged(tensor):
                continue
            value = accumulable(tensor.detach())
            if count == 1:
                means[key] = value.clone()
            else:
                change = torch.where(value == means[key], torch.zeros_like(value), value - means[key])
                means[key] += change / count
    if count == 0:
        raise MergeError("there is nothing to average: 0 snapshots came and at least 1 is needed")

    def combine(key: str, tensors: list[Tensor]) -> Tensor:
        mean = means[key].to(tensors[0].device)
        return _finite(key, mean, mean == accumulable(tensors[0]), tensors)

    return merge_entries(last if parent is None else parent, [last], combine)


def convex_combination(key: str, tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Sum ``share * tensor`` for shares >= 0 that sum to 1, kept within the element-wise minimum and maximum.

    Args:
        key: the entry's name, for the error.
        tensors: same shape, dtype and device, at least one.
        shares: one for each tensor.

    Raises:
        MergeError: an element that differs between the tensors gives no finite result.
    """
    counted = [(tensor, share) for tensor, share in zip(tensors, shares, strict=True) if share > 0]
    if len(counted) == 1:
        return counted[0][0].clone()
    values = [accumulable(tensor) for tensor, _ in counted]
    mean = torch.zeros_like(values[0])
    for value, (_, share) in zip(values, counted, strict=True):
        mean += share * value
    same = torch.stack([value == values[0] for value in values[1:]]).all(dim=0)
    if not mean.is_complex():
        low, high = values[0], values[0]
        for value in values[1:]:
            low, high = torch.minimum(low, value), torch.maximum(high, value)
        mean = mean.clamp(low, high)
    return _finite(key, torch.where(same, values[0], mean), same, tensors)


def accumulable(tensor: Tensor) -> Tensor:
    """Return the tensor in the precision that sums are taken in: double, or single on a device without doubles."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _finite(key: str, merged: Tensor, same: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    if bool((torch.isfinite(merged) | same).all()):
        return merged
    guilty = [index for index, tensor in enumerate(tensors) if not bool(torch.isfinite(tensor).all())]
    raise MergeError(
        f"{key!r} is not finite after merging (not finite in members {guilty}): leave out the members that diverged"
    )


def _normalised(members: Sequence[StateDict], weights: Sequence[float]) -> list[float]:
    if not members:
        raise MergeError("there is nothing to merge: 0 member states came and at least 1 is needed")
    if len(weights) != len(members):
        raise MergeError(f"{len(weights)} weights came for {len(members)} members: give one weight for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise MergeError(f"the weights are {list(weights)}, but must be finite and >= 0")
    total = math.fsum(weights)
    if total <= 0:
        raise MergeError("all weights are 0: at least one member must count")
    return [weight / total for weight in weights]
