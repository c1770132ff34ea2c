"""Label noise: how much there probably is, which samples it probably is, and when nobody can tell.

The rate comes from held-out predictions. Confident learning (Northcutt et al. 2021, arXiv:1911.00068) counts the samples whose
label disagrees with a class that the network holds for them with more than that class's usual confidence; where the task is hard, that
counts the network's own mistakes too. Wrong labels contradict its surest answers as often as its others, and its mistakes do not: where
the surest answers for each class are contradicted less than half as often, their share counts. The suspects are the
samples of lowest mean margin (area under the margin, Pleiss et al. 2020, arXiv:2001.10528), cross-examined by the labels of their
nearest neighbours in feature space. Where the two witnesses disagree on most suspects, the answer is "cannot tell".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import NearestNeighbors

from automode.trainer.one_thread import one_thread

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NEIGHBOURS = 10
PRUDENCE = 0.85
"""Share of the estimated rate that is called suspect: too many cost about twice as much as too few."""

SUREST = 0.25
"""Share of the answers for a class that counts as its surest."""

MOSTLY = 0.5
"""Share of the estimate that the surest answers have to bear out."""

LEAST_AGREEMENT = 0.5
LEAST_RATE = 0.02
"""Below this rate an estimate is not told from none."""

LEAST_SAMPLES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseEvidence:
    """What is known of label noise.

    Attributes:
        rate: Estimated share of wrong labels, 0 to 1; None: cannot tell.
        suspects: Ids of the probably mislabelled samples, most suspect first.
        why: In words.
    """

    rate: float | None
    suspects: Ids
    why: str


NEXT_SYMBOL = NoiseEvidence(
    rate=None,
    suspects=np.empty(0, dtype=np.int64),
    why="the classes are the symbols that the inputs are written in: what follows them is open, and nobody can tell it from a wrong label",
)
"""What is known of labels that are the next symbol of a text (:mod:`automode.trainer.symbols`)."""


def confident_rate(probabilities: Floats, labels: npt.NDArray[np.int64]) -> float | None:
    """Estimate the share of wrong labels from held-out class probabilities.

    Args:
        probabilities: [n, C], of a network that did not train on these samples.
        labels: [n].

    Returns:
        The off-diagonal mass of the confident joint; None with fewer than 50 samples or a single class.
    """
    n, classes = probabilities.shape
    if n < LEAST_SAMPLES or np.unique(labels).size < 2:
        return None
    threshold = np.full(classes, np.inf)
    for c in range(classes):
        mine = labels == c
        if mine.any():
            threshold[c] = probabilities[mine, c].mean()
    confident = np.where(probabilities >= threshold, probabilities, -np.inf)
    known = np.isfinite(confident).any(axis=1)
    if not known.any():
        return None
    believed = confident[known].argmax(axis=1)
    return float((believed != labels[known]).mean())


def surest_rate(probabilities: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Estimate the share of wrong labels from the surest quarter of the held-out answers for each class.

    By class, because wrong labels that are confined to some classes make the answers for these unsure, so that the surest answers of all
    would be those for others.

    Args:
        probabilities: [n, C], of a network that did not train on these samples; n > 0.
        labels: [n].
    """
    answers = probabilities.argmax(axis=1)
    surest = []
    for answer in np.unique(answers):
        mine = np.flatnonzero(answers == answer)
        order = np.argsort(-probabilities[mine, answer], kind="stable")
        surest.append(mine[order[: ceil(SUREST * mine.size)]])
    kept = np.concatenate(surest)
    return float((answers[kept] != labels[kept]).mean())


def noise_rate(probabilities: Floats, labels: npt.NDArray[np.int64]) -> float | None:
    """Estimate the share of wrong labels: :func:`confident_rate`, unless most of that are the network's own mistakes.

    Where the surest answers are contradicted less than half as often, what contradicts the others is not wrong labels, and
    :func:`surest_rate` counts.

    Args:
        probabilities: [n, C], of a network that did not train on these samples.
        labels: [n].

    Returns:
        In [0, 1]; None with fewer than 50 samples or a single class.
    """
    rate = confident_rate(probabilities, labels)
    if rate is None:
        return None
    surest = surest_rate(probabilities, labels)
    return surest if surest < MOSTLY * rate else rate


def nearest(around: Floats, features: Floats, k: int) -> Ids:
    """Return the positions of the k nearest rows of ``around`` (or all, where there are fewer) for each row of ``features``."""
    with one_thread():
        index = NearestNeighbors(n_neighbors=min(k, around.shape[0])).fit(around)
        found = index.kneighbors(features, return_distance=False)
    return np.asarray(found, dtype=np.int64)


def neighbour_disagreement(features: Floats, labels: npt.NDArray[np.int64], k: int = NEIGHBOURS) -> Floats:
    """Return, for each sample, the share of its k nearest neighbours (itself left out) that carry another label."""
    k = min(k, features.shape[0] - 1)
    if k < 1:
        return np.zeros(features.shape[0])
    with one_thread():
        index = NearestNeighbors(n_neighbors=k + 1).fit(features)
        neighbours = index.kneighbors(features, return_distance=False)[:, 1:]
    return np.asarray((labels[neighbours] != labels[:, None]).mean(axis=1), dtype=np.float64)


def weigh(
    *,
    rate: float | None,
    ids: Ids,
    margins: Floats,
    probe: Ids,
    disagreement: Floats | None,
) -> NoiseEvidence:
    """Name the suspects, or say that nobody can tell.

    Args:
        rate: :func:`noise_rate` on held-out data.
        ids: Samples that training has seen.
        margins: Their mean margins (AUM); low is suspect.
        probe: Samples whose neighbours were asked.
        disagreement: :func:`neighbour_disagreement` of the probe; None where there are no features.
    """
    none = np.empty(0, dtype=np.int64)
    finite = np.isfinite(margins)
    if rate is None or not finite.any():
        return NoiseEvidence(
            rate=None, suspects=none, why="no held-out class probabilities to estimate label noise from"
        )
    if rate < LEAST_RATE:
        return NoiseEvidence(
            rate=rate, suspects=none, why=f"estimated label noise {rate:.1%}: none worth naming"
        )
    ids, margins = ids[finite], margins[finite]
    order = np.argsort(margins, kind="stable")
    suspects = ids[order[: round(PRUDENCE * rate * ids.size)]]
    if disagreement is None or suspects.size == 0:
        return NoiseEvidence(
            rate=None, suspects=suspects, why="no features to cross-examine the suspects with"
        )
    asked = np.isin(probe, suspects)
    if asked.sum() < NEIGHBOURS:
        return NoiseEvidence(
            rate=None, suspects=suspects, why=f"only {int(asked.sum())} suspects have been cross-examined"
        )
    agree = float((disagreement[asked] >= 0.5).mean())
    if agree < LEAST_AGREEMENT:
        return NoiseEvidence(
            rate=None,
            suspects=suspects,
            why=f"the neighbours of {1 - agree:.0%} of the suspects agree with their labels: hard or wrong, nobody can tell",
        )
    return NoiseEvidence(
        rate=rate, suspects=suspects, why=f"estimated label noise {rate:.1%}, {suspects.size} suspects"
    )


def probabilities_of(outputs: list[Any]) -> Floats | None:
    """Softmax of class scores [n, C]; None where the outputs are none."""
    import torch

    if not outputs or not all(
        isinstance(o, torch.Tensor) and o.dim() == 2 and o.shape[1] > 1 for o in outputs
    ):
        return None
    return np.asarray(torch.softmax(torch.cat(outputs).double(), dim=1).cpu().numpy(), dtype=np.float64)
