"""S0, S1, S2, spike bursts, Page-Hinkley: signals of single observations."""

from __future__ import annotations

import json
import math
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from automode.errors import UsageError
from automode.planner.signals import (
    LevelShift,
    NonFinite,
    NonFiniteState,
    PageHinkley,
    Reading,
    RobustZ,
    SpikeBurst,
    SteppingState,
)
from automode.planner.signals.wire import from_wire, to_wire

any_float = st.floats(allow_nan=True, allow_infinity=True)


def through_json(signal: Any) -> Any:
    return type(signal).from_state(json.loads(json.dumps(signal.state(), allow_nan=False)))


# ---------------------------------------------------------------------------------------------------- the wire


@given(any_float)
def test_a_float_survives_strict_json(value: float) -> None:
    back = from_wire(json.loads(json.dumps(to_wire(value), allow_nan=False)))
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_an_unknown_name_of_a_float_is_refused() -> None:
    with pytest.raises(UsageError, match="stored float"):
        from_wire("many")


@given(any_float, any_float, any_float)
def test_a_reading_survives_strict_json(value: float, threshold: float, detail: float) -> None:
    reading = Reading(
        name="trend",
        step=7,
        value=value,
        state="PLATEAU",
        threshold=threshold,
        window=800,
        details={"level": detail, "blocks": 40, "execute_state": "UNKNOWN", "ready": True},
    )
    back = Reading.from_dict(json.loads(json.dumps(reading.to_dict(), allow_nan=False)))
    assert repr(back) == repr(reading)


# --------------------------------------------------------------------------------------------- S0, non-finite


@pytest.mark.parametrize("bad", [nan, inf, -inf, 1e300, -1e301])
def test_a_number_that_is_not_finite_is_told_at_once(bad: float) -> None:
    signal = NonFinite()
    assert not signal.update(1.0, 1.0, True)
    assert signal.update(bad, 1.0, True)
    assert signal.status is NonFiniteState.NON_FINITE
    assert not signal.loss_finite
    assert signal.grad_norm_finite
    assert not signal.update(1.0, bad, True)
    assert signal.bad_run == 2
    assert signal.loss_finite
    assert not signal.grad_norm_finite
    assert signal.update(1.0, 1.0, True)
    assert signal.status is NonFiniteState.FINITE


def test_a_gradient_norm_that_was_not_measured_is_not_a_bad_one() -> None:
    assert not NonFinite().update(1.0, None, True)


def test_five_steps_that_are_not_applied_in_a_row_are_a_stall_and_four_are_not() -> None:
    signal = NonFinite()
    assert [signal.update(1.0, 1.0, False) for _ in range(4)] == [False] * 4
    assert signal.stepping is SteppingState.STEPPING
    assert not signal.update(1.0, 1.0, True)
    assert [signal.update(1.0, 1.0, False) for _ in range(6)] == [False] * 4 + [True, False]
    assert signal.stepping is SteppingState.STALLED
    assert signal.update(1.0, 1.0, True)
    assert signal.stepping is SteppingState.STEPPING


@given(st.lists(st.tuples(any_float, st.none() | any_float, st.booleans()), max_size=30))
def test_s0_goes_on_from_its_state(rows: list[tuple[float, float | None, bool]]) -> None:
    signal = NonFinite(stall_after=2)
    for row in rows:
        signal.update(*row)
        assert through_json(signal).state() == signal.state()
        assert through_json(signal).status is signal.status
        assert through_json(signal).stepping is signal.stepping


def test_a_stall_after_no_step_is_refused() -> None:
    with pytest.raises(UsageError, match="stall_after"):
        NonFinite(stall_after=0)


# --------------------------------------------------------------------------------------------- S1, the robust z


def fed(values: Any, **keywords: Any) -> RobustZ:
    signal = RobustZ(**{"base": 5.5, **keywords})
    for value in values:
        signal.update(float(value))
    return signal


def noise(n: int, seed: int = 0, sigma: float = 0.1) -> Any:
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(n))


