"""Specialists that train low-rank adapters: the fork's weights stay frozen, and what is offered is the fork with the deltas merged in.

Outside of its training an adapted specialist looks like any other: its checkpoint holds a plain state of the trunk's own keys, so that it can
be judged, merged, mixed and adopted. Beside it stand the factors, and the weights that they were trained on, for the next
rung and for fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from automode.errors import MergeError, NotExecutableError
from automode.merges.adapter_fuse import fuse, merged_state
from automode.merges.lora import Adapter as Deltas
from automode.merges.lora import LoRALinear, LowRank, adapter_of, attach, base_state
from automode.planner.variants import Adapter

ADAPTER: Final = "adapter"
"""Stands in a checkpoint where others name the kind of their optimizer: the trunk cannot go on from this one's moments."""

_TAG: Final = 0xADA


class AdaptedParameters(Mapping[str, Tensor]):
    """The parameters of an adapted network under the names that they have without adapters, merged as they are read.

    Args:
        model: Its adapters may be trained on meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            f"{name}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, LoRALinear)
        }
        bases = {
            f"{name}.base.": f"{name}." for name in (key.removesuffix(".weight") for key in self._layers)
        }
        self._others: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            layer = next((prefix for prefix in bases if name.startswith(prefix)), None)
            own = name if layer is None else bases[layer] + name.removeprefix(layer)
            if own not in self._layers and not own.endswith((".lora_a", ".lora_b")):
                self._others[own] = parameter

    def __getitem__(self, name: str) -> Tensor:
        layer = self._layers.get(name)
        return self._others[name] if layer is None else layer.weight.detach()

    def __iter__(self) -> Iterator[str]:
        return iter((*self._layers, *self._others))

    def __len__(self) -> int:
        return len(self._layers) + len(self._others)


class Adapted:
    """A fork whose linear layers have adapters, and an optimizer that trains these alone.

    Args:
        model: A copy of the trunk's network with the fork's weights; changed in place.
        spec: What the variant says.
        entropy: Seed material of the card: trials of equal rank and targets begin alike.

    Attributes:
        parameters: Its parameters as the trunk names them.

    Raises:
        MergeError: No layer can be adapted as the variant says.
    """

    def __init__(self, model: nn.Module, spec: Adapter, entropy: Sequence[int]) -> None:
        seed = int(np.random.SeedSequence([*entropy, _TAG]).generate_state(1)[0])
        targets = _layers(model, spec)
        self._layers = attach(model, rank=spec.rank, alpha=spec.alpha, targets=targets, seed=seed)
        self._model = model
        self.parameters = AdaptedParameters(model)

    def relink(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let an optimizer of the network train its adapters instead: each in the group of the weight that it adapts.

        The adapter of a weight that no group trains goes to the first group. Moments begin anew.
        """
        layers = {name: self._model.get_submodule(name) for name in self._layers}
        where = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        mine: dict[int, list[nn.Parameter]] = {id(group): [] for group in optimizer.param_groups}
        for layer in layers.values():
            assert isinstance(layer, LoRALinear)
            group = where.get(id(layer.base.weight), optimizer.param_groups[0])
            mine[id(group)] += [layer.lora_a, layer.lora_b]
        for group in optimizer.param_groups:
            group["params"] = mine[id(group)]
        optimizer.state.clear()
        optimizer.load_state_dict(
            optimizer.state_dict()
        )  # whoever keeps its parameters elsewhere too looks again
        return optimizer

    def load(self, stored: Mapping[str, Any]) -> None:
        """Go on with the factors that :meth:`stored` gave."""
        with torch.no_grad():
            for name in self._layers:
                layer = self._model.get_submodule(name)
                assert isinstance(layer, LoRALinear)
                layer.lora_a.copy_(stored["a"][name])
                layer.lora_b.copy_(stored["b"][name])

    def take_off(self, *, finite: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the merged state and what a checkpoint keeps beside it, and leave the network as it was without adapters.

        Args:
            finite: Whether the training went well; of one that diverged the fork's own weights are given.

        Raises:
            MergeError: A merged weight is not finite, or is tied to another layer.
        """
        state = merged_state(self._model) if finite else base_state(self._model)
        state = {name: tensor.detach().clone() for name, tensor in state.items()}
        factors, base = adapter_of(self._model), base_state(self._model)
        kept = {
            "a": {name: factor.a for name, factor in factors.items()},
            "b": {name: factor.b for name, factor in factors.items()},
            "scale": {name: factor.scale for name, factor in factors.items()},
            "base": {name: base[f"{name}.weight"].detach().clone() for name in factors},
        }
        for name in self._layers:
            owner, _, leaf = name.rpartition(".")
            layer = self._model.get_submodule(name)
            assert isinstance(layer, LoRALinear)
            setattr(self._model.get_submodule(owner), leaf, layer.base)
        return state, kept


def unmerged(weights: Mapping[str, Tensor], stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state that stored adapters were trained on, norm statistics as they became."""
    return dict(weights) | {f"{name}.weight": tensor for name, tensor in stored["base"].items()}


def rehearse(model: nn.Module, spec: Adapter) -> None:
    """See that a network can be adapted and merged again, before anything is spent.

    Args:
        model: A copy of the trunk's network; it is of no use afterwards.
        spec: What a variant says.

    Raises:
        MergeError: It cannot, and why.
    """
    Adapted(model, spec, (0,)).take_off(finite=True)


def fused(
    onto: Mapping[str, Tensor] | None,
    members: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
    weight: float,
) -> dict[str, Tensor]:
    """Add the deltas of some specialists, each times one weight, to a state.

    Args:
        onto: A state of the trunk's keys; None: the one that the adapters were trained on.
        members: Raw weights of each specialist's checkpoint, and the rest of it.
        weight: 1 with one member and ``onto`` None gives that member.

    Raises:
        NotExecutableError: A member has no adapters.
        MergeError: The adapters do not fit the state, or the result is not finite.
    """
    deltas: list[Deltas] = []
    parent: dict[str, Tensor] = {}
    for weights, rest in members:
        stored = rest.get(ADAPTER)
        if stored is None:
            raise NotExecutableError(
                "a specialist that trained its whole network came, and adapter fusion sums low-rank deltas: give every variant an "
                "`adapter`, or merge by interpolate"
            )
        parent = (parent or dict(weights)) | unmerged({}, stored)
        deltas.append(
            {
                name: LowRank(a=a, b=stored["b"][name], scale=float(stored["scale"][name]))
                for name, a in stored["a"].items()
            }
        )
    return fuse(parent if onto is None else onto, deltas, [weight] * len(deltas))


def best_fused(
    onto: Mapping[str, Tensor] | None,
    members: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Any]]],
    weights: Sequence[float],
    score: Callable[[Mapping[str, Tensor]], float],
) -> tuple[float, dict[str, Tensor], str]:
    """Return (score, state, which it is) of the best weight of :func:`fused`, the earlier one of equals; raises what that raises."""
    tried = (
        (score(state), state, f"each of {len(members)} deltas times {weight:g}")
        for weight in weights
        for state in [fused(onto, members, weight)]
    )
    return max(tried, key=lambda found: found[0])


def _layers(model: nn.Module, spec: Adapter) -> list[str] | None:
    """The linear layers that a variant names, in the network's order; None: it names none."""
    if spec.targets is None:
        return None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in spec.targets:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise MergeError(
                f"adapter target {pattern!r} names no linear layer of the model; it has {', '.join(linear) or 'none'}"
            )
    return [name for name in linear if any(fnmatchcase(name, pattern) for pattern in spec.targets)]
