"""Mann-Kendall, pair slopes and the block trend: S3 and S4."""

from __future__ import annotations

import itertools
import json
import math
import random
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from automode.errors import UsageError
from automode.planner.signals import BlockTrend, MannKendall, TrendState
from automode.planner.signals.slopes import PairSlopes, kendall_sigma

# Few distinct values, so that ties are common.
tied = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=60)
LEVELS = (1.28, 1.645)


def through_json(signal: Any) -> Any:
    return type(signal).from_state(json.loads(json.dumps(signal.state(), allow_nan=False)))


def brute_s(values: list[float]) -> int:
    return int(sum(np.sign(b - a) for a, b in itertools.combinations(values, 2)))


def brute_variance(values: list[float]) -> float:
    n = len(values)
    ties = [values.count(v) for v in set(values)]
    return float(n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18.0


# ------------------------------------------------------------------------------------------------ Mann-Kendall


@given(tied, st.integers(4, 20))
def test_streaming_mann_kendall_equals_counting_all_pairs(values: list[float], window: int) -> None:
    signal = MannKendall(window=window)
    for i, value in enumerate(values):
        signal.update(value)
        held = values[max(0, i + 1 - window) : i + 1]
        assert signal.s == brute_s(held)
        assert signal.variance == pytest.approx(brute_variance(held))
        assert len(signal) == len(held)


def test_streaming_mann_kendall_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).integers(0, 12, 70).astype(float)
    signal = MannKendall(window=50)
    for value in values:
        signal.update(float(value))
    oracle = stats.kendalltau(np.arange(50), values[-50:], method="asymptotic")
    # scipy's asymptotic p-value has no continuity correction: undo ours.
    z = signal.s / math.sqrt(signal.variance)
    assert 2.0 * stats.norm.sf(abs(z)) == pytest.approx(oracle.pvalue, rel=1e-9)


@given(tied)
def test_mann_kendall_goes_on_from_its_state(values: list[float]) -> None:
    signal = MannKendall(window=7)
    for value in values:
        signal.update(value)
        signal, before = through_json(signal), signal
        assert (signal.s, signal.variance, signal.state()) == (before.s, before.variance, before.state())


def test_a_flat_series_has_no_z() -> None:
    signal = MannKendall(window=8)
    for _ in range(8):
        signal.update(1.0)
    assert signal.z == 0.0


def test_a_window_too_short_for_a_trend_is_refused() -> None:
    with pytest.raises(UsageError, match="window"):
        MannKendall(window=3)


# ------------------------------------------------------------------------------------------------- pair slopes


@pytest.mark.parametrize("w", [10, 11, 37, 80])
def test_the_slopes_median_and_bounds_agree_with_scipy(w: int) -> None:
    y = np.random.default_rng(w).standard_normal(w) + 0.05 * np.arange(w)
    slopes = PairSlopes(80, LEVELS)
    slopes.compute(y)
    # scipy's interval is two-sided at `alpha`, and rounds the rank of a bound where ours takes the outer one.
    oracle = stats.theilslopes(y, alpha=1.0 - 2.0 * stats.norm.sf(1.645))
    ordered = np.sort(slopes.slopes)
    assert slopes.median == pytest.approx(oracle.slope)
    assert ordered.searchsorted(oracle.low_slope) - ordered.searchsorted(slopes.lower(1.645)) in {0, 1}
    assert ordered.searchsorted(slopes.upper(1.645)) - ordered.searchsorted(oracle.high_slope) in {0, 1}
    assert (
        slopes.lower(1.645)
        <= slopes.lower(1.28)
        <= slopes.median
        <= slopes.upper(1.28)
        <= slopes.upper(1.645)
    )


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=40))
def test_the_bounds_are_the_order_statistics_of_all_slopes(values: list[float]) -> None:
    slopes = PairSlopes(40, LEVELS)
    slopes.compute(np.array(values))
    pairs = itertools.combinations(enumerate(values), 2)
    every = sorted((b - a) * (1.0 / (j - i)) for (i, a), (j, b) in pairs)
    n = len(every)
    for z in LEVELS:
        low = max(0, math.floor((n - z * kendall_sigma(len(values))) / 2.0) - 1)
        assert slopes.lower(z) == every[low]
        assert slopes.upper(z) == every[n - 1 - low]
    assert slopes.median == pytest.approx(float(np.median(every)))


