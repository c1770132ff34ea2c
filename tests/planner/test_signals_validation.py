"""Signals from one validation to the next: the generalisation gap and the slices."""

from __future__ import annotations

import json
import math
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import UsageError
from automode.planner.signals import (
    GapState,
    GeneralizationGap,
    SliceMeasure,
    SliceStatus,
    SliceWatch,
)


def through_json(signal: Any) -> Any:
    return type(signal).from_state(json.loads(json.dumps(signal.state(), allow_nan=False)))


# ----------------------------------------------------------------------------------------------------- the gap


def gap_after(held_out: Any, training: Any, **keywords: Any) -> GeneralizationGap:
    signal = GeneralizationGap(**keywords)
    for step, (v, t) in enumerate(zip(held_out, training, strict=True)):
        signal.update(100 * step, float(v), float(t))
    return signal


def falling(n: int) -> Any:
    return 1.0 / (np.arange(n) + 2.0)


def test_a_held_out_loss_that_rises_while_training_falls_is_a_widening_gap() -> None:
    held_out = 1.0 + 0.02 * np.abs(np.arange(22) - 8)
    signal = gap_after(held_out, falling(22))
    assert signal.status is GapState.WIDENING
    assert signal.best_step == 800
    assert signal.best == 1.0
    assert signal.rise == pytest.approx(0.24)
    assert signal.held_out_z > 2.33
    assert signal.training_z < -1.645


def test_the_rise_must_last_three_validations_beyond_the_test() -> None:
    # Six rising values after the best are the fewest with z >= 2.33; two more make three validations in a row.
    held_out = 1.0 + 0.05 * np.maximum(np.arange(20) - 8, 0)
    held_out[:8] += 0.5
    signal = GeneralizationGap()
    training = falling(20)
    changes = [i for i in range(20) if signal.update(i, float(held_out[i]), float(training[i]))]
    assert changes == [5, 16]
    assert signal.status is GapState.WIDENING


@pytest.mark.parametrize(
    ("held_out", "training"),
    [
        (1.0 + falling(30), falling(30)),
        (1.0 + 0.02 * np.abs(np.arange(30) - 8), np.ones(30)),
        (1.0 + 0.02 * np.abs(np.arange(30) - 8), 1.0 + 0.02 * np.arange(30)),
        (1.0 + 0.0005 * np.abs(np.arange(30) - 8), falling(30)),
    ],
    ids=["both fall", "training stands", "both rise", "rises too little to matter"],
)
def test_a_gap_that_does_not_widen_is_steady(held_out: Any, training: Any) -> None:
    assert gap_after(held_out, training).status is GapState.STEADY


def test_fewer_than_six_validations_say_nothing() -> None:
    assert gap_after(np.arange(5) + 1.0, falling(5)).status is GapState.UNKNOWN


def test_a_new_best_ends_a_widening_gap() -> None:
    held_out = [*(1.0 + 0.02 * np.abs(np.arange(22) - 8)), 0.5]
    assert gap_after(held_out, falling(23)).status is GapState.STEADY


@pytest.mark.no_cover
def test_a_flat_noisy_held_out_loss_is_rarely_called_rising() -> None:
    # 200 runs of 40 validations with 2 % noise; measured rate 0.011 a run. 12 or more have probability below 1e-5 at that rate.
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(200):
        signal = GeneralizationGap()
        for step in range(40):
            signal.update(step, 1.0 + 0.02 * rng.standard_normal(), 1.0 / (step + 2.0))
            if signal.status is GapState.WIDENING:
                alarms += 1
                break
    assert alarms < 12


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_validation_that_is_not_finite_is_passed_over(bad: float) -> None:
    signal = gap_after(1.0 + falling(8), falling(8))
    before = signal.state()
    assert not signal.update(900, bad, 1.0)
    assert not signal.update(900, 1.0, bad)
    assert signal.state() == before


def test_a_held_out_loss_below_zero_is_judged_against_its_scale() -> None:
    signal = GeneralizationGap()
    signal.scale = 2.0
    for step in range(22):
        signal.update(step, -0.01 + 0.05 * abs(step - 8), 1.0 / (step + 2.0))
    assert signal.status is GapState.WIDENING
    assert signal.rise == pytest.approx(0.05 * 12 / math.hypot(0.01, 2.0))


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), max_size=30))
def test_the_gap_goes_on_from_its_state(pairs: list[tuple[float, float]]) -> None:
    signal = GeneralizationGap(window=6)
    for step, pair in enumerate(pairs):
        signal.update(step, *pair)
        signal, before = through_json(signal), signal
        assert repr(signal.state()) == repr(before.state())
        assert signal.status is before.status


@pytest.mark.parametrize(
    "wrong", [{"window": 5}, {"persistence": 0}, {"min_rise": 0.0}, {"z_rise": nan}, {"z_fall": -1.0}]
)
def test_impossible_parameters_of_the_gap_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        GeneralizationGap(**wrong)


