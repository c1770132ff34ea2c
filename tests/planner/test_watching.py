"""Every threshold of the policy lands in a signal, and no policy exists that the signals refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from automode.planner.inputs import Validated
from automode.planner.policy import Policy
from automode.planner.signals.suite import SignalSuite
from automode.planner.watching import signals_for, watch_validation


def test_the_default_policy_asks_for_the_suites_own_thresholds() -> None:
    mine, theirs = signals_for(Policy(), 800).state(), SignalSuite().state()
    for name in ("non_finite", "loss_z", "grad_norm_z", "joint_z", "burst", "shift", "drift", "trend"):
        assert mine[name] == theirs[name], name


def test_every_threshold_lands_in_its_signal() -> None:
    policy = Policy.model_validate(
        {
            "trend": {"gain": 0.02, "z_advise": 1.1, "z_execute": 2.2, "regress_rise": 0.3},
            "spike": {
                "window": 51,
                "warmup": 20,
                "loss_z": 4.4,
                "grad_norm_z": 6.6,
                "joint_z": 7.7,
                "shift_z": 8.8,
                "count": 5,
                "within": 70,
                "unapplied": 9,
            },
            "slices": {"persist": 4, "alpha": 0.01, "gap": 0.03},
            "gap": {"persist": 3, "rise": 0.07},
            "evidence": {"min_samples": 44},
        }
    )
    suite = signals_for(policy, 600)
    trend = suite.trend
    assert (trend.budget, trend.gain, trend.z_advise, trend.z_execute, trend.regress_rise) == (
        600,
        0.02,
        1.1,
        2.2,
        0.3,
    )
    for z, base in ((suite.loss_z, 4.4), (suite.grad_norm_z, 6.6)):
        assert (z.base, z.window, z.warm) == (base, 51, 20)
    assert suite.joint_z.base == 7.7
    assert (suite.burst.count, suite.burst.window) == (5, 70)
    assert suite.shift.threshold == 8.8
    assert suite.non_finite.stall_after == 9
    watch = suite.slices
    assert (watch.persistence, watch.alpha, watch.min_gap, watch.min_samples) == (4, 0.01, 0.03, 44)
    assert (suite.gap.persistence, suite.gap.min_rise) == (3, 0.07)


def test_a_suite_of_a_policy_survives_its_state() -> None:
    policy = Policy.model_validate({"spike": {"count": 5, "within": 70, "window": 51}})
    suite = signals_for(policy, 600)
    for step in range(200):
        suite.observe(step, 1.0 + 0.01 * (step % 7), 1.0, 0.1)
    again = SignalSuite.from_state(suite.state())
    assert again.state() == suite.state()
    assert (again.burst.count, again.loss_z.window) == (5, 51)


@given(
    shift=st.floats(0.5, 12.0),
    count=st.integers(1, 50),
    within=st.integers(1, 200),
    advise=st.floats(0.1, 4.0),
    execute=st.floats(0.1, 4.0),
    gain=st.floats(1e-6, 1.0),
)
def test_a_policy_that_is_valid_has_signals(
    shift: float, count: int, within: int, advise: float, execute: float, gain: float
) -> None:
    data = {
        "spike": {"shift_z": shift, "count": count, "within": within},
        "trend": {"z_advise": advise, "z_execute": execute, "gain": gain},
    }
    if count > within or execute < advise or gain >= 1.0:
        with pytest.raises(ValidationError):
            Policy.model_validate(data)
    else:
        signals_for(Policy.model_validate(data), 400)


def test_a_validation_reaches_gap_and_slices() -> None:
    suite = signals_for(Policy(), 400)
    for step in range(60):
        suite.observe(step, 1.0, 1.0, 0.1)
    behind = {"n": 50, "mean": -0.3, "variance": 0.09}
    event = Validated.model_validate(
        {
            "step": 50,
            "loss": 0.9,
            "value": 0.5,
            "n": 100,
            "slices": {"rotated": behind, "empty": {"n": 0, "mean": 0, "variance": 0}},
        }
    )
    assert watch_validation(suite, event) is None
    assert suite.gap.best == 0.9
    assert suite.slices.tracks["rotated"].last.z == pytest.approx(-0.3 / (0.09 / 50) ** 0.5)
    assert "empty" not in suite.slices.tracks
    news = [watch_validation(suite, event.model_copy(update={"step": s})) for s in (60, 70)]
    assert news[0] is None
    assert news[1] is not None
    assert [r.details["slice"] for r in news[1] if r.name == "slice_underperformance"] == ["rotated"]
