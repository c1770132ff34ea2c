"""Residual clusters: which regions of feature space lose more than the rest, and whether they are there from scan to scan.

How many regions there are is judged on held-out samples: a Gaussian mixture is fitted from each partition (diagonal covariances,
a few steps of EM), and the one under which features that it has not seen are likelier wins. A silhouette finds too few (two, mostly).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from sklearn.metrics import adjusted_rand_score

from automode.trainer.one_thread import one_thread
from automode.trainer.partitions import Features, Labels, k_means, mixture_scores

CANDIDATES = (3, 6)
SMALLEST_SHARE = 0.02
STARTS = 8
"""Partitions of which the tightest is taken: on digits, with 2 they agreed from scan to scan by .77, with 8 by .85, with 16 by .87."""

LEAST_HELD_OUT = 32
CHANGE_Z = 2.0
"""Standard errors by which another number of clusters must be likelier before it takes the place of the scan before's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """A k-means partition that can be applied to other samples.

    Attributes:
        centroids: [k, d], in standardised features.
        mean: [d], of the features clustered.
        scale: [d], their standard deviations, 1 where a feature is constant.
        labels: [n], of the samples clustered.
        likelihoods: Mean held-out log-likelihood a sample by number of clusters, of each number that was compared.
    """

    centroids: Features
    mean: Features
    scale: Features
    labels: Labels
    likelihoods: Mapping[int, float] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """How many clusters."""
        return int(self.centroids.shape[0])

    def assign(self, features: Features) -> Labels:
        """Return the nearest centroid of each row of ``features`` [n, d]."""
        standard = (features - self.mean) / self.scale
        distance = ((standard[:, None, :] - self.centroids[None]) ** 2).sum(axis=2)
        return np.asarray(distance.argmin(axis=1), dtype=np.int64)

    def packed(self) -> Features:
        """One array [k + 2, d] for the artifact store: mean, scale, centroids."""
        return np.concatenate([self.mean[None], self.scale[None], self.centroids])

    @classmethod
    def unpacked(cls, array: Features) -> Clusters:
        """Rebuild from :meth:`packed`; the labels of the samples clustered are not kept."""
        return cls(mean=array[0], scale=array[1], centroids=array[2:], labels=np.empty(0, dtype=np.int64))


def fit_clusters(
    features: Features, *, seed: int, held_out: Features | None = None, before: int | None = None
) -> Clusters | None:
    """Partition samples; k is the one of 3 and 6 that makes held-out samples likelier, of those whose clusters are all large enough.

    Args:
        features: [n, d].
        seed: Of the starts, and of which samples are set aside.
        held_out: [m, d], features that the network did not train on; None, or fewer than 32: every fourth of ``features`` is set aside
            while k is chosen.
        before: k of the scan before; another takes its place where it is likelier by two standard errors.

    Returns:
        The clusters; None where there are too few samples, features that are not finite (a network that has
        diverged), or no k that leaves every cluster 2 % of the samples.
    """
    n = features.shape[0]
    if n < 4 * max(CANDIDATES) or not np.isfinite(features).all():
        return None
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-12 * np.maximum(1.0, np.abs(mean)), scale, 1.0)
    standard = (features - mean) / scale
    found: dict[int, tuple[Features, Labels]] = {}
    with one_thread():
        for k in CANDIDATES:
            centres, labels = k_means(standard, k, starts=STARTS, seed=seed)
            if np.bincount(labels, minlength=k).min() >= max(2, SMALLEST_SHARE * n):
                found[k] = centres, labels
        if not found:
            return None
        known = None if held_out is None else (held_out - mean) / scale
        scores = {k: _held_out_scores(standard, known, labels, seed) for k, (_, labels) in found.items()}
    k = _likeliest(scores, before)
    centres, labels = found[k]
    return Clusters(
        centroids=centres,
        mean=mean,
        scale=scale,
        labels=labels,
        likelihoods={k: float(values.mean()) for k, values in scores.items()},
    )


def _held_out_scores(standard: Features, held_out: Features | None, labels: Labels, seed: int) -> Features:
    """Log-likelihood of each held-out sample under a mixture that starts from a partition."""
    if held_out is None or len(held_out) < LEAST_HELD_OUT or not np.isfinite(held_out).all():
        aside = np.zeros(len(standard), dtype=np.bool_)
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0xA51DE]))
        aside[rng.permutation(len(standard))[: len(standard) // 4]] = True
        standard, held_out, labels = standard[~aside], standard[aside], labels[~aside]
    return mixture_scores(standard, labels, held_out)


def _likeliest(scores: Mapping[int, Features], before: int | None) -> int:
    best = max(scores, key=lambda k: float(scores[k].mean()))
    if before is None or before not in scores or before == best:
        return best
    gain = scores[best] - scores[before]
    return best if gain.mean() > CHANGE_Z * gain.std(ddof=1) / np.sqrt(gain.size) else before


def agreement(before: Labels | None, now: Labels) -> float | None:
    """Adjusted Rand index of two partitions of the same samples: 1 the same, 0 no better than chance."""
    if before is None or before.size != now.size:
        return None
    return float(adjusted_rand_score(before, now))


def losses_by_cluster(
    labels: Labels, losses: npt.NDArray[np.float64], keep: npt.NDArray[np.bool_], k: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean loss, its standard error) of each cluster over the samples to keep; NaN where there are none."""
    means, errors = [], []
    for cluster in range(k):
        mine = losses[(labels == cluster) & keep & np.isfinite(losses)]
        means.append(float(mine.mean()) if mine.size else float("nan"))
        errors.append(float(mine.std(ddof=1) / np.sqrt(mine.size)) if mine.size > 1 else float("nan"))
    return tuple(means), tuple(errors)
