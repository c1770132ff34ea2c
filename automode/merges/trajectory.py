r"""Averages along one live trajectory: two EMA horizons and a tail average, kept outside of the model.

Averaging along one run is the one merge that helps almost everywhere at equal compute, so it has to be almost free: the
averages are updated every ``every`` steps with the decay that this many steps have earned, which costs under 0.3 % of
a training step on networks small and large (``benchmarks/averages_cost.py``).

Each average is a normalised weighted mean of the snapshots that were read, so none is biased towards its start and none
needs a warm-up: the first update copies, and the weights then take their form.

* ``ema3`` and ``ema10``: exponential weights with a mean age of 3 % and 10 % of the planned steps. A snapshot read after
  a gap of ``g`` steps counts ``1 - decay**g`` and ages all before it by ``decay**g``, with ``decay = 1 - 1/horizon``.
* ``tail``: a tail average that is valid at every step, not only at the end. A snapshot counts ``g * p**6``, where ``p``
  is the number of steps followed so far: its mean age (1/8 of those steps) and its effective number of snapshots (13/49
  of all) are those of a uniform average over the last quarter, without choosing beforehand where the tail begins.

References:
    Polyak & Juditsky 1992; Shamir & Zhang 2013, Stochastic gradient descent for non-smooth optimization,
    arXiv:1212.1824 (polynomial-decay averaging); Kingma & Ba 2015, arXiv:1412.6980 (bias correction).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from automode.errors import MergeError
from automode.merges.state_dicts import StateDict, alias_groups

EMA_HORIZONS = {"ema3": 0.03, "ema10": 0.10}
"""Name to mean age, as a share of the planned steps."""

TAIL_POWER = 6
NAMES = (*EMA_HORIZONS, "tail")
DEFAULT_EVERY = 32
_STATE_VERSION = 1


class TrajectoryAverages:
    """EMA at two horizons and a tail average of a run's parameters.

    Only floating-point parameters are averaged; half-precision ones in single precision. The averages live on the
    parameters' devices and take three times their memory. Nothing of the model is written, and no random number drawn.

    Args:
        parameters: name to parameter, as ``dict(model.named_parameters())``. Pass the same names to every update;
            leave frozen parameters out to save their memory.
        planned_steps: the run's planned optimizer steps, at least 1; the EMA horizons are shares of it.
        every: steps between two updates, at least 1.

    Raises:
        MergeError: a count is below 1, or no parameter is floating point.
    """

    __slots__ = (
        "_averages",
        "_converts",
        "_decays",
        "_followed",
        "_last_step",
        "_names",
        "_sums",
        "_updates",
        "every",
        "planned_steps",
    )

    def __init__(
        self, parameters: Mapping[str, Tensor], planned_steps: int, *, every: int = DEFAULT_EVERY
    ) -> None:
        if planned_steps < 1 or every < 1:
            raise MergeError(
                f"planned_steps is {planned_steps} and every is {every}, but both must be at least 1"
            )
        self._names = tuple(name for name, tensor in parameters.items() if tensor.is_floating_point())
        if not self._names:
            raise MergeError(
                f"none of the {len(parameters)} parameters is floating point: there is nothing to average"
            )
        self.planned_steps = planned_steps
        self.every = every
        self._decays = _decays(planned_steps)
        self._sums = dict.fromkeys(NAMES, 0.0)
        self._averages = {name: [_zeros_like(parameters[key]) for key in self._names] for name in NAMES}
        self._converts = any(
            average.dtype != parameters[key].dtype
            for key, average in zip(self._names, self._averages["tail"], strict=True)
        )
        self._followed = 0
        self._last_step = 0
        self._updates = 0

    @property
    def updates(self) -> int:
        """How many snapshots have been read."""
        return self._updates

    def update(self, model_params: Mapping[str, Tensor], step: int, *, now: bool = False) -> bool:
        """Read the parameters if ``every`` steps have passed since the last update.

        Args:
            model_params: name to parameter; may be built once and passed at every step.
            step: completed optimizer steps; the first snapshot may come at any step.
            now: read even if the interval has not passed, so that candidates judged now are not stale.

        Returns:
            Whether a snapshot was read.

        Raises:
            MergeError: a name that was given at construction is missing.
        """
        gap = step - self._last_step
        if gap < self.every and not (now and gap > 0):
            return False
        try:
            values = [model_params[name] for name in self._names]
        except KeyError as missing:
            raise MergeError(
                f"the parameter {missing} is no longer there: make new averages after changing the model"
            ) from None
        self._move_along(values)
        if self._updates == 0:
            gap = min(gap, self.every)  # steps before the first snapshot were not followed
        self._updates += 1
        self._followed += gap
        self._last_step = step
        with torch.no_grad():
            if self._converts:
                values = [v.to(a.dtype) for v, a in zip(values, self._averages["tail"], strict=True)]
            for name, decay in self._decays.items():
                kept = decay**gap
                self._sums[name] = kept * self._sums[name] + (1.0 - kept)
                torch._foreach_lerp_(self._averages[name], values, (1.0 - kept) / self._sums[name])
            weight = gap * float(self._followed) ** TAIL_POWER
            self._sums["tail"] += weight
            torch._foreach_lerp_(self._averages["tail"], values, weight / self._sums["tail"])
        return True

    def candidates(self, base: StateDict | None = None) -> dict[str, dict[str, Tensor]]:
        """Return the averaged states, empty before the first update.

        Args:
            base: the model's ``state_dict()``. When given, each candidate is a full state: buffers, frozen and
                integer entries are copied from it, tied keys follow their parameter, and dtypes are the base's.
                Running norm statistics are the base's: recompute them before the candidate is judged.

        Returns:
            ``{"ema3": state, "ema10": state, "tail": state}``, fresh tensors.

        Raises:
            MergeError: ``base`` lacks an averaged parameter.
        """
        if self._updates == 0:
            return {}
        averaged = {
            name: dict(zip(self._names, (tensor.clone() for tensor in tensors), strict=True))
            for name, tensors in self._averages.items()
        }
        if base is None:
            return averaged
        absent = next((name for name in self._names if name not in base), None)
        if absent is not None:
            raise MergeError(
                f"the base state lacks the averaged parameter {absent!r}: pass the same model's state"
            )
        return {name: _completed(state, base) for name, state in averaged.items()}

    def restart(self) -> None:
        """Forget what was read, for a trajectory that begins anew with other weights; the next update is the first."""
        for tensors in self._averages.values():
            torch._foreach_zero_(tensors)
        self._sums = dict.fromkeys(NAMES, 0.0)
        self._followed = self._updates = 0

    def clone(self) -> Self:
        """Return an independent copy, as a fork needs to carry its trunk's averages on."""
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores: numbers, strings and tensors only (loadable with ``weights_only=True``)."""
        return {
            "version": _STATE_VERSION,
            "planned_steps": self.planned_steps,
            "every": self.every,
            "last_step": self._last_step,
            "followed": self._followed,
            "updates": self._updates,
            "sums": dict(self._sums),
            "averages": {
                name: dict(zip(self._names, (tensor.clone() for tensor in tensors), strict=True))
                for name, tensors in self._averages.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; the stored cadence and planned steps win.

        Raises:
            MergeError: the stored version is unknown, or names or shapes are not those of this model.
        """
        if state["version"] != _STATE_VERSION:
            raise MergeError(
                f"stored averages are of version {state['version']}, this is version {_STATE_VERSION}"
            )
        for name in NAMES:
            stored: Mapping[str, Tensor] = state["averages"][name]
            shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
            own = {key: tuple(t.shape) for key, t in zip(self._names, self._averages[name], strict=True)}
            if shapes != own:
                differing = sorted(
                    key for key in own.keys() | shapes.keys() if own.get(key) != shapes.get(key)
                )
                raise MergeError(
                    f"stored averages do not fit this model, first at {differing[0]!r}: load the same model"
                )
        self.planned_steps = int(state["planned_steps"])
        self.every = int(state["every"])
        self._decays = _decays(self.planned_steps)
        self._last_step = int(state["last_step"])
        self._followed = int(state["followed"])
        self._updates = int(state["updates"])
        self._sums = {name: float(state["sums"][name]) for name in NAMES}
        with torch.no_grad():
            for name in NAMES:
                for key, tensor in zip(self._names, self._averages[name], strict=True):
                    tensor.copy_(state["averages"][name][key])

    def _move_along(self, values: list[Tensor]) -> None:
        if values[0].device == self._averages["tail"][0].device:
            return
        for name in NAMES:
            self._averages[name] = [a.to(v.device) for a, v in zip(self._averages[name], values, strict=True)]


def _decays(planned_steps: int) -> dict[str, float]:
    return {name: 1.0 - 1.0 / max(share * planned_steps, 1.0) for name, share in EMA_HORIZONS.items()}


def _zeros_like(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
    return torch.zeros_like(tensor, dtype=dtype, requires_grad=False)


def _completed(state: dict[str, Tensor], base: StateDict) -> dict[str, Tensor]:
    tied = {key: first for first, key in _tied_to_averaged(state, base)}
    full: dict[str, Tensor] = {}
    for key, own in base.items():
        source = key if key in state else tied.get(key)
        full[key] = own.detach().clone() if source is None else state[source].to(own.dtype)
    for key, first in tied.items():
        full[key] = full[first]
    return full


def _tied_to_averaged(state: dict[str, Tensor], base: StateDict) -> list[tuple[str, str]]:
    pairs = []
    for group in alias_groups(base):
        first = next((key for key in group if key in state), None)
        if first is not None:
            pairs += [(first, key) for key in group if key != first]
    return pairs
