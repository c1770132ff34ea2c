"""What a candidate must show: a fork spends of the session's alpha, averages of one trajectory have a threshold of their own."""

from __future__ import annotations

from typing import Any

import pytest

from automode.planner.events import Group
from automode.planner.policy import Policy


@pytest.mark.parametrize(
    ("mean", "least", "verdict"),
    [
        (0.0115, 1.0, "accepted"),
        (0.0115, 1.64, "inconclusive"),
        (0.0060, 1.0, "inconclusive"),
        (-0.03, 1.0, "rejected"),
    ],
)
def test_the_finishing_merge_is_held_to_the_threshold_of_averages_and_spends_no_alpha(
    mean: float, least: float, verdict: str, make_world: Any, plateau_rows: Any
) -> None:
    world = make_world(
        policy=Policy.model_validate({"reasons": ["merge_cadence"], "averages": {"z": least}}),
        evidence=Group(n=200, mean=mean, variance=0.01, effective_n=200.0),  # a standard error of 0.0071
    )
    world.start()
    world.rows(plateau_rows)
    world.end()
    (given,) = world.facts("verdict_given")
    assert given.verdict == verdict
    assert given.threshold == pytest.approx(least, abs=0.02)
    assert given.look is None
    assert world.state.spending.looks == 0


def test_a_run_that_may_act_gets_its_least_number_of_scans_whatever_they_cost_in_time(
    make_world: Any, plateau_rows: Any
) -> None:
    def scans(mode: str, least: int) -> int:
        policy = Policy.model_validate(
            {"reasons": ["high_loss_tail"], "scan": {"at_least": least, "every": 100}}
        )
        world = make_world(policy=policy, mode=mode, scanned={"rest": 10**6})
        world.start()
        world.rows(plateau_rows)
        return len(world.state.scanned)

    assert scans("act", 0) == scans("observe", 6) == 1
    assert scans("act", 6) >= 5
