"""Held-out data behind a function of the user's: nobody else knows what a batch is, and samples are judged one by one all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from automode.errors import DataError, UsageError
from automode.merges.batches import training_flags_kept
from automode.trainer.evaluation import Evaluator, Floats, Ids, Part, PerSampleScores
from automode.trainer.heldout import HeldOut, halves
from automode.trainer.random_state import seeded_rng

Losses = Callable[[nn.Module, Ids], Any]
"""A model and numbers of held-out samples [n] to the loss of each [n]: a tensor, an array or a list."""


class HeldOutFunction(HeldOut):
    """Held-out samples that are known by number alone, in two halves.

    Args:
        samples: How many there are; their ids are 0 and on.
        seed: Of the split.
    """

    readable = False

    def __init__(self, samples: int, seed: int) -> None:
        self.reason: str | None = None
        self.ids: Ids = np.arange(samples, dtype=np.int64)
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0xA]))
        self._in_a = halves(np.zeros(samples, dtype=np.int64), rng)

    def batches(self, part: Part | None) -> Iterator[tuple[Any, Ids]]:
        """Refuse to read batches.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "val is a function, so that held-out samples are known by number alone; give slices as lists of numbers, or val as a "
            "loader"
        )

    def chosen(self, part: Part | None) -> Ids:
        """Ids of a half, or of all."""
        return self.ids if part is None else self.ids[self._in_a == (part == "A")]


@dataclass(slots=True, kw_only=True)
class FunctionEvaluator(Evaluator):
    """Scores networks by the user's function; the utility of a sample is minus its loss.

    Attributes:
        losses: The function.
        held_out: The samples.
        seed: Of what the function draws at random: the same for every network.
    """

    losses: Losses
    held_out: HeldOutFunction
    seed: int

    def scores(
        self, model: nn.Module, part: Part | None, see: Callable[[Any, Any], None] | None = None
    ) -> PerSampleScores:
        """Score a network on one half, or on all samples for ``None``; evaluation mode, no gradients.

        Raises:
            DataError: The function gave something else than a loss for each sample, or somebody wants to see outputs.
        """
        if see is not None:
            unread()
        ids = self.held_out.chosen(part)
        with seeded_rng(self.seed), training_flags_kept(model), torch.no_grad():
            model.eval()
            loss = _array(self.losses(model, ids.copy()), ids.size)
        return PerSampleScores(ids=ids, loss=loss, utility=-loss)

    def settle(self, model: nn.Module) -> None:
        """Nothing is left to settle: the function measures alike every time."""


def unread(*_: Any, **__: Any) -> NoReturn:
    """Stand for the forward pass on a held-out batch, of which there are none.

    Raises:
        DataError: Always.
    """
    raise DataError("val is a function, and there are no held-out batches to read")


def _array(given: Any, n: int) -> Floats:
    if isinstance(given, Tensor):
        given = given.detach().double().cpu().numpy()
    try:
        values = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"val gave a {type(given).__name__}, but must give the loss of each sample ({error})"
        ) from None
    if values.shape != (n,):
        raise DataError(
            f"val gave values of shape {values.shape} for {n} samples, but must give one loss for each"
        )
    return values