# --------------------------------------------------------------------------------------------------- the slices


def measure(gap: float, se: float = 0.02, n: int = 100) -> SliceMeasure:
    return SliceMeasure(mean=0.8 + gap, rest=0.8, se=se, n=n)


def test_a_slice_that_is_worse_three_times_in_a_row_lags() -> None:
    watch = SliceWatch()
    told = [watch.update({"night": measure(-0.1), "day": measure(0.01)}) for _ in range(4)]
    assert told == [[], [], ["day", "night"], []]
    assert watch.tracks["night"].status is SliceStatus.LAGGING
    assert watch.tracks["day"].status is SliceStatus.EVEN
    assert watch.lagging == ("night",)


def test_one_good_validation_ends_the_lag() -> None:
    watch = SliceWatch()
    for gap in (-0.1, -0.1, 0.0, -0.1, -0.1):
        watch.update({"s": measure(gap)})
    assert watch.tracks["s"].status is SliceStatus.EVEN
    watch.update({"s": measure(-0.1)})
    assert watch.tracks["s"].status is SliceStatus.LAGGING
    assert watch.update({"s": measure(0.0)}) == ["s"]
    assert watch.lagging == ()


def test_the_threshold_grows_with_the_number_of_slices() -> None:
    watch = SliceWatch()
    watch.update({"only": measure(0.0)})
    assert watch.threshold == pytest.approx(1.645, abs=1e-3)
    watch.update({f"s{i}": measure(0.0) for i in range(10)})
    assert watch.threshold == pytest.approx(2.576, abs=1e-3)


def test_the_worst_slice_comes_first() -> None:
    watch = SliceWatch()
    for _ in range(3):
        watch.update({"bad": measure(-0.2), "worse": measure(-0.3), "fine": measure(0.1)})
    assert watch.lagging == ("worse", "bad")


def test_a_slice_that_catches_up_says_so_by_its_trend() -> None:
    watch = SliceWatch()
    for i in range(12):
        watch.update({"s": measure(-0.5 + 0.03 * i)})
    assert watch.tracks["s"].status is SliceStatus.LAGGING
    assert watch.tracks["s"].gap_z > 3.0


@pytest.mark.parametrize(
    "unjudged",
    [measure(-0.5, n=19), measure(nan), measure(-0.5, se=nan), measure(-inf), measure(-0.5, se=-1.0)],
)
def test_a_slice_that_cannot_be_judged_keeps_its_state(unjudged: SliceMeasure) -> None:
    watch = SliceWatch()
    for _ in range(5):
        assert watch.update({"s": unjudged}) == []
    assert watch.tracks == {}


def test_a_difference_too_small_to_matter_does_not_lag_however_certain() -> None:
    watch = SliceWatch(min_gap=0.05)
    for _ in range(5):
        watch.update({"s": measure(-0.04, se=0.001)})
    assert watch.lagging == ()


def test_a_slice_whose_samples_all_agree_has_an_infinite_z_in_the_direction_of_its_gap() -> None:
    assert [measure(g, se=0.0).z for g in (-0.1, 0.0, 0.1)] == [-inf, 0.0, inf]
    assert math.isnan(SliceMeasure(mean=0.0, rest=1.0, se=0.1, n=1).z)


@pytest.mark.no_cover
def test_slices_that_are_no_worse_rarely_lag() -> None:
    # 300 runs, 8 equal slices, 20 validations with *independent* noise (the best case for repeating): a run of three has probability
    # (0.05 / 8)^3 a slice and validation, 4e-5 in all a run. One alarm in 300 has probability 0.012, two 7e-5.
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        watch = SliceWatch()
        found = False
        for _ in range(20):
            watch.update({f"s{i}": measure(0.02 * z) for i, z in enumerate(rng.standard_normal(8))})
            found = found or bool(watch.lagging)
        alarms += found
    assert alarms <= 1


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a", "b", "c"]),
            st.builds(
                SliceMeasure,
                mean=st.floats(-1, 1),
                rest=st.floats(-1, 1),
                se=st.floats(0, 1),
                n=st.integers(0, 60),
            ),
        ),
        max_size=12,
    )
)
def test_the_slices_go_on_from_their_state(validations: list[dict[str, SliceMeasure]]) -> None:
    watch = SliceWatch(persistence=2)
    for measures in validations:
        watch.update(measures)
        watch, before = through_json(watch), watch
        assert watch.state() == before.state()
        assert watch.lagging == before.lagging


@pytest.mark.parametrize(
    "wrong", [{"alpha": 0.0}, {"persistence": 0}, {"min_samples": 1}, {"min_gap": -0.1}, {"min_gap": nan}]
)
def test_impossible_parameters_of_the_slices_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SliceWatch(**wrong)
