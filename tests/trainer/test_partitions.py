"""Own k-means and mixture against scikit-learn's: as tight, and as likely to the last digits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from automode.trainer.partitions import FLOOR, MOST_ROUNDS, k_means, mixture_scores


def features(n: int = 400, d: int = 20, seed: int = 0) -> np.ndarray:
    """What a layer of ReLU gives, standardised: no clear clusters."""
    rng = np.random.default_rng(seed)
    raw = np.maximum(rng.standard_normal((n, 5)) @ rng.standard_normal((5, d)), 0.0)
    return (raw - raw.mean(axis=0)) / raw.std(axis=0)


def tightness(samples: np.ndarray, centres: np.ndarray, labels: np.ndarray) -> float:
    return float(((samples - centres[labels]) ** 2).sum())


@pytest.mark.parametrize("k", [3, 6])
def test_partitions_are_as_tight_as_the_librarys(k: int) -> None:
    """Both take the best of eight starts; the seeds are fixed, so that this cannot fail by chance."""
    own, library = [], []
    for seed in range(5):
        samples = features(seed=seed)
        own.append(tightness(samples, *k_means(samples, k, starts=8, seed=seed)))
        library.append(KMeans(n_clusters=k, n_init=8, random_state=seed).fit(samples).inertia_)
    assert np.mean(own) <= 1.005 * np.mean(library)


def test_each_sample_is_with_its_nearest_centre_and_centres_are_means() -> None:
    samples = features()
    centres, labels = k_means(samples, 6, starts=8, seed=1)
    distances = ((samples[:, None, :] - centres) ** 2).sum(axis=2)
    np.testing.assert_array_equal(labels, distances.argmin(axis=1))
    means = np.stack([samples[labels == cluster].mean(axis=0) for cluster in range(6)])
    assert np.abs(means - centres).max() < 0.05


def test_samples_that_are_all_alike_fill_one_cluster() -> None:
    centres, labels = k_means(np.ones((50, 3)), 3, starts=4, seed=0)
    assert np.bincount(labels, minlength=3).tolist() == [50, 0, 0]
    np.testing.assert_array_equal(centres[0], np.ones(3))


@pytest.mark.parametrize("k", [3, 6])
def test_likelihoods_are_those_of_the_librarys_mixture(k: int) -> None:
    samples, others = features(seed=1), features(n=90, seed=2)
    _, labels = k_means(samples, k, starts=2, seed=0)
    inside = np.eye(k)[labels]
    counts = inside.sum(axis=0)
    means = inside.T @ samples / counts[:, None]
    variances = np.maximum(inside.T @ samples**2 / counts[:, None] - means**2, FLOOR)
    library = GaussianMixture(
        k,
        covariance_type="diag",
        reg_covar=FLOOR,
        max_iter=MOST_ROUNDS,
        weights_init=counts / counts.sum(),
        means_init=means,
        precisions_init=1.0 / variances,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that twenty rounds were not enough is no fault here
        library.fit(samples)
    np.testing.assert_allclose(
        mixture_scores(samples, labels, others), library.score_samples(others), rtol=1e-9
    )
