"""Clusters find regimes that are there, stay the same from scan to scan, and are silent where there are none."""

from __future__ import annotations

import numpy as np
import pytest

from automode.trainer.clusters import Clusters, _likeliest, agreement, fit_clusters, losses_by_cluster


def blobs(k: int, n: int = 300, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % k
    return 12 * rng.standard_normal((k, d))[truth] + rng.standard_normal((n, d)), truth


@pytest.mark.parametrize("k", [3, 6])
@pytest.mark.parametrize("known", [True, False], ids=["held out", "set aside"])
def test_as_many_regimes_are_found_as_make_unseen_samples_likeliest(k: int, known: bool) -> None:
    """Regimes lie 12 standard deviations apart and the seeds are fixed, so that this cannot fail by chance."""
    features, truth = blobs(k)
    unseen = blobs(k, seed=0, n=600)[0][300:] if known else None
    found = fit_clusters(features[:300], seed=1, held_out=unseen)
    assert found is not None
    assert found.k == k
    assert agreement(truth, found.labels) == pytest.approx(1.0)
    assert found.likelihoods[k] == max(found.likelihoods.values())
    assert set(found.likelihoods) == {3, 6}


def test_the_number_stays_until_another_is_clearly_likelier() -> None:
    scores = {3: np.array([1.0, 2.0, 3.0, 4.0]), 6: np.array([2.0, 1.5, 4.0, 3.9])}
    assert _likeliest(scores, None) == 6
    assert _likeliest(scores, 3) == 3
    assert _likeliest({3: scores[3], 6: scores[3] + [1.0, 1.1, 0.9, 1.0]}, 3) == 6
    assert _likeliest(scores, 4) == 6


def test_the_partition_follows_the_seed_and_the_features_alone() -> None:
    features, _ = blobs(3)
    np.random.seed(4)  # noqa: NPY002
    first = fit_clusters(features, seed=1)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    second = fit_clusters(features, seed=1)
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_features_count_alike_whatever_their_scale() -> None:
    features, truth = blobs(3)
    features = features * np.array([1e-6, 1.0, 1e6, 1.0, 1.0, 1.0])
    found = fit_clusters(np.column_stack([features, np.full(len(features), 7.0)]), seed=1)
    assert found is not None
    assert agreement(truth, found.labels) == pytest.approx(1.0)


def test_other_samples_are_assigned_to_the_same_clusters_also_after_storage() -> None:
    features, _ = blobs(3)
    found = fit_clusters(features[:200], seed=1)
    assert found is not None
    np.testing.assert_array_equal(found.assign(features[:200]), found.labels)
    stored = Clusters.unpacked(found.packed())
    np.testing.assert_array_equal(stored.assign(features), found.assign(features))
    assert stored.k == found.k


@pytest.mark.parametrize(
    "features",
    [
        np.zeros((10, 3)),
        np.ones((200, 3)),
        np.full((200, 3), np.nan),
        np.r_[np.zeros((199, 2)), [[1e9, 1e9]]],
    ],
    ids=["too few", "all alike", "diverged", "one outlier"],
)
def test_there_may_be_no_clusters(features: np.ndarray) -> None:
    assert fit_clusters(features, seed=0) is None


def test_agreement_is_over_the_same_samples_only() -> None:
    labels = np.array([0, 0, 1, 1])
    assert agreement(labels, 1 - labels) == 1.0
    assert agreement(None, labels) is None
    assert agreement(labels[:3], labels) is None


def test_losses_of_clusters_leave_suspects_and_unseen_samples_out() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    losses = np.array([1.0, 3.0, 99.0, 5.0, np.nan, np.nan])
    means, errors = losses_by_cluster(labels, losses, losses != 99.0, 3)
    assert means[:2] == (2.0, 5.0)
    assert errors[0] == pytest.approx(1.0)
    assert np.isnan([means[2], errors[1], errors[2]]).all()
