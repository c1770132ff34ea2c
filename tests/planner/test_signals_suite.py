"""The whole set of signals behind one call: what it tells, what resets it, and that blocks do not matter."""

from __future__ import annotations

import json
from itertools import pairwise
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import UsageError
from automode.planner.signals import Reading, SignalSuite, SliceMeasure, TrendState
from automode.planner.signals.current import READERS


def noisy(level: Any, sigma: float = 0.05, seed: int = 0) -> Any:
    level = np.asarray(level, dtype=float)
    return level * np.exp(sigma * np.random.default_rng(seed).standard_normal(level.size))


def run(
    losses: Any, norms: Any = None, rates: Any = None, suite: SignalSuite | None = None, **keywords: Any
) -> tuple[SignalSuite, list[Reading]]:
    suite = suite or SignalSuite(**keywords)
    told: list[Reading] = []
    for step, loss in enumerate(losses):
        norm = None if norms is None else float(norms[step])
        rate = None if rates is None else float(rates[step])
        told.extend(suite.observe(step, float(loss), norm, rate) or ())
    return suite, told


def states(told: list[Reading], name: str) -> list[tuple[int, str]]:
    return [(r.step, r.state) for r in told if r.name == name]


def wild(seed: int, n: int) -> dict[str, list[Any]]:
    """A run in which everything happens: noise, spikes, NaN, skipped steps, jumps of the rate, a shift, losses below 0."""
    rng = np.random.default_rng(seed)
    loss = noisy(2.0 * (np.arange(n) + 20.0) ** -0.3, 0.1, seed)
    norm = noisy(np.ones(n), 0.3, seed + 1)
    rate = np.full(n, 0.1)
    for _ in range(4):
        at = int(rng.integers(0, n))
        loss[at] = rng.choice([nan, inf, 1e9, 0.0, -1.0])
        norm[int(rng.integers(0, n))] = rng.choice([nan, inf, 0.0, 1e6])
        rate[int(rng.integers(0, n)) :] *= rng.choice([0.1, 0.95, 2.0])
    loss[int(rng.integers(0, n)) :] *= 3.0
    applied = np.ones(n, dtype=bool)
    at = int(rng.integers(0, n))
    applied[at : at + int(rng.integers(1, 9))] = False
    measured: list[float | None] = norm.tolist()
    for i in rng.integers(0, n, 3).tolist():
        measured[i] = None
    return {
        "step": list(range(n)),
        "loss": loss.tolist(),
        "grad_norm": measured,
        "lr": rate.tolist(),
        "applied": applied.tolist(),
    }


# ------------------------------------------------------------------------------------------------- what is told


def test_nothing_is_told_while_nothing_changes() -> None:
    _, told = run(noisy(np.ones(190)), noisy(np.ones(190), 0.2), np.full(190, 0.1))
    assert told == []


def test_a_spike_is_told_once_with_its_numbers() -> None:
    losses = noisy(np.ones(300))
    losses[150] = 50.0
    _, told = run(losses)
    assert states(told, "loss_spike") == [(150, "SPIKE"), (162, "QUIET")]
    reading = told[0]
    assert reading.value > reading.threshold == 4.5
    assert reading.details["recent_spikes"] == 1


def test_a_nan_is_told_at_its_own_step_by_both_signals() -> None:
    losses = noisy(np.ones(300))
    losses[150] = nan
    _, told = run(losses, noisy(np.ones(300)))
    assert (150, "NON_FINITE") in states(told, "non_finite")
    assert (151, "FINITE") in states(told, "non_finite")
    assert states(told, "loss_spike")[0] == (150, "SPIKE")
    assert next(r for r in told if r.name == "loss_spike").value == inf


def test_spikes_of_loss_and_gradient_norm_make_a_burst_together() -> None:
    losses, norms = noisy(np.ones(400)), noisy(np.ones(400), 0.1, 1)
    losses[[150, 220]] = 50.0
    norms[190] = 1e5
    _, told = run(losses, norms)
    assert states(told, "spike_burst") == [(220, "BURST"), (320, "QUIET")]


def test_a_level_that_doubles_is_a_shift_and_a_drift() -> None:
    suite, told = run(noisy([1.0] * 200 + [1.3] * 40, 0.1))
    assert states(told, "level_shift")[0][1] == "SHIFTED"
    assert 200 < states(told, "level_shift")[0][0] < 212
    assert states(told, "drift")[0][1] == "DRIFTING"
    assert suite.trend.blocks <= 2, "an excursion starts the plateau's window anew"
    assert suite.reset_by == "level shift"


def test_an_optimizer_that_stops_stepping_is_told() -> None:
    suite = SignalSuite()
    told = [suite.observe(i, 1.0, 1.0, 0.1, i < 10) for i in range(16)]
    assert [i for i, t in enumerate(told) if t] == [14]
    assert told[14] is not None
    assert (told[14][0].name, told[14][0].state, told[14][0].value) == ("skipped_steps", "STALLED", 5.0)


