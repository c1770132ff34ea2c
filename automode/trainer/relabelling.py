"""Where a card's new labels come from: the network and the nearest other samples, asked once as the card begins, or a person."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
from torch import nn

from automode.errors import NotExecutableError
from automode.planner.recipes import Relabel, RelabelGiven, RelabelPredicted
from automode.trainer.embedding import embeddings
from automode.trainer.new_labels import NewLabels
from automode.trainer.noise import nearest, probabilities_of
from automode.trainer.sample_source import READ_BATCH, Ids, SampleSource
from automode.trainer.scanning import labels_of
from automode.trainer.second_look import average_of
from automode.trainer.states import States
from automode.trainer.trunk import Trunk

MOST_WITNESSES = 4096
"""Samples, at the most, among which the nearest are looked for."""

LEAST_VOTES = 0.5
"""Whatever a card asks for, at least half of the neighbours must have a new label: fewer are no majority."""

NO_CLASSES = "labels are replaced where a network gives a score for each class and targets are whole numbers, one a sample"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What network and neighbours say of some samples.

    Attributes:
        given: The label that each has now.
        suggested: The class of the network's highest score.
        votes: Share of the nearest other samples that are labelled so, 0 to 1.
        agreement: Share of them that are labelled as the sample is.
        passes: Sample passes that asking took.
    """

    given: Ids
    suggested: Ids
    votes: Floats
    agreement: Floats
    passes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Relabeller:
    """Finds new labels.

    Attributes:
        trunk: The run.
        states: Loads averaged weights into a copy of its network.
        source: Training samples by id.
        seed: Of the choice of witnesses, and of the projection of wide features.
    """

    trunk: Trunk
    states: States
    source: SampleSource
    seed: int

    def find(self, recipe: Relabel, excluded: Ids, witnesses: Ids) -> tuple[NewLabels, float]:
        """Find the new labels that a card asks for.

        Args:
            recipe: Where they come from.
            excluded: Samples that may get one by prediction.
            witnesses: Samples whose labels are believed.

        Returns:
            The labels, and the sample passes that finding them took.

        Raises:
            NotExecutableError: The targets are no classes, or a given label is none of them.
        """
        match recipe:
            case RelabelGiven():
                return self._given(recipe, witnesses)
            case RelabelPredicted():
                if not excluded.size or not witnesses.size:
                    return NewLabels.none(), 0.0
                answer = self.ask(excluded, witnesses, recipe.neighbours)
                sure = answer.votes >= max(recipe.confidence, LEAST_VOTES)
                return NewLabels.of(excluded[sure], answer.suggested[sure]), answer.passes
            case _:
                assert_never(recipe)

    def ask(self, asked: Ids, witnesses: Ids, neighbours: int) -> Answer:
        """Ask network and neighbours for the class of some samples.

        Args:
            asked: The samples, at least one.
            witnesses: Samples to find the nearest among, at least one; a sample is no witness of its own.
            neighbours: How many of the nearest count.

        Raises:
            NotExecutableError: The targets are no classes.
        """
        model, passes = average_of(self.trunk, self.states) or (self.trunk.model, 0.0)
        witnesses = self._some(np.setdiff1d(witnesses, asked))
        around, _, beside = self._read(model, witnesses)
        features, outputs, given = self._read(model, asked)
        probabilities = probabilities_of(outputs)
        if probabilities is None or beside is None or given is None:
            raise NotExecutableError(NO_CLASSES)
        near = beside[nearest(around, features, neighbours)]
        suggested = probabilities.argmax(axis=1)
        return Answer(
            given=given,
            suggested=suggested.astype(np.int64),
            votes=(near == suggested[:, None]).mean(axis=1),
            agreement=(near == given[:, None]).mean(axis=1),
            passes=passes + float(asked.size + witnesses.size),
        )

    def _some(self, witnesses: Ids) -> Ids:
        if witnesses.size <= MOST_WITNESSES:
            return witnesses
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0x3E1]))
        return np.sort(rng.choice(witnesses, size=MOST_WITNESSES, replace=False))

    def _read(self, model: nn.Module, ids: Ids) -> tuple[Floats, list[Any], Ids | None]:
        """Read samples with the labels that the trunk trains them with."""
        features, outputs, targets = embeddings(model, self.trunk.step_fn, self._batches(ids), seed=self.seed)
        return features, outputs, labels_of(targets)

    def _batches(self, ids: Ids) -> Iterator[Any]:
        for start in range(0, ids.size, READ_BATCH):
            some = ids[start : start + READ_BATCH]
            yield self.trunk.relabelled.put(self.source.batch(some), some)

    def _given(self, recipe: RelabelGiven, witnesses: Ids) -> tuple[NewLabels, float]:
        labels = NewLabels.of(recipe.ids, recipe.labels)
        _, outputs, targets = self._read(self.trunk.model, witnesses[:1])
        probabilities = probabilities_of(outputs)
        if probabilities is None or targets is None:
            raise NotExecutableError(NO_CLASSES)
        classes = probabilities.shape[1]
        wrong = labels.labels >= classes
        if wrong.any():
            raise NotExecutableError(
                f"the label {labels.labels[wrong][0]} of sample {labels.ids[wrong][0]} is no class of this run: they go from 0 to "
                f"{classes - 1}"
            )
        return labels, 1.0


def packed(labels: NewLabels, chosen: Ids) -> Ids:
    """Put labels and the mark of those among the selected into one array, [n, 3], to be stored."""
    return np.column_stack([labels.packed(), np.isin(labels.ids, chosen)]).astype(np.int64)


def unpacked(rows: Any) -> tuple[NewLabels, Ids]:
    """Read what :func:`packed` gave: the labels, and the ids of those among the selected."""
    array = np.asarray(rows, dtype=np.int64)
    return NewLabels.unpacked(array), array[array[:, 2] == 1, 0]
