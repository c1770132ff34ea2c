r"""Low-rank adapters on linear layers: attach, read, take off.

``y = x W^T + b + scale * (x A^T) B^T`` with ``A: [r, in]`` random, ``B: [out, r]`` zero at the start, so that a freshly
attached adapter changes nothing. What an adapter means is its *delta* ``scale * B A``; the factors of two adapters have
no common coordinates and are never averaged themselves (:mod:`automode.merges.adapter_fuse` merges deltas).

References:
    Hu et al. 2022, LoRA, arXiv:2106.09685; Kalajdzievski 2023 (rank-stabilised scale), arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.averages import accumulable


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """One layer's adapter.

    Attributes:
        a: ``[r, in]``.
        b: ``[out, r]``.
        scale: factor of the product; ``alpha / r`` in LoRA, ``alpha / sqrt(r)`` rank-stabilised. It is stored, never
            inferred from the shapes.
    """

    a: Tensor
    b: Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise MergeError(
                f"an adapter of A {tuple(self.a.shape)} and B {tuple(self.b.shape)} came; [r, in] and [out, r] are needed"
            )
        if not math.isfinite(self.scale):
            raise MergeError(f"the adapter's scale is {self.scale}, but must be finite")

    def delta(self) -> Tensor:
        """Return ``scale * B A``, ``[out, in]``, in double precision where the device has it."""
        return self.scale * (accumulable(self.b.detach()) @ accumulable(self.a.detach()))


Adapter: TypeAlias = Mapping[str, LowRank]
"""Layer name (as in ``named_modules``, without ``.weight``) to its low-rank delta."""


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank delta.

    ``weight`` and ``bias`` read as the merged ones, so that code which reaches for them (torch's fused attention and
    encoder paths do) computes with the adapter and not past it.

    Args:
        base: the layer; its parameters are frozen.
        rank: ``r``, from 1 to the smaller side of the layer.
        alpha: the delta is scaled by ``alpha / rank``.
        generator: draws ``A``; on the CPU.

    Raises:
        MergeError: the rank does not fit the layer.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        limit = min(base.in_features, base.out_features)
        if not 1 <= rank <= limit:
            raise MergeError(
                f"rank {rank} came for a layer of {base.in_features} to {base.out_features}: it must be in [1, {limit}]"
            )
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        bound = math.sqrt(3.0 / base.in_features)
        drawn = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        own = base.weight
        self.lora_a = nn.Parameter(drawn.to(own.device, own.dtype))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=own.device, dtype=own.dtype))

    @property
    def in_features(self) -> int:
        """The layer's inputs."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """The layer's outputs."""
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The merged weight ``W + scale * B A``, ``[out, in]``; differentiable in A and B."""
        return self.base.weight + self.scale * (self.lora_b @ self.lora_a)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias; adapters leave it alone."""
        return self.base.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[..., out]`` for ``[..., in]`` without forming the merged weight."""
        low = nn.functional.linear(nn.functional.linear(inputs, self.lora_a), self.lora_b)
        outputs: Tensor = self.base(inputs)
        return outputs + self.scale * low


def attach(
    model: nn.Module, *, rank: int, alpha: float, targets: Iterable[str] | None = None, seed: int = 0
) -> list[str]:
    """Put an adapter on linear layers in place, and freeze every other parameter of the model.

    Args:
        model: changed in place; its state dict then has ``<layer>.base.weight``, ``.lora_a`` and ``.lora_b``.
        rank: ``r``; a layer with a side smaller than ``r`` is left out, unless it is named in ``targets``.
        alpha: the deltas are scaled by ``alpha / rank``.
        targets: names of layers; every ``nn.Linear`` unless given.
        seed: every ``A`` derives from it; the global random state is untouched.

    Returns:
        The names of the adapted layers.

    Raises:
        MergeError: no layer can be adapted, a target is not an ``nn.Linear``, or adapters are already attached.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise MergeError("adapters are already attached: load their `merged_state` into a plain model first")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if targets is None:
        chosen = [
            name for name, layer in linear.items() if min(layer.in_features, layer.out_features) >= rank
        ]
    else:
        chosen = list(targets)
    unknown = next((name for name in chosen if name not in linear), None)
    if unknown is not None:
        raise MergeError(f"{unknown!r} is no linear layer of the model; it has {sorted(linear)}")
    if not chosen or "" in chosen:
        raise MergeError(
            f"no linear layer inside the model has both sides >= rank {rank}: choose a smaller rank"
        )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        owner, _, leaf = name.rpartition(".")
        adapted = LoRALinear(linear[name], rank=rank, alpha=alpha, generator=generator)
        adapted.train(linear[name].training)
        setattr(model.get_submodule(owner), leaf, adapted)
    return chosen


def adapter_of(model: nn.Module) -> dict[str, LowRank]:
    """Return a copy of the adapters attached to a model, empty when there are none."""
    return {
        name: LowRank(a=module.lora_a.detach().clone(), b=module.lora_b.detach().clone(), scale=module.scale)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of the model as it was before adapters were attached, under its original keys."""
    prefixes = tuple(name for name, module in model.named_modules() if isinstance(module, LoRALinear))
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        layer = next((prefix for prefix in prefixes if key.startswith(f"{prefix}.")), None)
        if layer is None:
            state[key] = tensor
        elif key.startswith(f"{layer}.base."):
            state[f"{layer}.{key.removeprefix(f'{layer}.base.')}"] = tensor
    return state
