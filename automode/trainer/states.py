"""From a reference to a network: a checkpoint, and which of its raw weights and averages is meant."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from automode.errors import SessionCorruptError
from automode.merges.norm_statistics import norm_layers, recompute
from automode.planner.events import Weights
from automode.trainer.random_state import seeded_rng
from automode.trainer.stored_states import Checkpoints
from automode.trainer.trunk import Trunk, model_copy_of

REFRESH_SEED = 0
"""Of what training data draw at random while norm statistics are refreshed."""


class States:
    """Loads candidates into copies of the trunk's network.

    Args:
        trunk: The run.
        checkpoints: Durable states.
        refresh: Gives a fresh pass over a few training batches, for running norm statistics of averaged weights.
    """

    def __init__(self, trunk: Trunk, checkpoints: Checkpoints, refresh: Callable[[], Iterable[Any]]) -> None:
        self._trunk = trunk
        self._checkpoints = checkpoints
        self._refresh = refresh

    def shell(self) -> nn.Module:
        """A copy of the trunk's network, to load states into.

        Raises:
            NotExecutableError: It cannot be copied.
        """
        return model_copy_of(self._trunk)

    def load(self, reference: Weights) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state dict that a reference means, norm statistics as stored, and the rest of its checkpoint.

        Raises:
            SessionCorruptError: The checkpoint lacks the average that is named.
        """
        weights, rest, _ = self._checkpoints.load(reference.checkpoint)
        match reference.choice:
            case "raw":
                return weights, rest
            case "ema" if "ema" in rest:
                return weights | rest["ema"], rest
            case choice if self._trunk.averages is not None and "averages" in rest:
                averages = copy.deepcopy(self._trunk.averages)
                averages.load_state_dict(rest["averages"])
                candidates = averages.candidates(weights)
                if choice in candidates:
                    return candidates[choice], rest
        raise SessionCorruptError(
            f"checkpoint {reference.checkpoint[:19]} holds no {reference.choice!r} weights; it cannot be judged"
        )

    def candidates(self, checkpoint: str) -> dict[str, dict[str, Tensor]]:
        """The raw weights of a checkpoint, and its averages where it holds any and the trunk keeps such.

        Raises:
            SessionError: It cannot be read.
        """
        weights, rest, _ = self._checkpoints.load(checkpoint)
        if self._trunk.averages is None or "averages" not in rest:
            return {"raw": weights}
        averages = copy.deepcopy(self._trunk.averages)
        averages.load_state_dict(rest["averages"])
        return {"raw": weights} | (averages.candidates(weights) if averages.updates else {})

    def put(self, model: nn.Module, state: Mapping[str, Tensor], *, averaged: bool) -> int:
        """Load a state into a network; averaged weights get norm statistics of their own. Returns the samples that took.

        What the training data draw at random (augmentation) is the same each time, and leaves no trace.
        """
        model.load_state_dict(state)
        if averaged and norm_layers(model):
            with seeded_rng(REFRESH_SEED):
                return recompute(model, self._refresh(), forward=self._forward)
        return 0

    def model(self, reference: Weights) -> tuple[nn.Module, dict[str, Any], int]:
        """Return (network, rest of the checkpoint, sample passes) of a reference."""
        model = self.shell()
        state, rest = self.load(reference)
        passes = self.put(model, state, averaged=reference.choice != "raw")
        return model, rest, passes

    def _forward(self, model: nn.Module, batch: Any) -> Tensor:
        _, outputs, _ = self._trunk.step_fn(model, batch)
        return outputs if isinstance(outputs, Tensor) else outputs[0]
