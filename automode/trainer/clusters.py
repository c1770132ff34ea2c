"""Residual clusters: which regions of feature space lose more than the rest, and whether they are there from scan to scan."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, silhouette_score
from threadpoolctl import threadpool_limits

Features = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

CANDIDATES = (2, 3, 4, 5, 6)
SILHOUETTE_ROWS = 256
SMALLEST_SHARE = 0.02
STARTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """A k-means partition that can be applied to other samples.

    Attributes:
        centroids: [k, d], in standardised features.
        mean: [d], of the features clustered.
        scale: [d], their standard deviations, 1 where a feature is constant.
        labels: [n], of the samples clustered.
    """

    centroids: Features
    mean: Features
    scale: Features
    labels: Labels

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


def fit_clusters(features: Features, *, seed: int) -> Clusters | None:
    """Partition samples; k is the one of 2 to 6 with the best silhouette whose clusters are all large enough.

    Args:
        features: [n, d].
        seed: Of the starts and of the silhouette's subsample.

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
    best: tuple[float, Any] | None = None
    # One thread, so that the sums and with them the partition do not depend on the machine's load.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for k in CANDIDATES:
            fitted = KMeans(n_clusters=k, n_init=STARTS, random_state=seed & 0x7FFFFFFF).fit(standard)
            sizes = np.bincount(fitted.labels_, minlength=k)
            if sizes.min() < max(2, SMALLEST_SHARE * n):
                continue
            score = silhouette_score(
                standard,
                fitted.labels_,
                sample_size=min(n, SILHOUETTE_ROWS),
                random_state=seed & 0x7FFFFFFF,
            )
            if best is None or score > best[0]:
                best = (float(score), fitted)
    if best is None:
        return None
    labels = np.asarray(best[1].labels_, dtype=np.int64)
    return Clusters(
        centroids=np.asarray(best[1].cluster_centers_, dtype=np.float64),
        mean=mean,
        scale=scale,
        labels=labels,
    )


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
