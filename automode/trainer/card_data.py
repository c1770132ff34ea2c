"""What a card's trials train on: which samples, and with which labels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from automode.planner.metrics import Metric
from automode.planner.recipes import TrainingRecipe
from automode.planner.variants import ANNEALED_CONTROL, EarlyStopping, Variant
from automode.trainer.new_labels import NewLabels
from automode.trainer.sample_source import Ids


def _no_ids() -> Ids:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardData:
    """What a card's trials train on.

    Attributes:
        recipe: The card's training recipe.
        selected: Ids to specialise on.
        others: Ids to replay from.
        entropy: Seed material of the card; trials that train on the same samples see the same batches.
        step: The trunk's step at the fork.
        left_out: Ids that no batch may hold, nor those of the trunk once the card is adopted; none that the trunk left out before.
        trunk_labels: New labels that the trunk trained with at the fork.
        new_labels: The card's own, for the variants that take them; a sample that was left out comes back with its label.
        chosen: Of these samples, the ids that belong to the selection.
        metric: What trials are judged by on val-A.
        parts: Of each trial, the ids that it specialises on; empty: all of them on ``selected``.
    """

    recipe: TrainingRecipe
    selected: Ids
    others: Ids
    entropy: tuple[int, ...]
    step: int
    left_out: Ids = field(default_factory=_no_ids)
    trunk_labels: NewLabels = field(default_factory=NewLabels.none)
    new_labels: NewLabels = field(default_factory=NewLabels.none)
    chosen: Ids = field(default_factory=_no_ids)
    metric: Metric = "utility"
    parts: tuple[Ids, ...] = ()

    def pools(self, variant: Variant, trial: int = 0) -> tuple[Ids, Ids]:
        """Return (ids to specialise on, ids to replay from) of a trial, each ascending."""
        if variant == ANNEALED_CONTROL:  # whatever the card selects and leaves out
            return np.union1d(np.union1d(self.selected, self.others), self.left_out), _no_ids()
        if self.parts:
            everything = np.union1d(self.selected, self.others)
            return self.parts[trial], np.setdiff1d(everything, self.parts[trial])
        if variant.labels == "keep" or not self.new_labels.size:
            return self.selected, self.others
        back = np.intersect1d(self.left_out, self.new_labels.ids)
        return (
            np.union1d(self.selected, np.intersect1d(back, self.chosen)),
            np.union1d(self.others, np.setdiff1d(back, self.chosen)),
        )

    def patience(self, variant: Variant) -> EarlyStopping | None:
        """Return when a variant stops early; a control never does."""
        return None if variant == ANNEALED_CONTROL else self.recipe.early_stopping

    def labels(self, source: str) -> NewLabels:
        """Return the labels that replace the data's own, where variants train with ``keep`` or ``relabel``."""
        return self.new_labels.over(self.trunk_labels) if source == "relabel" else self.trunk_labels

    def stays_out(self, source: str) -> Ids:
        """Return the ids that no batch holds, likewise."""
        return np.setdiff1d(self.left_out, self.new_labels.ids) if source == "relabel" else self.left_out