@given(st.lists(st.floats(-1e3, 1e3), min_size=30, max_size=120), st.integers(3, 24), st.randoms())
def test_where_the_last_window_had_them_changes_the_time_and_not_the_order_statistics(
    series: list[float], width: int, rnd: random.Random
) -> None:
    used = PairSlopes(24, LEVELS)
    at = 0
    while at + width <= len(series):
        w = rnd.choice(
            (width, 3, 24)
        )  # another window now and then: the ranks of now are not those of before
        y = np.array(series[at : at + w])
        if y.size < 3:
            break
        used.compute(y)
        fresh = PairSlopes(24, LEVELS)
        fresh.compute(y)
        assert used.median == fresh.median
        for z in LEVELS:
            assert (used.lower(z), used.upper(z)) == (fresh.lower(z), fresh.upper(z))
        at += rnd.choice((1, 1, 1, 7))


def test_kendalls_z_at_slope_zero_is_mann_kendalls() -> None:
    y = np.random.default_rng(1).standard_normal(40)
    slopes = PairSlopes(40, LEVELS)
    slopes.compute(y)
    assert slopes.kendall_z(0.0) * kendall_sigma(40) == pytest.approx(brute_s(y.tolist()))


def test_the_bound_is_the_test_inverted() -> None:
    y = np.random.default_rng(2).standard_normal(60)
    slopes = PairSlopes(60, LEVELS)
    slopes.compute(y)
    for z in LEVELS:
        assert slopes.kendall_z(slopes.lower(z) - 1e-9) >= z
        assert slopes.kendall_z(slopes.lower(z) + 1e-9) <= z + 2.0 / kendall_sigma(60)


def test_slopes_of_two_points_are_refused() -> None:
    with pytest.raises(UsageError, match="capacity"):
        PairSlopes(2, LEVELS)


# --------------------------------------------------------------------------------------------- the block trend


def follow(losses: Any, **keywords: Any) -> BlockTrend:
    signal = BlockTrend(**keywords)
    for loss in losses:
        signal.update(float(loss))
    return signal


def noisy(level: Any, sigma: float, seed: int) -> Any:
    level = np.asarray(level, dtype=float)
    return level * np.exp(sigma * np.random.default_rng(seed).standard_normal(level.size))


def flat(n: int, sigma: float = 0.05, seed: int = 0) -> Any:
    return noisy(np.ones(n), sigma, seed)


def falling(n: int, sigma: float = 0.05, seed: int = 0) -> Any:
    return noisy(2.0 * (np.arange(n) + 50.0) ** -0.4, sigma, seed)


def test_the_first_look_comes_after_a_quarter_of_the_budget() -> None:
    signal = follow(flat(199))
    assert signal.looks == 0
    assert math.isnan(signal.best_execute)
    assert "No look yet" in signal.describe()
    signal.update(1.0)
    assert signal.looks == 1
    assert signal.used == 10
    assert signal.window == 200