@pytest.mark.no_cover
def test_the_trend_is_told_at_either_confidence() -> None:
    suite, told = run(noisy(0.5 + 2.0 * (np.arange(9000) + 50.0) ** -0.6, 0.1))
    assert states(told, "trend")[0] == (199, "IMPROVING")
    assert states(told, "trend")[-1][1] == "PLATEAU"
    last = [r for r in told if r.name == "trend"][-1]
    assert last.threshold == 0.01
    assert last.window in (1600, 3200)
    assert last.details["execute_state"] == "PLATEAU"
    advised = next(r for r in told if r.state == "PLATEAU")
    executed = next(r for r in told if r.details.get("execute_state") == "PLATEAU")
    assert advised.step <= executed.step
    assert suite.trend.firm is TrendState.PLATEAU


def test_a_slow_rise_is_told_as_a_divergence() -> None:
    _, told = run(noisy(np.linspace(1.0, 3.0, 1600)))
    assert states(told, "slow_divergence")[0][1] == "REGRESSING"
    reading = next(r for r in told if r.name == "slow_divergence")
    assert reading.value >= reading.threshold == 0.1
    assert any(r.name == "trend" and r.state == "REGRESSING" for r in told)


@pytest.mark.no_cover
def test_a_plateau_is_not_told_after_a_spike_from_which_the_loss_recovers() -> None:
    # A bump of x3 that decays over 500 steps while the loss keeps falling, 10 % noise, 40 runs: the best rule of the study
    # erred in 3 of 50, patience in 39. Measured here: 0 of 300; 3 of 40 would have probability below 1e-4 at a rate of 0.5 %.
    wrong = 0
    for seed in range(40):
        t = np.arange(3400)
        bump = np.where(t >= 2200, 2.0 * np.exp(-(t - 2200) / 167.0), 0.0)
        suite = SignalSuite()
        for step, loss in enumerate(noisy(2.0 * (t + 50.0) ** -0.3 * (1.0 + bump), 0.1, seed)):
            suite.observe(step, float(loss))
            if step >= 2200 and suite.trend.status is TrendState.PLATEAU:
                wrong += 1
                break
    assert wrong < 3


def test_every_signal_can_be_asked_at_any_time() -> None:
    suite, _ = run(noisy(np.ones(500)), noisy(np.ones(500)))
    readings = suite.readings()
    assert list(readings) == list(READERS)
    for name, reading in readings.items():
        assert reading.name == name
        assert reading == suite.reading(name)
        json.dumps(reading.to_dict(), allow_nan=False)
    with pytest.raises(UsageError, match="no signal 'mood'"):
        suite.reading("mood")


def test_what_can_be_asked_before_the_first_step_is_quiet() -> None:
    quiet = {r.state for r in SignalSuite().readings().values()}
    assert quiet == {"FINITE", "STEPPING", "QUIET", "LEVEL", "STEADY", "UNKNOWN"}


# ------------------------------------------------------------------------------------------------------- resets


@pytest.mark.parametrize(
    ("factor", "resets"), [(0.5, True), (1.11, True), (0.89, True), (1.09, False), (0.91, False)]
)
def test_a_learning_rate_that_jumps_by_more_than_ten_percent_starts_the_trend_anew(
    factor: float, resets: bool
) -> None:
    rates = np.array([0.1] * 1000 + [0.1 * factor] * 100)
    suite, told = run(noisy(np.ones(1100)), rates=rates)
    assert (suite.trend.blocks == 5) is resets
    assert (suite.reset_by != "") is resets
    if resets:
        reading = next(r for r in told if r.name == "trend" and r.step == 1000)
        assert reading.state == "UNKNOWN"
        assert str(reading.details["reset_by"]).startswith("learning rate 0.1 -> ")
        assert suite.loss_z.ready, "a jump of the rate leaves the spike windows as they are"


def test_smooth_schedules_do_not_reset() -> None:
    t = np.arange(3000)
    rates = 0.1 * 0.5 * (1.0 + np.cos(np.pi * t / 3200))
    suite, _ = run(noisy(np.ones(3000)), rates=rates)
    assert suite.trend.blocks == 150


def test_a_learning_rate_that_is_unknown_or_not_finite_resets_nothing() -> None:
    rates = [0.1] * 500 + [nan] * 50 + [0.1] * 50
    suite, _ = run(noisy(np.ones(600)), rates=rates)
    assert suite.trend.blocks == 30
    assert suite.observe(600, 1.0, None, None) is None
    assert suite.reset_by == ""


def test_a_rate_that_leaves_zero_has_jumped() -> None:
    suite, _ = run(noisy(np.ones(600)), rates=[0.0] * 300 + [0.1] * 300)
    assert suite.trend.blocks == 15


