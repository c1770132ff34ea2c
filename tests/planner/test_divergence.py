"""When a loss has certainly diverged: what counts, and everything that must not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.planner.divergence import WIDTH, LevelWatch, keep_every_of, patience_of
from automode.planner.policy import SafeguardPolicy


def followed(losses, *, every: int = 10, rising: bool = False, patience: int = 40):
    """Feed losses as the fold does; returns the watch and the first step at which it says that the run diverged."""
    watch = LevelWatch(above=3.0, patience=patience)
    first = None
    for step, loss in enumerate(losses, 1):
        watch.recent.append(float(loss))
        if watch.first is None:
            watch.begin(float(loss))
        if step % every == 0:
            watch.look(step, rising=rising)
            if first is None and watch.diverged(step):
                first = step
    return watch, first


def learning(n: int, seed: int = 0, noise: float = 0.15, floor: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (floor + (2.3 - floor) * np.exp(-np.arange(n) / 100)) * np.exp(noise * rng.standard_normal(n))


def test_a_loss_that_jumps_far_up_and_stays_there_has_diverged_after_the_patience() -> None:
    losses = np.concatenate([learning(400), np.full(200, 5.0)])
    watch, at = followed(losses, patience=40)
    assert at is not None
    assert 440 < at <= 470
    assert watch.sound_at < 415


@pytest.mark.parametrize("seed", range(5))
def test_learning_is_no_divergence(seed: int) -> None:
    assert followed(learning(3000, seed, noise=0.4))[1] is None


def test_a_spike_that_decays_is_no_divergence() -> None:
    losses = learning(1000)
    losses[500:540] *= 20.0 * np.exp(-np.arange(40) / 8)
    assert followed(losses)[1] is None


def test_a_loss_near_zero_may_multiply() -> None:
    # Memorised down to 1e-4, then a hundred times that: nothing of what was learnt is lost.
    losses = np.concatenate([2.3 * np.exp(-np.arange(1000) / 100).clip(1e-4 / 2.3), np.full(500, 1e-2)])
    assert followed(losses)[1] is None


@pytest.mark.parametrize("seed", range(20))
def test_one_lucky_first_loss_of_a_noisy_run_is_no_reference(seed: int) -> None:
    # Squared errors of single samples: chi-squared with one degree of freedom, spread over many powers of ten.
    losses = np.random.default_rng(seed).standard_normal(2000) ** 2
    losses[0] = 1e-4
    assert followed(losses)[1] is None


def test_a_run_that_explodes_from_its_first_step_is_measured_by_its_first_loss() -> None:
    losses = np.concatenate([[2.3, 9.0, 80.0], np.full(200, 300.0)])
    assert followed(losses)[1] is not None


def test_losses_that_are_not_finite_stand_above_everything() -> None:
    assert followed(np.concatenate([learning(300), np.full(100, np.nan)]))[1] is not None


def test_a_signed_loss_has_no_such_level() -> None:
    assert followed(np.concatenate([learning(300) - 1.0, np.full(300, 1e6)]))[1] is None


def test_a_noisy_rise_that_loses_everything_learnt_needs_the_trend_to_say_so() -> None:
    # A hard and noisy task: from 2.3 down to 1.5 and back is far from three times the lowest level.
    noise = np.exp(0.5 * np.random.default_rng(0).standard_normal(600))
    losses = np.concatenate([np.linspace(2.3, 1.5, 400), np.full(200, 2.4)]) * noise
    losses[0] = 2.3
    assert followed(losses)[1] is None
    assert followed(losses, rising=True)[1] is not None


def test_a_clear_rise_that_loses_everything_learnt_counts_by_itself() -> None:
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(600))
    losses = np.concatenate([np.linspace(2.3, 1.5, 400), np.full(200, 2.3)]) * noise
    assert followed(losses)[1] is not None


def test_beginning_anew_forgets_the_lowest_level_but_not_the_first_loss() -> None:
    watch, _ = followed(learning(500))
    watch.restart(500)
    assert watch.lowest == math.inf
    assert watch.top == pytest.approx(learning(1)[0])
    assert not watch.diverged(10**9)


def test_weights_of_before_are_measured_by_the_level_of_then() -> None:
    watch, _ = followed(learning(500))
    watch.restart(600, at=120)
    assert 0.5 < math.exp(watch.lowest) < 1.5  # and not the 0.3 that came later
    watch.begin(0.01)  # one lucky batch is no level
    assert math.exp(watch.lowest) > 0.5


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(st.floats(min_value=1e-300, max_value=1e300), st.sampled_from([math.nan, math.inf])),
        min_size=1,
        max_size=200,
    ),
    st.integers(1, 40),
)
def test_any_losses_can_be_followed(losses: list[float], every: int) -> None:
    watch, at = followed(losses, every=every, patience=1)
    assert at is None or at > WIDTH
    assert watch.sound_at <= len(losses)


def test_spans_follow_the_planning_budget_unless_given() -> None:
    assert (patience_of(SafeguardPolicy(), 800), keep_every_of(SafeguardPolicy(), 800)) == (100, 200)
    assert (patience_of(SafeguardPolicy(), 40), keep_every_of(SafeguardPolicy(), 40)) == (20, 20)
    given_ = SafeguardPolicy(rewind_patience=7, keep_every=9)
    assert (patience_of(given_, 800), keep_every_of(given_, 800)) == (7, 9)
