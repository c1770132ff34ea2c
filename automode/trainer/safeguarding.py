"""Good states of the trunk, kept in memory while the run is healthy, and what puts one back.

A state is what the optimizer would have to unlearn: weights and buffers, the optimizer's moments, the averages. Step, schedule,
data and random state are not part of it, because time does not run backwards in a run that goes back: what was spent is
spent, and the batches that did the harm are not read again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automode.engine import State, healthy
from automode.errors import NotExecutableError
from automode.merges.batches import map_tensors
from automode.merges.norm_statistics import mend
from automode.planner.divergence import keep_every_of
from automode.planner.events import (
    ClipSet,
    RateSet,
    Rewind,
    Rewound,
    SetClip,
    SetLearningRate,
)
from automode.planner.policy import SafeguardPolicy
from automode.trainer.optimizers import scale_rates, scale_schedule
from automode.trainer.trunk import Trunk
from automode.trainer.user_warning import warn_user


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodState:
    """The trunk at one step, in host memory.

    Attributes:
        step: Applied optimizer steps.
        weights: The model's state dict.
        optimizer: State of each parameter, by number.
        averages: State of the averages, or None.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[Any, Any]
    averages: dict[str, Any] | None


class GoodStates:
    """The latest good states of a run in act mode.

    Args:
        trunk: The run.
        policy: How many are kept, how often, and in how much memory.
        foreign: Why the loop around the trunk is not ours; None where it is.

    Attributes:
        why_none: Why no state is kept; empty while states are.
        why_no_rewind: Why the run cannot go back to one all the same; empty where it can.
    """

    def __init__(self, trunk: Trunk, policy: SafeguardPolicy, *, foreign: str | None = None) -> None:
        self.why_none = "" if policy.rewind or policy.skip_nonfinite else "the policy asks for none"
        self.why_no_rewind = (
            f"{foreign}: what it keeps beside the model (its place in the data, a scaler, averages) could not go back"
            if foreign
            else ""
        )
        self._trunk = trunk
        self._policy = policy
        self._states: list[GoodState] = []
        self._due = 0

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the states that are kept, oldest first."""
        return tuple(state.step for state in self._states)

    def keep(self, state: State, step: int) -> None:
        """Keep the trunk as it is, where the time has come and nothing is wrong with it; called at every boundary.

        Args:
            state: The fold's, which knows whether the run is healthy.
            step: Applied optimizer steps.
        """
        if step < self._due or self.why_none or state.mode != "act" or not healthy(state):
            return
        every = keep_every_of(self._policy, state.planning_budget)
        self._due = (step // every + 1) * every
        weights, rest = self._trunk.state()
        size = _mebibytes(weights) + _mebibytes(rest)
        fitting = min(self._policy.keep, int(self._policy.keep_mib / max(size, 1e-9)))
        if fitting < 1:
            self.why_none = f"one state takes {size:,.0f} MiB of memory, and safeguards.keep_mib allows {self._policy.keep_mib:,.0f}"
            self._states.clear()
            warn_user(f"safeguards cannot put this run back where it diverges: {self.why_none}")
            return
        if not _finite(weights):
            return
        del self._states[: max(0, len(self._states) - fitting + 1)]
        self._states.append(
            GoodState(
                step=step,
                weights=_copied(weights),
                optimizer=_copied(rest["optimizer"]["state"]),
                averages=_copied(rest["averages"]) if "averages" in rest else None,
            )
        )

    def state(self) -> dict[str, Any]:
        """What is kept, for :meth:`load`: plain data and tensors."""
        return {
            "states": [
                {"step": s.step, "weights": s.weights, "optimizer": s.optimizer, "averages": s.averages}
                for s in self._states
            ],
            "due": self._due,
            "why_none": self.why_none,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Keep what :meth:`state` gave."""
        self._states = [GoodState(**kept) for kept in state["states"]]
        self._due = int(state["due"])
        self.why_none = str(state["why_none"])

    def restart(self) -> None:
        """Forget everything: the trunk was replaced, and its states of before do not belong to it; one is kept anew soon."""
        self._states.clear()
        self._due = 0

    # Commands.

    def rewind(self, command: Rewind, step: int) -> Rewound:
        """Put back the latest state up to the step asked for, else the oldest, and lower the rates.

        Raises:
            NotExecutableError: There is none, or the run cannot go back.
        """
        if self.why_no_rewind:
            raise NotExecutableError(self.why_no_rewind)
        if not self._states:
            raise NotExecutableError(
                f"no good state is kept: {self.why_none or 'the run was not healthy since its beginning'}"
            )
        chosen = next((s for s in reversed(self._states) if s.step <= command.to_step), self._states[0])
        self._put_back(chosen)
        del self._states[self._states.index(chosen) + 1 :]
        self._scale(command.rate_factor)
        return Rewound(
            step=step, to_step=chosen.step, rate_factor=command.rate_factor, rates=self._trunk.rates()
        )

    def set_rate(self, command: SetLearningRate, step: int) -> RateSet:
        """Multiply the rates, for good.

        Raises:
            NotExecutableError: A schedule that is not ours to change would set them back.
        """
        if command.card is not None and (why := why_no_rate(self._trunk)):
            raise NotExecutableError(why)
        self._scale(command.factor)
        return RateSet(
            step=step, factor=command.factor, rates=self._trunk.rates(), why=command.why, card=command.card
        )

    def set_clip(self, command: SetClip, step: int) -> ClipSet:
        """Cap the gradient norm, or lift the cap; a card's clipping stays, and replaces the user's own where that is laxer."""
        trunk = self._trunk
        if command.card is None:
            trunk.cap_norm = command.norm
        elif command.norm is not None:
            trunk.clip_norm = command.norm if trunk.clip_norm is None else min(trunk.clip_norm, command.norm)
        return ClipSet(step=step, norm=command.norm, why=command.why, card=command.card)

    # Norm statistics.

    def mend(self) -> int:
        """Undo what a batch whose step was left out did to running norm statistics.

        The forward pass has updated them before anything could be known. A layer whose statistics are not finite, or far from those
        of the last good state, gets those back. Returns the layers mended.
        """
        return mend(self._trunk.model, self._states[-1].weights) if self._states else 0

    def _put_back(self, state: GoodState) -> None:
        trunk = self._trunk
        trunk.model.load_state_dict(state.weights)
        # Copied, since an optimizer goes on in the very tensors that it is given; rates and the rest are those of now.
        groups = trunk.optimizer.state_dict()["param_groups"]
        trunk.optimizer.load_state_dict({"state": copy.deepcopy(state.optimizer), "param_groups": groups})
        if trunk.averages is not None:
            if state.averages is None:
                trunk.averages.restart()
            else:
                now = {"last_step": trunk.step, "every": trunk.averages.every}
                trunk.averages.load_state_dict({**state.averages, **now})
        for parameter in trunk.parameters:
            parameter.grad = None

    def _scale(self, factor: float) -> None:
        for group in self._trunk.optimizer.param_groups:
            scale_rates(group, factor)
        if self._trunk.scheduler is not None:
            scale_schedule(self._trunk.scheduler, factor)


def why_no_rate(trunk: Trunk) -> str | None:
    """Say why changed rates would not last; None where they do."""
    if trunk.scheduler is None and any("initial_lr" in group for group in trunk.optimizer.param_groups):
        return (
            "a learning-rate scheduler drives the optimizer and automode was not given it, so that it would set the rates back; "
            "give it as scheduler="
        )
    return None


def _copied(value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), value)


def _finite(weights: Mapping[str, Tensor]) -> bool:
    floats = [t.detach() for t in weights.values() if t.is_floating_point() and t.numel()]
    if not floats:
        return True
    return all(bool(torch.isfinite(norm)) for norm in torch._foreach_norm(floats))  # noqa: SLF001  # no public name


def _mebibytes(value: Any) -> float:
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    map_tensors(count, value)
    return total / 2**20
