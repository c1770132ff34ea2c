"""The planner over a loss curve is the planner of a run: the same signals, rules and pacing on the same rows."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.engine import curve
from automode.engine.curve import Finding, read_curve, with_budget
from automode.errors import UsageError
from automode.planner.policy import Policy
from automode.planner.signals import SignalSuite
from automode.planner.watching import signals_for


def noisy(level: np.ndarray, sigma: float = 0.05, seed: int = 0) -> np.ndarray:
    return np.asarray(level * np.exp(sigma * np.random.default_rng(seed).standard_normal(len(level))))


def told(findings: list[Finding], name: str) -> list[tuple[int, str]]:
    return [(f.row, f.value) for f in findings if f.name == name]


def test_its_readings_are_those_of_the_signals_of_a_run() -> None:
    loss = noisy(np.concatenate([2.0 * (np.arange(2500) + 50.0) ** -0.3, np.full(2000, 0.19)]), 0.1)
    loss[3000:3003] *= 9.0
    loss[3500] = math.nan
    norm = noisy(np.ones(len(loss)), 0.2, 1)
    rate = np.where(np.arange(len(loss)) < 4000, 0.1, 0.01)
    suite: SignalSuite = signals_for(Policy(), 800)
    expected = [
        (i, reading.name, reading.state)
        for i in range(len(loss))
        for reading in suite.observe(i, float(loss[i]), float(norm[i]), float(rate[i])) or ()
        if reading.name != "trend"
    ]
    findings = list(read_curve(loss, grad_norm=norm, lr=rate))
    mine = [(f.row, f.name, f.value) for f in findings if f.kind == "reading"]
    assert [f for f in mine if not f[1].startswith("trend")] == expected
    assert {"loss_spike", "non_finite", "trend", "trend_firm"} <= {name for _, name, _ in mine}


def test_every_trend_reading_is_a_change_and_the_firm_one_follows_the_advice() -> None:
    findings = list(read_curve(noisy(np.ones(4000), 0.1)))
    for name in ("trend", "trend_firm"):
        states = [state for _, state in told(findings, name)]
        assert all(a != b for a, b in pairwise(states))
        assert "PLATEAU" in states
    advised = next(row for row, state in told(findings, "trend") if state == "PLATEAU")
    assert advised <= next(row for row, state in told(findings, "trend_firm") if state == "PLATEAU")


def test_a_plateau_makes_a_card_and_the_finish_another() -> None:
    findings = list(read_curve(noisy(np.ones(4000))))
    cards = [(f.name, f.value) for f in findings if f.kind == "proposal"]
    assert cards[0] == ("loss_plateau", "PLATEAU")
    assert ("merge_cadence", "FINISH") in cards
    assert "the next 800 steps" in next(f.why for f in findings if f.name == "loss_plateau")


def test_an_unstable_run_makes_a_card_that_names_its_signs() -> None:
    loss = noisy(np.ones(3000))
    loss[1000:1010] = math.nan
    card = next(f for f in read_curve(loss) if f.name == "instability_spike")
    assert (card.row, card.kind, card.value) == (1000, "proposal", "NON_FINITE")
    rising = np.concatenate([np.ones(1600), np.linspace(1.0, 3.0, 800), np.full(1600, 3.0)])
    diverging = list(read_curve(noisy(rising)))
    warned = next(row for row, state in told(diverging, "slow_divergence") if state == "REGRESSING")
    assert 1600 < warned < 1600 + 400
    assert "REGRESSING" in next(f.value for f in diverging if f.name == "instability_spike")


def test_the_policys_rules_and_thresholds_are_asked() -> None:
    loss = noisy(np.ones(3000))
    loss[2000] = 2.0
    assert told(list(read_curve(loss)), "loss_spike")
    blunt = Policy.model_validate({"spike": {"loss_z": 99.0}, "reasons": ["loss_plateau"]})
    findings = list(read_curve(loss, policy=blunt))
    assert not told(findings, "loss_spike")
    assert {f.name for f in findings if f.kind == "proposal"} == {"loss_plateau"}


def test_budget_and_gain_are_the_trends() -> None:
    policy = with_budget(Policy(), budget=120, gain=0.2)
    assert (policy.trend.budget, policy.trend.gain) == (120, 0.2)
    assert with_budget(policy) == policy
    first = next(read_curve(np.ones(300), policy=policy))
    assert (first.row, first.name, first.value) == (29, "trend", "PLATEAU")  # ten blocks of three rows


@pytest.mark.parametrize(
    "wrong", [{"budget": 39}, {"budget": 0}, {"gain": 0.0}, {"gain": 1.0}, {"gain": math.nan}]
)
def test_an_impossible_budget_or_gain_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        with_budget(Policy(), **wrong)  # type: ignore[arg-type]


def test_columns_of_other_lengths_are_refused_and_no_rows_are_nothing() -> None:
    with pytest.raises(UsageError, match="2 rows, but `loss` has 3"):
        list(read_curve([1.0, 1.0, 1.0], lr=[0.1, 0.1]))
    assert list(read_curve([])) == []


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=80), st.integers(1, 80))
def test_whatever_comes_is_told_and_the_size_of_blocks_changes_nothing(
    values: list[float], size: int
) -> None:
    whole = list(read_curve(values))
    before = curve.BLOCK
    try:
        curve.BLOCK = size  # type: ignore[misc]
        assert list(read_curve(values)) == whole
    finally:
        curve.BLOCK = before  # type: ignore[misc]
    bad = [i for i, x in enumerate(values) if not math.isfinite(x)]
    if bad:
        assert (bad[0], "NON_FINITE") in told(whole, "non_finite")