def test_a_reset_starts_every_window_anew_and_tells_what_it_ended() -> None:
    losses = noisy(np.ones(2000))
    losses[-1] = 50.0
    suite, _ = run(losses, noisy(np.ones(2000)))
    suite.observe_validation(2000, 1.0, {"s": SliceMeasure(mean=0.1, rest=0.2, se=0.1, n=30)})
    told = suite.reset("adopted")
    assert told is not None
    assert {(r.name, r.state) for r in told} == {("loss_spike", "QUIET"), ("trend", "UNKNOWN")}
    assert next(r for r in told if r.name == "trend").details["reset_by"] == "adopted"
    assert not suite.loss_z.ready
    assert suite.gap.validations == 0
    assert suite.slices.tracks == {}
    assert suite.reset("again") is None


# ------------------------------------------------------------------------------------------------------- blocks


@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, 700), max_size=6))
def test_how_steps_are_grouped_in_blocks_changes_nothing(seed: int, cuts: list[int]) -> None:
    columns = wild(seed, 700)
    one = SignalSuite(budget=60)
    told = [r for row in zip(*columns.values(), strict=True) for r in one.observe(*row) or ()]
    many = SignalSuite(budget=60)
    in_blocks: list[Reading] = []
    edges = [0, *sorted(cuts), 700]
    for a, b in pairwise(edges):
        in_blocks.extend(many.observe_block({name: column[a:b] for name, column in columns.items()}))
    assert repr(in_blocks) == repr(told)
    assert many.state() == one.state()


@given(seed=st.integers(0, 2**16), cut=st.integers(0, 400))
def test_the_suite_goes_on_from_its_state(seed: int, cut: int) -> None:
    columns = wild(seed, 400)
    whole, parted = SignalSuite(budget=60), SignalSuite(budget=60)
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        if i == cut:
            parted = SignalSuite.from_state(json.loads(json.dumps(parted.state(), allow_nan=False)))
        if i % 40 == 39:
            measures = {"s": SliceMeasure(mean=row[1], rest=1.0, se=0.1, n=50)}
            told = whole.observe_validation(i, row[1], measures)
            assert repr(told) == repr(parted.observe_validation(i, row[1], measures))
        assert repr(whole.observe(*row)) == repr(parted.observe(*row))
    assert whole.state() == parted.state()


def test_arrays_and_lists_give_the_same_readings() -> None:
    losses = noisy(np.ones(600))
    losses[300] = 40.0
    lists, arrays = SignalSuite(), SignalSuite()
    told = lists.observe_block({"step": list(range(600)), "loss": losses.tolist()})
    assert arrays.observe_block({"step": np.arange(600), "loss": losses}) == told
    assert told
    assert all(type(r.value) is float for r in told)
    assert arrays.state() == lists.state()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"step": [1]}, "`loss` is missing"),
        ({"loss": [1.0]}, "`step` is missing"),
        ({"step": [1], "loss": [1.0], "lr": [0.1, 0.1]}, "`lr` has 2 rows"),
        ({"step": [1], "loss": [1.0], "gnorm": [1.0]}, "unknown columns"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SignalSuite().observe_block(columns)


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(UsageError, match="version"):
        SignalSuite.from_state({**SignalSuite().state(), "version": 0})


# --------------------------------------------------------------------------------------------- from other signals


def test_a_loss_below_zero_gives_the_trend_its_scale() -> None:
    suite, told = run(np.random.default_rng(0).normal(0.0, 1.0, 3000))
    assert suite.trend.level_scale == suite.loss_z.scale > 0.0
    assert not [r for r in told if r.name == "loss_spike"]


def test_a_validation_is_set_against_the_median_training_loss() -> None:
    suite, _ = run(noisy(np.full(200, 2.0)))
    assert suite.observe_validation(200, 3.0) is None
    assert suite.gap.gap == pytest.approx(1.0, abs=0.03)


def test_a_widening_gap_and_a_lagging_slice_are_told() -> None:
    suite = SignalSuite()
    told: list[Reading] = []
    for validation in range(24):
        run(noisy(np.full(60, 2.0 / (validation + 1.0)), 0.02, validation), suite=suite)
        held_out = 1.0 + 0.03 * abs(validation - 8)
        measures = {"night": SliceMeasure(mean=0.5, rest=0.7, se=0.02, n=80)}
        told.extend(suite.observe_validation(60 * validation, held_out, measures) or ())
    assert [r.state for r in told if r.name == "generalization_gap"] == ["STEADY", "WIDENING"]
    lag = next(r for r in told if r.name == "slice_underperformance")
    assert (lag.state, lag.details["slice"], lag.window) == ("LAGGING", "night", 3)
    assert lag.value == pytest.approx(-10.0)
    assert [Reading.from_dict(r.to_dict()) for r in told] == told
