"""The log score, and how many labels can be wrong: bounds that hold, and what is chosen by them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from automode.errors import UsageError
from automode.planner.metrics import (
    FLOOR,
    finishing_metric,
    noise_at_most,
    too_dear,
    upper_limit,
    utility_log_score,
)

probabilities = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20)


@given(probabilities)
def test_the_log_score_is_bounded_and_grows_with_the_probability(p: list[float]) -> None:
    score = utility_log_score(sorted(p))
    assert np.all((score >= 0.0) & (score <= 1.0))
    assert np.all(np.diff(score) >= 0.0)


def test_the_log_score_is_a_line_in_the_logarithm_down_to_its_floor() -> None:
    score = utility_log_score([1.0, math.sqrt(FLOOR), FLOOR, FLOOR / 10.0, 0.0, math.nan])
    np.testing.assert_allclose(score, [1.0, 0.5, 0.0, 0.0, 0.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("p", [[1.5], [-0.5], [0.5, 2.0]])
def test_a_log_score_of_what_is_no_probability_is_refused(p: list[float]) -> None:
    with pytest.raises(UsageError, match="p_true"):
        utility_log_score(p)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_the_limit_is_that_of_clopper_and_pearson(counts: tuple[int, int]) -> None:
    found, n = counts
    assert upper_limit(found, n, 0.95) == pytest.approx(beta.ppf(0.95, found + 1, n - found), abs=1e-9)


def test_where_all_are_contradicted_or_there_are_none_nothing_is_shown() -> None:
    assert upper_limit(5, 5, 0.95) == 1.0
    assert noise_at_most([1.0], [0.9]) == 1.0
    assert noise_at_most([1.0] * 100, [math.nan] + [0.9] * 99) == 1.0
    with pytest.raises(UsageError, match="at least one"):
        upper_limit(3, 2, 0.95)


def test_mistakes_of_an_unsure_network_are_no_wrong_labels() -> None:
    sure = np.linspace(1.0, 0.2, 200)
    unsure_mistakes = (np.arange(200) < 120).astype(float)  # every mistake among the least sure 80
    everywhere = (np.arange(200) % 5 != 0).astype(float)  # as many as a fifth, whatever the network thinks
    assert noise_at_most(unsure_mistakes, sure) == pytest.approx(1.0 - 0.05 ** (1 / 100))
    assert noise_at_most(everywhere, sure) > 0.2


@pytest.mark.no_cover
def test_the_bound_holds_as_often_as_it_says() -> None:
    # 2000 draws with every tenth label wrong: the bound fails in 5 % of them at the most (exact binomial), so that more than 6.5 %
    # would come by chance once in a thousand times.
    rng, failed = np.random.default_rng(0), 0
    for _ in range(2000):
        sure = rng.random(200)
        right = (rng.random(200) < sure) ^ (rng.random(200) < 0.1)
        right[sure > 0.5] = rng.random(int((sure > 0.5).sum())) > 0.1
        failed += noise_at_most(right.astype(float), sure) < 0.1
    assert failed / 2000 <= 0.065


@pytest.mark.parametrize(
    ("at_most", "metric"), [(None, "utility"), (0.1, "log_score"), (0.11, "utility"), (0.0, "log_score")]
)
def test_the_log_score_is_for_labels_that_are_shown_to_be_clean(at_most: float | None, metric: str) -> None:
    assert finishing_metric(at_most, 0.1) == metric


@pytest.mark.parametrize(
    ("log_score", "utility", "refused"),
    [
        (0.93, 0.86, False),  # ahead by both
        (0.93, 0.85, False),  # level by utility
        (0.926, 0.84, True),  # .006 of a shortfall of .08 is too little for what it costs
        (0.932 + 1e-9, 0.84, False),  # .15 of it
        (0.932 - 1e-6, 0.84, True),
        (float("-inf"), 0.84, True),
    ],
)
def test_an_earlier_state_may_cost_utility_where_it_takes_much_of_the_log_scores_shortfall(
    log_score: float, utility: float, refused: bool
) -> None:
    given = {"last_log_score": 0.92, "last_utility": 0.85}
    assert too_dear(log_score=log_score, utility=utility, **given) is refused
