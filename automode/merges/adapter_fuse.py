"""Fuse low-rank adapters into the weights that they were trained on.

``W' = W + sum_i w_i * scale_i * B_i A_i``: the deltas are summed, never the factors. Averaging ``A`` and ``B`` on their
own gives cross terms that belong to no adapter; a merge that infers the scale from the shapes is wrong for
rank-stabilised adapters. The identity that guards against both: one adapter with weight 1 gives exactly the model that
was trained.

References:
    Hu et al. 2022, arXiv:2106.09685; Ilharco et al. 2023, Editing models with task arithmetic, arXiv:2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.averages import accumulable
from automode.merges.lora import Adapter, adapter_of, base_state
from automode.merges.state_dicts import StateDict, alias_groups


def fuse(parent: StateDict, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Add the weighted sum of the adapters' deltas to the parent's weights.

    Args:
        parent: the plain state that every adapter was trained on.
        adapters: for each specialist, layer name to low-rank delta; at least one, none empty.
        weights: one finite number for each adapter, used as given (1 applies it as it was trained; negative unlearns).

    Returns:
        A state with the parent's keys and dtypes; layers without an adapter and all buffers are copies.

    Raises:
        MergeError: there is no adapter, a layer is missing, misshapen or tied to another, or a result is not finite.
    """
    if not adapters or any(not adapter for adapter in adapters):
        raise MergeError(
            f"{len(adapters)} adapters came, {sum(not adapter for adapter in adapters)} of them empty: adapter fusion "
            f"needs specialists that were trained as low-rank adapters; for full models use uniform or greedy"
        )
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise MergeError(
            f"weights {list(weights)} came for {len(adapters)} adapters: give one finite weight for each"
        )
    tied = {key: group for group in alias_groups(parent) for key in group}
    deltas: dict[str, Tensor] = {}
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for layer, low_rank in adapter.items():
            key = f"{layer}.weight"
            _check_layer(parent, key, (low_rank.b.shape[0], low_rank.a.shape[1]), tied, index)
            change = weight * low_rank.delta().to(parent[key].device)
            deltas[key] = deltas[key] + change if key in deltas else change
    fused: dict[str, Tensor] = {}
    copies: dict[tuple[str, ...], Tensor] = {}
    with torch.no_grad():
        for key, own in parent.items():
            if key in deltas:
                fused[key] = (accumulable(own) + deltas[key]).to(own.dtype)
                if not bool(torch.isfinite(fused[key]).all()):
                    raise MergeError(
                        f"{key!r} is not finite after fusing: leave out the adapters that diverged"
                    )
            elif key in tied:
                fused[key] = copies.setdefault(tied[key], own.detach().clone())
            else:
                fused[key] = own.detach().clone()
    return fused


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a plain state, under the original keys, that computes what the adapted model computes.

    Raises:
        MergeError: the model has no adapters, or one sits on a weight that is tied to another layer.
    """
    return fuse(base_state(model), [adapter_of(model)], [1.0])


def _check_layer(
    parent: StateDict, key: str, shape: tuple[int, int], tied: dict[str, tuple[str, ...]], index: int
) -> None:
    if key not in parent:
        raise MergeError(
            f"adapter {index} changes {key!r}, which the parent lacks: fuse it into the model it came from"
        )
    if tuple(parent[key].shape) != shape:
        raise MergeError(
            f"adapter {index} changes {key!r} as {shape[0]} x {shape[1]}, the parent holds {tuple(parent[key].shape)}"
        )
    if key in tied:
        raise MergeError(
            f"adapter {index} changes {key!r}, which is tied to {[k for k in tied[key] if k != key]}: fusing would "
            f"change those too; untie the weights first or keep the adapter apart"
        )
