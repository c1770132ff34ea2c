"""A second look at labels that may be wrong, through the average of the trunk's weights.

The ledger's margins are free, and they are what the raw weights of each moment said: differences of two logits, whose scale is another
for each sample. Where a card is about to be made, the average is asked
of every sample instead: its probability of the label less that of its best other class, between -1 and 1, of logits that are halved.

An average that has learnt wrong labels by heart says nothing of them any more, while the margins of its first visits still do. It
contradicts fewer labels of the training data than of held-out data then, and is not believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from automode.merges.batches import training_flags_kept
from automode.trainer.noise import noise_rate, probabilities_of
from automode.trainer.random_state import forked_rng
from automode.trainer.sample_source import READ_BATCH, Ids, SampleSource
from automode.trainer.states import States
from automode.trainer.tasks import margins
from automode.trainer.trunk import Trunk

AVERAGE: Final = "ema3"
"""The average of the weights that answers, where the trunk keeps averages: the one of the shortest memory."""

MOST_ASKED: Final = 65_536
"""Samples, at the most, of which it is asked: they are read one after another, in the training process."""

TEMPERATURE: Final = 2.0
"""What the logits are divided by. Of labels that are wrong in pairs, probabilities at 1 tell most; of those that are wrong at random, the
logits themselves; at 2 little of either is lost (decision 39)."""

LEAST_CONTRADICTED: Final = 0.85
"""Share of training labels that the average contradicts, as a multiple of that of held-out labels, below which it knows them by heart."""

Floats = npt.NDArray[np.float64]


def average_of(trunk: Trunk, states: States) -> tuple[nn.Module, float] | None:
    """Return a copy of the trunk's network with its short average in it, and the sample passes that took.

    None where the trunk keeps no averages, or has not updated them yet.
    """
    averages = trunk.averages
    if averages is None or averages.updates == 0:
        return None
    model = states.shell()
    return model, float(states.put(model, trunk.candidates()[AVERAGE], averaged=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the average says.

    Attributes:
        by_heart: Whether it has learnt wrong labels by heart, so that its margins tell nothing.
        rate: Estimated share of wrong labels among held-out samples (:func:`~automode.trainer.noise.noise_rate`).
        margins: Probability of the label less the best other one, of halved logits, for each sample asked of, in [-1, 1].
        passes: Sample passes that it took.
    """

    by_heart: bool
    rate: float
    margins: Floats
    passes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondLook:
    """Asks the trunk's average.

    Attributes:
        trunk: The run.
        states: Loads averaged weights into a copy of its network.
        source: Training samples by id.
        val_a: A fresh pass over val-A; None where there is none, and nothing is asked then.
    """

    trunk: Trunk
    states: States
    source: SampleSource
    val_a: Callable[[], Iterable[Any]] | None

    def take(self, ids: Ids) -> Seen | None:
        """Ask of the held-out samples and of some training samples; None where there is no average, or no answer in classes.

        Args:
            ids: Training samples, with the labels that the data give them.
        """
        if self.val_a is None or not 0 < ids.size <= MOST_ASKED:
            return None
        found = average_of(self.trunk, self.states)
        if found is None:
            return None
        model, passes = found
        with forked_rng(), training_flags_kept(model), torch.no_grad():
            model.eval()
            outputs, targets = self._answers(model, self.val_a())
            probabilities = probabilities_of(outputs)
            if probabilities is None or not targets:
                return None
            labels = np.asarray(torch.cat(targets).cpu().numpy(), dtype=np.int64)
            rate = noise_rate(probabilities, labels)
            if rate is None:
                return None
            asked = self._margins(model, ids)
        contradicted = float((probabilities.argmax(axis=1) != labels).mean())
        return Seen(
            by_heart=float((asked <= 0.0).mean()) < LEAST_CONTRADICTED * contradicted,
            rate=rate,
            margins=asked,
            passes=passes + float(labels.size + ids.size),
        )

    def _answers(self, model: nn.Module, batches: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
        outputs, targets = [], []
        for batch in batches:
            _, out, target = self.trunk.step_fn(model, batch)
            outputs.append(out)
            targets.append(target)
        return outputs, targets

    def _margins(self, model: nn.Module, ids: Ids) -> Floats:
        """Batch by batch, since the probabilities of all samples together may be large."""
        found = []
        for start in range(0, ids.size, READ_BATCH):
            batch = self.source.batch(ids[start : start + READ_BATCH])
            _, out, target = self.trunk.step_fn(model, batch)
            found.append(
                margins(torch.softmax(out.float() / TEMPERATURE, dim=1), target).double().cpu().numpy()
            )
        return np.concatenate(found)
