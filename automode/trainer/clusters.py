"""Residual clusters: which regions of feature space lose more than the rest, and whether they are there from scan to scan.

How many regions there are is judged on held-out samples: a Gaussian mixture is fitted from each partition (diagonal covariances,
a few steps of EM), and the one under which features that it has not seen are likelier wins. A silhouette finds too few (two, mostly).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

Features = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

CANDIDATES = (3, 6)
SMALLEST_SHARE = 0.02
STARTS = 8
"""Partitions of which the tightest is taken: on digits, with 2 they agreed from scan to scan by .77, with 8 by .85, with 16 by .87."""

FLOOR = 1e-3
"""Least variance of a mixture's component, in standardised features."""

MOST_ROUNDS = 20
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
    found: dict[int, Any] = {}
    # One thread, so that the sums and with them the partition do not depend on the machine's load.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for k in CANDIDATES:
            fitted = KMeans(n_clusters=k, n_init=STARTS, random_state=seed & 0x7FFFFFFF).fit(standard)
            sizes = np.bincount(fitted.labels_, minlength=k)
            if sizes.min() >= max(2, SMALLEST_SHARE * n):
                found[k] = fitted
        if not found:
            return None
        known = None if held_out is None else (held_out - mean) / scale
        scores = {k: _held_out_scores(standard, known, fitted.labels_, seed) for k, fitted in found.items()}
    k = _likeliest(scores, before)
    return Clusters(
        centroids=np.asarray(found[k].cluster_centers_, dtype=np.float64),
        mean=mean,
        scale=scale,
        labels=np.asarray(found[k].labels_, dtype=np.int64),
        likelihoods={k: float(values.mean()) for k, values in scores.items()},
    )


def _held_out_scores(standard: Features, held_out: Features | None, labels: Labels, seed: int) -> Features:
    """Log-likelihood of each held-out sample under a mixture that starts from a partition."""
    if held_out is None or len(held_out) < LEAST_HELD_OUT or not np.isfinite(held_out).all():
        aside = np.zeros(len(standard), dtype=np.bool_)
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0xA51DE]))
        aside[rng.permutation(len(standard))[: len(standard) // 4]] = True
        standard, held_out, labels = standard[~aside], standard[aside], labels[~aside]
    k = int(labels.max()) + 1
    inside = np.eye(k)[labels]
    counts = np.maximum(inside.sum(axis=0), 1.0)
    means = inside.T @ standard / counts[:, None]
    variances = np.maximum(inside.T @ standard**2 / counts[:, None] - means**2, FLOOR)
    mixture = GaussianMixture(
        k,
        covariance_type="diag",
        reg_covar=FLOOR,
        max_iter=MOST_ROUNDS,
        weights_init=counts / counts.sum(),
        means_init=means,
        precisions_init=1.0 / variances,
        random_state=seed & 0x7FFFFFFF,
    ).fit(standard)
    return np.asarray(mixture.score_samples(held_out), dtype=np.float64)


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