def test_the_numbers_are_those_of_the_formulas() -> None:
    losses = flat(1600, 0.1)
    signal = follow(losses)
    blocks = losses.reshape(-1, 20).mean(axis=1)
    k, w = 80, 80
    y = blocks[-w:]
    every = np.sort([(y[j] - y[i]) / (j - i) for i in range(w) for j in range(i + 1, w)])
    sigma = math.sqrt(w * (w - 1) * (2 * w + 5) / 18.0)
    level = float(np.median(y[-w // 4 :]))
    ahead = (k - w / 2) * math.log((k + 40) / k)
    for z, best, worst in (
        (signal.z_advise, signal.best_advise, signal.worst_advise),
        (signal.z_execute, signal.best_execute, signal.worst_execute),
    ):
        low = math.floor((every.size - z * sigma) / 2) - 1
        assert best == pytest.approx(-every[low] * ahead / level)
        assert worst == pytest.approx(-every[every.size - 1 - low] * ahead / level)
    assert signal.level == pytest.approx(level)
    assert signal.slope == pytest.approx(np.median(every) / 20)
    assert signal.rise == pytest.approx(max(0.0, *(smallest_rise(y[-n:]) for n in (40, 20))))
    assert signal.mann_kendall.s == brute_s(y[-40:].tolist())


@pytest.mark.parametrize("rising", [1400, 900, 300])
def test_the_rise_is_that_of_the_window_that_shows_more(rising: int) -> None:
    level = np.concatenate([np.ones(1600 - rising), 1.0 + np.linspace(0.0, 1.0, rising)])
    losses = noisy(level, 0.05, 1)
    signal = follow(losses)
    y = losses.reshape(-1, 20).mean(axis=1)
    rises = {n: smallest_rise(y[-n:]) for n in (40, 20)}
    assert signal.rise == pytest.approx(max(rises.values()))
    assert signal.rise > 0.1
    assert signal.rise_window == 20 * max(rises, key=lambda n: rises[n])


def smallest_rise(y: Any, z: float = 1.645) -> float:
    """Lower bound of the rise over a window of block means, relative to the median of its last quarter."""
    n = len(y)
    every = np.sort([(y[j] - y[i]) / (j - i) for i in range(n) for j in range(i + 1, n)])
    low = math.floor((every.size - z * math.sqrt(n * (n - 1) * (2 * n + 5) / 18.0)) / 2) - 1
    return float(every[low] * n / np.median(y[-n // 4 :]))


def test_a_noisy_plateau_is_settled_by_the_last_four_budgets_in_blocks_twice_as_long() -> None:
    losses = flat(4000, 0.3, seed=4)
    signal = follow(losses, z_advise=1.28, z_execute=1.645)
    assert signal.firm is TrendState.PLATEAU
    assert (signal.used, signal.window) == (160, 3200)
    y = losses.reshape(-1, 40).mean(axis=1)[-80:]
    every = np.sort([(y[j] - y[i]) / (j - i) for i in range(80) for j in range(i + 1, 80)])
    low = math.floor((every.size - 1.645 * math.sqrt(80 * 79 * 165 / 18.0)) / 2) - 1
    k = 200
    ahead = (k - 80) * math.log((k + 40) / k)
    assert signal.best_execute == pytest.approx(-0.5 * every[low] * ahead / signal.level)


@pytest.mark.no_cover
def test_the_longer_window_declares_no_plateau_where_the_last_two_budgets_improve() -> None:
    kink = np.concatenate([np.ones(3200), 1.0 - 0.05 * np.arange(1600) / 1600.0])
    for seed in range(8):
        assert follow(noisy(kink, 0.1, seed)).firm is not TrendState.PLATEAU, seed


def test_a_flat_loss_is_a_plateau_at_both_confidences() -> None:
    signal = follow(flat(4000))
    assert signal.status is TrendState.PLATEAU
    assert signal.firm is TrendState.PLATEAU
    assert signal.z_against_gain > 1.645


def test_a_falling_loss_is_improving() -> None:
    signal = follow(falling(2000))
    assert signal.status is TrendState.IMPROVING
    assert signal.worst_execute >= 0.01


def test_noise_too_large_to_tell_is_unknown() -> None:
    signal = follow(flat(400, sigma=1.0))
    assert signal.firm is TrendState.UNKNOWN
    assert signal.worst_execute < 0.01 < signal.best_execute


def test_a_state_is_exactly_at_its_threshold() -> None:
    flat_one = follow([1.0] * 400)
    assert flat_one.best_execute == 0.0
    steep = follow(falling(1000))
    at = follow(falling(1000), gain=steep.worst_advise)
    beyond = follow(falling(1000), gain=math.nextafter(steep.worst_advise, inf))
    assert at.status is TrendState.IMPROVING
    assert beyond.status is not TrendState.IMPROVING


@pytest.mark.no_cover
def test_what_is_executed_needs_at_least_the_confidence_of_what_is_advised() -> None:
    # At every look of a loss that flattens: firm is never a plateau where the advice is not.
    signal = BlockTrend()
    for loss in noisy(0.3 + 2.0 * (np.arange(8000) + 50.0) ** -0.6, 0.15, 3):
        signal.update(float(loss))
        if signal.firm is TrendState.PLATEAU:
            assert signal.status is TrendState.PLATEAU


@pytest.mark.no_cover
def test_an_improving_run_is_rarely_called_a_plateau() -> None:
    # 60 runs that truly gain 5 to 20 % over the next B; the study's rate is at most 0.01 at z 1.645 on such curves:
    # 5 or more of 60 have probability below 1e-3 at that rate, and this seed is fixed.
    wrong = 0
    for seed in range(60):
        signal = BlockTrend()
        for loss in falling(2500, 0.1, seed):
            signal.update(float(loss))
            if signal.firm is TrendState.PLATEAU:
                wrong += 1
                break
    assert wrong < 5


@pytest.mark.no_cover
def test_slow_divergence_is_told_before_the_loss_has_doubled() -> None:
    # Flat for 1600 steps, then doubling every 800 under 10 % noise, 30 runs: all warned, well before the doubling.
    leads = []
    for seed in range(30):
        t = np.arange(2600)
        signal = BlockTrend()
        for step, loss in enumerate(noisy(2.0 ** (np.maximum(t - 1600, 0) / 800.0), 0.1, seed)):
            signal.update(float(loss))
            if signal.status is TrendState.REGRESSING:
                leads.append(2400 - step)
                break
    assert len(leads) == 30
    assert np.median(leads) >= 150


def test_a_rise_is_not_judged_before_half_a_budget() -> None:
    signal = follow(np.linspace(1.0, 2.0, 399))
    assert math.isnan(signal.rise)
    assert signal.status is not TrendState.REGRESSING
    for loss in np.linspace(2.0, 2.05, 21):
        signal.update(float(loss))
    assert signal.status is TrendState.REGRESSING


def test_an_excursion_starts_the_plateau_window_anew_and_leaves_the_window_of_the_rise() -> None:
    signal = follow(flat(2000))
    assert signal.status is TrendState.PLATEAU
    assert signal.excursion()
    assert signal.status is TrendState.UNKNOWN
    assert signal.blocks == 0
    assert signal.rise_window in (400, 800)
    assert not signal.excursion()
    for loss in 3.0 * np.exp(-np.arange(240) / 150.0) + 1.0:
        signal.update(float(loss))
    assert signal.firm is TrendState.IMPROVING


def test_an_excursion_does_not_silence_a_divergence() -> None:
    signal = follow(np.linspace(1.0, 2.0, 1600))
    assert signal.status is TrendState.REGRESSING
    assert not signal.excursion()
    assert signal.status is TrendState.REGRESSING


def test_losses_that_are_not_finite_are_passed_over() -> None:
    losses = flat(2000)
    broken = list(losses)
    for at in range(0, 2000, 7):
        broken.insert(at, (nan, inf, -inf, 1e305)[at % 4])
    assert follow(broken).state() == follow(losses).state()


def test_a_single_spike_does_not_make_a_trend() -> None:
    losses = flat(3000)
    clean = follow(losses)
    losses[2500] = 1e12
    spiked = follow(losses)
    assert spiked.firm is clean.firm
    assert spiked.best_execute == pytest.approx(clean.best_execute, abs=0.002)


@pytest.mark.parametrize("budget", [10, 35, 40, 41, 100, 399, 800, 5000])
def test_every_budget_derives_its_blocks_and_window(budget: int) -> None:
    signal = follow(flat(4 * budget, 0.01), budget=budget)
    assert signal.block_steps == math.ceil(budget / 40)
    assert signal.looks > 0
    assert abs(signal.window - 2 * budget) <= 2 * signal.block_steps
    assert signal.firm is not TrendState.IMPROVING


def test_the_state_is_that_of_a_scaled_loss() -> None:
    # Relative gains do not depend on the unit of the loss; a power of two scales exactly.
    losses = falling(3000, 0.2)
    one, many = follow(losses), follow(losses * 1024.0)
    assert one.best_execute == many.best_execute
    assert one.status is many.status


def test_a_loss_around_zero_is_judged_against_its_warm_up_scale() -> None:
    signal = BlockTrend()
    signal.level_scale = 2.0
    for loss in 0.001 * np.random.default_rng(0).standard_normal(2000):
        signal.update(float(loss))
    assert signal.firm is TrendState.PLATEAU
    falling_through_zero = BlockTrend()
    falling_through_zero.level_scale = 2.0
    for loss in np.linspace(2.0, -2.0, 2000):
        falling_through_zero.update(float(loss))
    assert falling_through_zero.firm is TrendState.IMPROVING


@pytest.mark.parametrize("budget", [17, 120])
@given(cut=st.integers(0, 900), seed=st.integers(0, 2**16), scale=st.sampled_from([0.0, 1.5]))
def test_the_trend_goes_on_from_its_state(budget: int, cut: int, seed: int, scale: float) -> None:
    losses = flat(900, 0.3, seed).tolist()
    whole, parted = BlockTrend(budget=budget), BlockTrend(budget=budget)
    whole.level_scale = parted.level_scale = scale
    for i, loss in enumerate(losses):
        if i == cut:
            parted = through_json(parted)
        if i == 500:
            whole.excursion()
            parted.excursion()
        assert whole.update(loss) == parted.update(loss)
    assert whole.state() == parted.state()


def test_a_reset_forgets_all_but_the_scale() -> None:
    signal = follow(flat(1000))
    signal.level_scale = 3.0
    signal.reset()
    fresh = BlockTrend()
    fresh.level_scale = 3.0
    assert signal.state() == fresh.state()


def test_the_sentence_for_a_card_gives_the_number_its_bound_and_its_basis() -> None:
    told = follow(flat(2000, 0.02)).describe()
    assert "one-sided" in told
    assert "next 800 steps" in told
    assert "80 blocks" in told
    assert "you asked for >= 1 %" in told


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 9},
        {"gain": 0.0},
        {"gain": 1.0},
        {"gain": nan},
        {"z_advise": 0.0},
        {"z_execute": 0.9},
        {"z_execute": inf},
        {"z_rise": 0.0},
        {"regress_rise": -0.1},
        {"regress_rise": nan},
    ],
)
def test_impossible_parameters_of_the_trend_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        BlockTrend(**wrong)


def test_one_look_that_shows_a_rise_is_not_enough() -> None:
    signal = follow(np.ones(800))
    for loss in np.linspace(1.0, 1.6, 400):
        before = signal.rise
        signal.update(float(loss))
        if signal.status is TrendState.REGRESSING:
            break
    assert signal.status is TrendState.REGRESSING
    assert before >= 0.10, "the look before this one showed the rise already"


@pytest.mark.no_cover
def test_a_divergence_faster_than_the_budget_is_seen_in_half_of_it() -> None:
    """A loss that doubles within 300 steps, half of them bent: the window of B alone is late."""
    warned = 0
    for seed in range(20):
        signal = follow(
            noisy(np.concatenate([np.ones(1600), 2.0 ** ((np.arange(300) / 300.0) ** 2)]), 0.1, seed)
        )
        warned += signal.status is TrendState.REGRESSING
        if signal.status is TrendState.REGRESSING:
            assert signal.rise_window == 400
    assert warned >= 15


def test_the_end_of_a_regression_starts_the_plateaus_window_anew() -> None:
    hump = np.concatenate([np.ones(1600), np.linspace(1.0, 3.0, 300), np.linspace(3.0, 1.0, 600)])
    signal = BlockTrend()
    states = []
    for loss in noisy(hump, 0.05, 0):
        signal.update(float(loss))
        states.append(signal.status)
    first = states.index(TrendState.REGRESSING)
    after = next(i for i in range(first, len(states)) if states[i] is not TrendState.REGRESSING)
    assert states[after] is TrendState.UNKNOWN
    assert TrendState.PLATEAU not in states[first:]
