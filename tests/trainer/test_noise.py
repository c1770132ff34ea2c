"""Noise evidence: the rate is about right, the suspects mostly are, and doubt ends in abstention."""

from __future__ import annotations

import numpy as np
import pytest

from automode.trainer.noise import confident_rate, neighbour_disagreement, noise_rate, surest_rate, weigh

C = 5


def noisy(rate: float, *, seed: int = 0, n: int = 1500, spread: float = 0.6) -> dict[str, np.ndarray]:
    """A network that has learnt the true classes, seen through labels of which a share is wrong.

    Features are unit class vectors plus noise; probabilities and margins follow the true class.
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, C, n)
    wrong = rng.random(n) < rate
    labels = np.where(wrong, (truth + rng.integers(1, C, n)) % C, truth)
    logits = 4 * np.eye(C)[truth] + rng.normal(size=(n, C))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    features = 4 * np.eye(C)[truth] + spread * rng.normal(size=(n, C))
    scores = logits.copy()
    scores[np.arange(n), labels] = -np.inf
    margins = logits[np.arange(n), labels] - scores.max(1)
    return {
        "wrong": wrong,
        "labels": labels,
        "probabilities": probabilities,
        "features": features,
        "margins": margins,
    }


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.4])
def test_the_rate_is_estimated_from_confident_predictions(rate: float) -> None:
    """The sampling error at n = 1 500 is 1.3 points at most; the seed is fixed."""
    world = noisy(rate)
    found = confident_rate(world["probabilities"], world["labels"])
    assert found == pytest.approx(world["wrong"].mean(), abs=0.04)


def test_a_rate_needs_samples_and_classes() -> None:
    world = noisy(0.2)
    assert confident_rate(world["probabilities"][:40], world["labels"][:40]) is None
    assert confident_rate(world["probabilities"], np.zeros(1500, dtype=np.int64)) is None


def test_a_class_without_held_out_samples_is_never_believed() -> None:
    world = noisy(0.2)
    few = world["labels"] != 3
    found = confident_rate(world["probabilities"][few], world["labels"][few])
    assert found is not None
    assert found < 0.3


def hard(rate: float, n: int = 4000) -> tuple[np.ndarray, np.ndarray, float]:
    """Answers that follow the truth as often as their probability says, .4 to 1: (probabilities, labels, share of mistakes)."""
    rng = np.random.default_rng(7)
    sure = rng.uniform(0.4, 1.0, n)
    answer = rng.integers(0, C, n)
    truth = np.where(rng.random(n) < sure, answer, (answer + rng.integers(1, C, n)) % C)
    labels = np.where(rng.random(n) < rate, (truth + rng.integers(1, C, n)) % C, truth)
    probabilities = np.repeat(((1 - sure) / (C - 1))[:, None], C, axis=1)
    probabilities[np.arange(n), answer] = sure
    return probabilities, labels, float((answer != truth).mean())


def test_the_mistakes_on_a_hard_task_are_not_taken_for_wrong_labels() -> None:
    probabilities, labels, mistakes = hard(0.0)
    confident, found = confident_rate(probabilities, labels), noise_rate(probabilities, labels)
    assert mistakes > 0.25
    assert confident is not None
    assert confident > 0.15  # a card about wrong labels would come from .1 on
    assert found == surest_rate(probabilities, labels)
    assert found < 0.1


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_wrong_labels_on_a_hard_task_are_counted_as_confident_learning_does(rate: float) -> None:
    probabilities, labels, _ = hard(rate)
    assert surest_rate(probabilities, labels) == pytest.approx(rate, abs=0.1)
    assert noise_rate(probabilities, labels) == confident_rate(probabilities, labels)


def test_wrong_labels_of_two_classes_alone_are_found_among_the_answers_for_these() -> None:
    world = noisy(0.4)
    spared = np.isin(world["labels"], (2, 3, 4))
    labels = np.where(spared, world["probabilities"].argmax(1), world["labels"])
    share = (labels != world["probabilities"].argmax(1)).mean()
    found = noise_rate(world["probabilities"], labels)
    assert share > 0.1
    assert found == pytest.approx(share, abs=0.05)


def test_neighbours_of_wrong_labels_disagree() -> None:
    world = noisy(0.2)
    share = neighbour_disagreement(world["features"], world["labels"])
    assert share[world["wrong"]].mean() > 0.7
    assert share[~world["wrong"]].mean() < 0.3
    assert neighbour_disagreement(np.zeros((1, 2)), np.zeros(1, np.int64)).tolist() == [0.0]


def verdict(world: dict[str, np.ndarray], *, rate: float | None, features: np.ndarray | None = None):  # type: ignore[no-untyped-def]
    ids = 10 * np.arange(len(world["labels"]))
    probe = ids[::2]
    disagreement = neighbour_disagreement(
        (world["features"] if features is None else features)[::2], world["labels"][::2]
    )
    return ids, weigh(rate=rate, ids=ids, margins=world["margins"], probe=probe, disagreement=disagreement)


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_suspects_are_mostly_wrong_and_fewer_than_the_estimate(rate: float) -> None:
    world = noisy(rate)
    ids, found = verdict(world, rate=rate)
    assert found.rate == rate
    assert len(found.suspects) == round(0.85 * rate * len(ids))
    assert np.isin(found.suspects, ids[world["wrong"]]).mean() > 0.95
    margins = dict(zip(ids.tolist(), world["margins"].tolist(), strict=True))
    assert [margins[i] for i in found.suspects.tolist()] == sorted(
        margins[i] for i in found.suspects.tolist()
    )


def test_witnesses_that_disagree_end_in_abstention_with_the_suspects_kept_for_review() -> None:
    """Hard samples: low margins, but neighbours that carry the same label."""
    world = noisy(0.0)
    _, found = verdict(world, rate=0.2, features=4 * np.eye(C)[world["labels"]])
    assert found.rate is None
    assert len(found.suspects) > 0
    assert "nobody can tell" in found.why


def test_abstention_says_why() -> None:
    world = noisy(0.2)
    ids, found = verdict(world, rate=None)
    assert (found.rate, len(found.suspects)) == (None, 0)
    clean = verdict(world, rate=0.01)[1]
    assert (clean.rate, len(clean.suspects)) == (0.01, 0)
    unasked = weigh(rate=0.2, ids=ids, margins=world["margins"], probe=ids, disagreement=None)
    assert unasked.rate is None
    assert "cross-examine" in unasked.why
    few = weigh(rate=0.2, ids=ids, margins=world["margins"], probe=ids[:5], disagreement=np.ones(5))
    assert few.rate is None
    assert "cross-examined" in few.why
    blind = weigh(
        rate=0.2, ids=ids, margins=np.full(len(ids), np.nan), probe=ids, disagreement=np.ones(len(ids))
    )
    assert blind.rate is None