def spread(v: Any) -> float:
    """Sigma of a window: half its middle half or its upper tail, whichever is wider."""
    ordered = np.sort(v)
    middle, low, high, upper = (ordered[q * (len(v) - 1) // 100] for q in (50, 25, 75, 90))
    return max((high - low) / 1.349, (upper - middle) / 1.2816, 0.02)


def slow_spread(v: Any, warm: int = 25) -> float:
    """The average of the spreads that a signal has seen in the windows that begin with the warm-up, half-life 300."""
    keep = 0.5 ** (1 / 300)
    slow = spread(v[:warm])
    for n in range(warm + 1, len(v) + 1):
        slow = keep * slow + (1 - keep) * spread(v[:n])
    return slow


def test_z_is_the_distance_from_the_median_in_sigmas_of_the_logarithm() -> None:
    values = noise(101)
    signal = fed(values)
    logs = np.log(values)
    sigma = max(spread(logs), slow_spread(logs))
    signal.update(1.3)
    # A value above median + 3 sigma would have been cut when it was pushed; this seed has none.
    assert logs.max() < np.median(logs) + 3 * sigma
    assert signal.z == pytest.approx((math.log(1.3) - np.median(logs)) / sigma)


def test_a_long_upper_tail_widens_sigma_and_a_long_lower_tail_does_not() -> None:
    sigma = 0.1 * np.random.default_rng(0).standard_normal(101)
    up = fed(np.exp(np.where(sigma > 0.1, 4.0 * sigma, sigma)))
    down = fed(np.exp(np.where(sigma < -0.1, 4.0 * sigma, sigma)))
    up.update(1.6)
    down.update(1.6)
    assert 1.5 * up.z < down.z


def test_a_window_that_happens_to_be_quiet_does_not_narrow_sigma_at_once() -> None:
    rng = np.random.default_rng(0)
    loud, quiet = np.exp(0.2 * rng.standard_normal(900)), np.exp(0.04 * rng.standard_normal(150))
    signal = fed([*loud, *quiet])
    signal.update(1.4)
    assert not signal.fired
    alone = fed(quiet)
    alone.update(1.4)
    assert alone.fired
    for x in np.exp(0.04 * rng.standard_normal(3000)):
        signal.update(float(x))
    assert signal.update(1.4), "it does once the run has been quiet for long"


def test_sigma_never_falls_below_its_floor() -> None:
    signal = fed([1.0] * 60)
    signal.update(math.exp(0.1))
    assert signal.z == pytest.approx(0.1 / 0.02)
    assert not signal.fired
    assert fed([*[1.0] * 60, math.exp(0.12)]).fired


def test_nothing_is_scored_before_the_warm_up_is_over() -> None:
    signal = RobustZ(base=5.5)
    assert not any(signal.update(x) for x in noise(24).tolist())
    assert not signal.ready
    assert math.isnan(signal.median)
    signal.update(1.0)
    assert signal.ready
    assert signal.update(50.0)


@pytest.mark.parametrize("bad", [nan, inf, 1e6])
def test_neither_a_spike_nor_a_nan_poisons_the_window(bad: float) -> None:
    clean, hit = fed(noise(200)), fed(noise(200))
    for _ in range(20):
        hit.update(bad)
        assert hit.fired
    values = noise(300, seed=1)
    for x in values:
        clean.update(float(x))
        hit.update(float(x))
    assert abs(hit.median - clean.median) < 0.02
    assert hit.update(3.0)
    assert clean.update(3.0)


def test_an_event_begins_with_a_spike_and_ends_after_twelve_ordinary_values() -> None:
    signal = fed(noise(200))
    assert signal.update(20.0)
    assert not signal.update(20.0)
    changes = [signal.update(1.0) for _ in range(12)]
    assert changes == [False] * 11 + [True]
    assert not signal.active


def test_a_lower_value_is_never_a_spike() -> None:
    signal = fed(noise(200))
    assert not signal.update(1e-12)
    assert signal.z < -50.0


@pytest.mark.no_cover
def test_the_threshold_follows_the_tail_of_the_run_and_decays_with_a_half_life_of_3000() -> None:
    signal = fed(noise(200), base=2.0)
    assert signal.threshold > 2.0
    before = signal.threshold
    for _ in range(3000):
        signal.update(signal.median)
    assert signal.threshold == pytest.approx(max(2.0, before / 2.0), rel=1e-3)


def test_a_huge_spike_raises_the_threshold_by_thirty_percent_at_most() -> None:
    signal = fed(noise(200))
    signal.update(1e200)
    signal.update(1e200)
    signal.update(1.0)
    assert signal.threshold == pytest.approx(5.5 * 1.3, rel=1e-3)


def test_ordinary_noise_rarely_fires() -> None:
    # Log-normal noise: P(z > 5.5) is about 1e-7 a step with a window of 101 (heavier than normal by the estimated sigma: below
    # 2e-5); more than 6 events in 30 000 steps have probability below 1e-5.
    signal = RobustZ(base=5.5)
    events = sum(signal.update(float(x)) and signal.active for x in noise(30_000, seed=3))
    assert events <= 6


def test_losses_at_or_below_zero_are_scored_by_asinh_at_the_scale_of_the_warm_up() -> None:
    rng = np.random.default_rng(4)
    values = 2.0 * rng.standard_normal(101)
    signal = fed(values)
    scale = float(np.sort(np.abs(values[:25]))[12])
    assert signal.scale == pytest.approx(scale)
    v = np.arcsinh(values / scale)
    sigma = (np.quantile(v, 0.75) - np.quantile(v, 0.25)) / 1.349
    assert v.max() < np.median(v) + 3 * sigma
    signal.update(5.0)
    assert signal.z == pytest.approx((math.asinh(5.0 / scale) - np.median(v)) / sigma)
    assert signal.median == pytest.approx(float(np.median([*values[1:], 5.0])))


def test_a_loss_that_becomes_negative_later_switches_the_whole_window() -> None:
    positive = noise(101)
    signal = fed(positive)
    assert signal.scale == 0.0
    signal.update(-0.5)
    scale = float(np.sort(positive[:25])[12])
    assert signal.scale == pytest.approx(scale)
    v = np.arcsinh(positive / scale)
    assert signal.z == pytest.approx((math.asinh(-0.5 / scale) - np.median(v)) / spread(v))
    signal.reset()
    for x in noise(30, seed=2):
        signal.update(float(x))
    assert signal.scale == pytest.approx(scale), "the warm-up scale belongs to the run"


def test_a_warm_up_of_zeros_has_a_scale() -> None:
    signal = fed([0.0] * 25)
    assert signal.scale == 1.0
    assert signal.update(1.0)


def test_a_norm_of_zero_is_passed_over() -> None:
    signal = fed([0.0] * 40, signed=False)
    assert not signal.ready
    for x in noise(60):
        signal.update(float(x))
    state = signal.state()["ring"]
    signal.update(0.0)
    assert signal.state()["ring"] == state
    assert signal.scale == 0.0


def test_the_ceiling_is_the_largest_ordinary_value() -> None:
    signal = RobustZ(base=5.5)
    assert signal.ceiling is None
    values = noise(101)
    for x in values:
        signal.update(float(x))
    logs = np.log(values)
    sigma = max(spread(logs), slow_spread(logs[:-1]))
    assert signal.ceiling == pytest.approx(math.exp(np.median(logs) + 3.0 * sigma))


@given(st.lists(any_float, min_size=1, max_size=80), st.integers(0, 79), st.booleans())
@example(values=[0.0, 0.0, 0.0, 0.0, 1.0, 4.0, 4.0, 2.2250738585072014e-308, 0.0, 0.0], cut=0, signed=True)
def test_s1_goes_on_from_its_state_whatever_comes(values: list[float], cut: int, signed: bool) -> None:
    whole = RobustZ(base=3.0, window=16, warm=8, signed=signed)
    parted = RobustZ(base=3.0, window=16, warm=8, signed=signed)
    for i, value in enumerate(values):
        if i == cut:
            parted = through_json(parted)
        assert whole.update(value) == parted.update(value)
        assert (whole.fired, whole.threshold) == (parted.fired, parted.threshold)
    assert whole.state() == parted.state()


@given(st.lists(st.floats(1e-3, 1e3), min_size=9, max_size=80), st.floats(1e-3, 1e3))
def test_the_sorted_window_holds_what_the_ring_holds(values: list[float], last: float) -> None:
    signal = fed([*values, last], window=16, warm=8)
    assert sorted(signal._ring) == signal._sorted
    assert len(signal._ring) == min(16, len(values) + 1)


@pytest.mark.parametrize(
    "wrong", [{"base": 0.0}, {"base": nan}, {"warm": 5}, {"warm": 120}, {"hold": 0}, {"window": 4}]
)
def test_impossible_parameters_of_s1_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        RobustZ(**{"base": 5.5, **wrong})


# ------------------------------------------------------------------------------------------- S2, the level shift


@given(st.lists(any_float.filter(lambda x: not math.isnan(x)), min_size=1, max_size=60))
def test_the_shift_is_the_sum_of_the_last_ten_clipped_scores(scores: list[float]) -> None:
    signal = LevelShift()
    for z in scores:
        signal.update(z)
    expected = sum(min(4.0, max(-4.0, z)) for z in scores[-10:]) / math.sqrt(10.0)
    assert signal.value == pytest.approx(expected, abs=1e-9)


def test_a_shift_of_two_and_a_half_sigmas_is_seen_within_ten_steps_and_one_spike_is_none() -> None:
    signal = LevelShift()
    assert not any(signal.update(z) for z in [0.0] * 20 + [inf] + [0.0] * 20)
    changes = [signal.update(2.5) for _ in range(10)]
    assert changes.index(True) == 8
    assert signal.active
    changes = [signal.update(0.0) for _ in range(10)]
    assert sum(changes) == 1
    assert not signal.active


@given(st.lists(st.floats(-9, 9), max_size=40))
def test_s2_goes_on_from_its_state(scores: list[float]) -> None:
    signal = LevelShift(threshold=3.0)
    for z in scores:
        signal.update(z)
        signal, again = through_json(signal), signal
        assert signal.state() == again.state()


@pytest.mark.parametrize("wrong", [{"threshold": 13.0}, {"threshold": -1.0}, {"length": 1}])
def test_a_level_shift_that_could_never_fire_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        LevelShift(**wrong)


# --------------------------------------------------------------------------------------------------- the burst


def test_three_spikes_in_a_hundred_are_a_burst_and_in_more_they_are_not() -> None:
    signal = SpikeBurst()
    spread = [i % 51 == 0 for i in range(300)]
    assert not any(signal.update(fired) for fired in spread)
    signal.reset()
    close = [i in {5, 50, 104} for i in range(105)]
    assert [i for i, fired in enumerate(close) if signal.update(fired)] == [104]
    assert signal.recent == 3
    assert [i for i in range(200) if signal.update(False)] == [99]


@given(st.lists(st.booleans(), max_size=200))
def test_the_burst_counts_what_the_window_holds(fired: list[bool]) -> None:
    signal = SpikeBurst(count=2, window=20)
    for f in fired:
        signal.update(f)
        signal = through_json(signal)
    assert signal.recent == sum(fired[-20:])


def test_a_burst_of_more_spikes_than_observations_is_refused() -> None:
    with pytest.raises(UsageError, match="count"):
        SpikeBurst(count=5, window=4)


# ---------------------------------------------------------------------------------------------- Page-Hinkley


@given(st.lists(st.floats(-6, 6), max_size=80))
def test_page_hinkley_is_the_cumulative_sum_above_its_minimum(residuals: list[float]) -> None:
    signal = PageHinkley(delta=0.5, threshold=1e6)
    total, minimum = 0.0, 0.0
    for z in residuals:
        signal.update(z)
        total += min(4.0, max(-4.0, z)) - 0.5
        minimum = min(minimum, total)
        assert signal.value == pytest.approx(total - minimum, abs=1e-9)


def test_a_drift_of_one_and_a_half_sigmas_is_seen_when_twenty_have_gathered() -> None:
    signal = PageHinkley()
    assert [i for i in range(40) if signal.update(1.5)] == [20]
    assert signal.active
    assert sum(signal.update(0.0) for _ in range(100)) == 1
    assert not signal.active


@given(st.lists(st.floats(-9, 9), max_size=40))
def test_page_hinkley_goes_on_from_its_state(residuals: list[float]) -> None:
    signal = PageHinkley(threshold=3.0)
    for z in residuals:
        signal.update(z)
        signal, again = through_json(signal), signal
        assert signal.state() == again.state()


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"threshold": inf}])
def test_impossible_parameters_of_page_hinkley_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PageHinkley(**wrong)
