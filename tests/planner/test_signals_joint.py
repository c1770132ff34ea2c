"""Loss and gradient norm judged together, and the alarm that both share with the single scores."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import UsageError
from automode.planner.signals import JointZ, SignalSuite

score = st.floats(-20.0, 60.0) | st.just(math.inf)


@pytest.mark.parametrize(
    ("loss_z", "norm_z", "fires"),
    [
        (4.0, 4.0, True),  # 5.66, where neither alone would fire (4.5 and 6)
        (3.8, 3.9, False),  # 5.44
        (5.5 * math.sqrt(2.0) - 6.0, 6.0, False),  # at the threshold
        (5.5 * math.sqrt(2.0) - 6.0 + 1e-9, 6.0, True),
        (60.0, 1.0, False),  # a lone spike is told by its own signal
        (1.0, 60.0, False),
        (math.inf, 60.0, False),  # what is not finite is told by `non_finite`
        (60.0, 60.0, True),
    ],
)
def test_it_fires_where_both_stand_out(loss_z: float, norm_z: float, fires: bool) -> None:
    signal = JointZ(base=5.5)
    assert signal.update(loss_z, norm_z) is fires
    assert signal.fired is signal.active is fires


def test_an_event_ends_after_twelve_ordinary_steps_with_or_without_a_norm() -> None:
    signal = JointZ(base=5.5)
    assert signal.update(5.0, 5.0)
    assert not any(signal.update(0.0, 0.0) for _ in range(11))
    assert signal.active
    assert signal.pass_over()
    assert not signal.active


def test_a_threshold_that_two_cut_scores_cannot_reach_is_refused() -> None:
    with pytest.raises(UsageError, match="at most"):
        JointZ(base=8.5)


@given(st.lists(st.tuples(score, score), min_size=1, max_size=60), st.integers(0, 59))
def test_it_goes_on_from_its_state_whatever_comes(values: list[tuple[float, float]], cut: int) -> None:
    whole, parted = JointZ(base=3.0), JointZ(base=3.0)
    for i, (loss_z, norm_z) in enumerate(values):
        if i == cut:
            parted = JointZ.from_state(json.loads(json.dumps(parted.state(), allow_nan=False)))
        assert whole.update(loss_z, norm_z) == parted.update(loss_z, norm_z)
        assert (whole.fired, whole.threshold) == (parted.fired, parted.threshold)


def test_a_batch_that_raises_both_is_told_where_neither_alone_would_be() -> None:
    rng = np.random.default_rng(0)
    losses, norms = np.exp(0.1 * rng.standard_normal((2, 600)))
    losses[400] = np.exp(0.40)
    norms[400] = np.exp(0.52)
    suite = SignalSuite()
    told = [r for i in range(600) for r in suite.observe(i, float(losses[i]), float(norms[i])) or ()]
    spikes = [(r.name, r.step) for r in told if r.state == "SPIKE"]
    assert spikes == [("joint_spike", 400)]
    reading = next(r for r in told if r.name == "joint_spike")
    assert reading.value > reading.threshold == 5.5


def test_a_norm_that_is_no_longer_measured_ends_the_event() -> None:
    suite = SignalSuite()
    rng = np.random.default_rng(0)
    for i, (loss, norm) in enumerate(np.exp(0.1 * rng.standard_normal((200, 2))).tolist()):
        suite.observe(i, loss, norm)
    suite.observe(200, math.e, math.e)
    assert suite.joint_z.active
    for i in range(201, 213):
        suite.observe(i, 1.0)
    assert not suite.joint_z.active


def test_the_bar_stays_within_reach_after_many_spikes() -> None:
    signal = JointZ(base=5.5)
    for _ in range(20):
        signal.update(6.0, 6.0)
        for _ in range(12):
            signal.update(0.0, 0.0)
    assert signal.threshold == 7.5
    assert signal.update(6.0, 6.0)
