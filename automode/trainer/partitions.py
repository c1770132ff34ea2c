"""k-means from several starts at once, and how likely a mixture fitted from a partition finds other samples.

Both are small here (a thousand samples, 64 columns, 3 or 6 clusters), where a library spends most of its time around the arithmetic:
on checks of its inputs, and on one start after the other. All starts' distances are one matrix product.
"""

from __future__ import annotations

from math import log, pi
from typing import Any

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float64]
Coarse = npt.NDArray[np.float32]
Values = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]

MOST_MOVES = 300
STILL = 1e-4
"""A start is done where its centres together move by less than this (squared, in units of the features' mean variance)."""

FLOOR = 1e-3
"""Least variance of a mixture's component, in standardised features."""

MOST_ROUNDS = 20
SETTLED = 1e-3
"""The mixture is done where a round makes a sample likelier by less than this, in logarithms."""


def k_means(samples: Features, k: int, *, starts: int, seed: int) -> tuple[Features, Labels]:
    """Partition samples around k centres: the tightest of several starts (k-means++, Arthur and Vassilvitskii 2007; Lloyd 1982).

    The starts are compared and moved in single precision; the one that is taken ends in double.

    Args:
        samples: [n, d], finite; n at least k.
        k: How many clusters.
        starts: Partitions of which the tightest is taken.
        seed: Of the starts.

    Returns:
        Centres [k, d], and the nearest one of each sample [n]. A cluster may be empty where samples are alike.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, k, 0x3EA5]))
    coarse = samples.astype(np.float32)
    centres = _first_centres(coarse, k, starts, rng)
    still = STILL * float(samples.var(axis=0).mean())
    running = np.arange(starts)
    tightness = np.empty(starts)
    for _ in range(MOST_MOVES):
        labels, distances = _nearest(coarse, centres[:, running])
        tightness[running] = distances.sum(axis=1, dtype=np.float64)
        moved = _means(coarse, labels, centres[:, running])
        shift = ((moved - centres[:, running]) ** 2).sum(axis=(0, 2))
        centres[:, running] = moved
        running = running[shift > still]
        if not running.size:
            break
    best = centres[:, [int(tightness.argmin())]].astype(np.float64)
    best = _means(samples, _nearest(samples, best)[0], best).astype(np.float64)
    return best[:, 0], _nearest(samples, best)[0][0]


def _first_centres(samples: Coarse, k: int, starts: int, rng: np.random.Generator) -> Coarse:
    """[k, starts, d]: samples, each drawn in proportion to its squared distance from those before; the best of a few draws."""
    n, rows = len(samples), np.arange(starts)
    squares = (samples**2).sum(axis=1)
    trials = 2 + int(log(k))
    chosen = np.empty((k, starts), dtype=np.int64)
    chosen[0] = rng.integers(n, size=starts)
    closest = _squared(samples, squares, chosen[0])
    for place in range(1, k):
        sums = closest.cumsum(axis=1, dtype=np.float64)
        drawn = rng.random((starts, trials)) * sums[:, -1:]
        tried = np.stack([np.searchsorted(row, at) for row, at in zip(sums, drawn, strict=True)])
        tried = np.minimum(tried, n - 1)
        distances = _squared(samples, squares, tried.ravel()).reshape(starts, trials, n)
        nearer = np.minimum(closest[:, None, :], distances)
        best = nearer.sum(axis=2).argmin(axis=1)
        closest, chosen[place] = nearer[rows, best], tried[rows, best]
    return samples[chosen]


def _squared(samples: Coarse, squares: Coarse, chosen: Labels) -> Coarse:
    """Squared distances of all samples from some of them, [len(chosen), n]."""
    products = samples[chosen] @ samples.T
    return np.maximum(squares[chosen][:, None] - 2.0 * products + squares, 0.0)


def _nearest(samples: Values, centres: Values) -> tuple[Labels, Values]:
    """The nearest centre of each sample under each start, [starts, n], and its squared distance less the sample's own square."""
    k, starts, d = centres.shape
    distances = (-2.0 * centres.reshape(k * starts, d)) @ samples.T
    distances += (centres**2).sum(axis=2).reshape(k * starts, 1)
    distances = distances.reshape(k, starts, -1)
    nearest, labels = distances[0], np.zeros(distances.shape[1:], dtype=np.int64)
    for cluster in range(1, k):  # a fifth of what argmin along so short an axis takes
        labels[distances[cluster] < nearest] = cluster
        nearest = np.minimum(nearest, distances[cluster])
    return labels, nearest


def _means(samples: Values, labels: Labels, before: Values) -> Values:
    """The mean of each cluster's samples, [k, starts, d]; an empty cluster stays where it was."""
    k, starts, d = before.shape
    inside = (labels == np.arange(k)[:, None, None]).astype(samples.dtype).reshape(k * starts, -1)
    counts = inside.sum(axis=1)[:, None]
    means = (inside @ samples) / np.maximum(counts, 1.0)
    return np.where(counts.reshape(k, starts, 1) > 0, means.reshape(k, starts, d), before)


def mixture_scores(samples: Features, labels: Labels, others: Features) -> Features:
    """Log-likelihood of other samples under a Gaussian mixture with diagonal covariances that starts from a partition.

    Args:
        samples: [n, d], which it is fitted to by a few rounds of EM.
        labels: [n], from 0.
        others: [m, d].

    Returns:
        [m].
    """
    k = int(labels.max()) + 1
    squares = samples**2
    counts = np.bincount(labels, minlength=k)
    weights, means, variances = _fitted(samples, squares, np.eye(k)[labels], np.maximum(counts, 1.0), 0.0)
    reached = -np.inf
    for _ in range(MOST_ROUNDS):
        joint = _log_densities(samples, squares, means, variances) + np.log(weights)
        each = _log_sums(joint)
        inside = np.exp(joint - each[:, None])
        counts = inside.sum(axis=0) + 10 * np.finfo(np.float64).eps
        weights, means, variances = _fitted(samples, squares, inside, counts, FLOOR)
        before, reached = reached, float(each.mean())
        if abs(reached - before) < SETTLED:
            break
    joint = _log_densities(others, others**2, means, variances) + np.log(weights)
    return _log_sums(joint)


def _fitted(
    samples: Features, squares: Features, inside: Features, counts: Features, more: float
) -> tuple[Features, Features, Features]:
    """Weights [k], means and variances [k, d] of the parts of samples that belong to each component."""
    means = inside.T @ samples / counts[:, None]
    variances = np.maximum(inside.T @ squares / counts[:, None] - means**2 + more, FLOOR)
    return counts / counts.sum(), means, variances


def _log_densities(samples: Features, squares: Features, means: Features, variances: Features) -> Features:
    """Logarithm of each component's density at each sample, [n, k]."""
    precise = 1.0 / variances
    distances = squares @ precise.T - 2.0 * samples @ (means * precise).T + (means**2 * precise).sum(axis=1)
    densities = -0.5 * (distances + np.log(variances).sum(axis=1) + samples.shape[1] * log(2.0 * pi))
    return np.asarray(densities, dtype=np.float64)


def _log_sums(joint: Features) -> Features:
    """Logarithm of the sum of exp over each row."""
    top = joint[:, 0]
    for component in range(1, joint.shape[1]):
        top = np.maximum(top, joint[:, component])
    return np.asarray(top + np.log(np.exp(joint - top[:, None]).sum(axis=1)), dtype=np.float64)
