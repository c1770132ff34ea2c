"""What a candidate must show: a fork spends of the session's alpha, averages of one trajectory have a threshold of their own."""

from __future__ import annotations

from typing import Any

import pytest

from automode.engine.story import story
from automode.planner.events import Envelope, Group, Weights
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


@pytest.mark.parametrize(
    ("guard", "verdict"), [(0.0, "accepted"), (-0.0115, "accepted"), (-0.012, "inconclusive")]
)
def test_what_the_log_score_favours_must_not_cost_accuracy(
    guard: float, verdict: str, make_world: Any, plateau_rows: Any
) -> None:
    world = make_world(
        policy=Policy.model_validate({"reasons": ["merge_cadence"]}),
        guard=Group(n=200, mean=guard, variance=0.01, effective_n=200.0),  # a standard error of 0.0071
        merged={"metric": "log_score", "noise_at_most": 0.03},
    )
    world.start()
    world.rows(plateau_rows)
    world.end()
    (asked,) = [e.body for e in world.log if isinstance(e, Envelope) and e.body.kind == "evaluate"]
    (given,) = world.facts("verdict_given")
    assert asked.metric == given.metric == "log_score"
    assert given.verdict == verdict
    assert given.guard == pytest.approx(guard / 0.0070711, abs=1e-3)
    assert given.why.endswith("compared by the log score, since at most 3.0% of the labels are wrong")
    (card,) = world.state.cards
    told = story(card, [e for e in world.log if isinstance(e, Envelope)])
    assert "log score 0.6000 (tail)" in told
    assert given.why in told


LOG_SCORE, UTILITY = {"metric": "log_score", "noise_at_most": 0.03}, {"noise_at_most": 0.31}


def differences(mean: float) -> Group:
    """Of 200 samples, with a standard error of 0.0071; of two halves together 0.0050."""
    return Group(n=200, mean=mean, variance=0.01, effective_n=200.0)


@pytest.mark.parametrize(
    ("merged", "on_a", "on_b", "verdict"),
    [
        (LOG_SCORE, -0.004, -0.005, "accepted"),
        (LOG_SCORE, -0.020, 0.012, "accepted"),
        (LOG_SCORE, -0.004, -0.007, "inconclusive"),  # over half a point
        (LOG_SCORE, -0.005, -0.005, "accepted"),
        (UTILITY, 0.006, 0.006, "accepted"),
        (UTILITY, -0.004, 0.016, "accepted"),
        (UTILITY, 0.006, 0.002, "inconclusive"),  # ahead by less than one standard error
        (UTILITY, -0.03, -0.03, "inconclusive"),
    ],
)
def test_what_one_metric_favours_the_other_must_allow_over_both_halves(
    merged: dict[str, Any],
    on_a: float,
    on_b: float,
    verdict: str,
    make_world: Any,
    plateau_rows: Any,
) -> None:
    world = make_world(
        policy=Policy.model_validate({"reasons": ["merge_cadence"]}),
        guard=differences(on_b),
        merged=merged | {"guard": differences(on_a)},
    )
    world.start()
    world.rows(plateau_rows)
    world.end()
    (given,) = world.facts("verdict_given")
    assert given.verdict == verdict
    assert given.guard == pytest.approx((on_a + on_b) / 2 / 0.0050, abs=0.4)
    if verdict == "inconclusive":
        assert ("the accuracy" if merged is LOG_SCORE else "the log score") in given.why


def test_where_labels_may_be_wrong_accuracy_and_p_are_compared_and_the_card_says_why(
    make_world: Any, plateau_rows: Any
) -> None:
    world = make_world(
        policy=Policy.model_validate({"reasons": ["merge_cadence"]}),
        merged={
            "noise_at_most": 0.31,
            "weights": Weights(checkpoint="sha256:" + 64 * "b", choice="ema10"),
            "best_step": 700,
        },
    )
    world.start()
    world.rows(plateau_rows)
    world.end()
    (given,) = world.facts("verdict_given")
    assert (given.metric, given.guard, given.candidate) == ("utility", None, "best:ema10")
    assert given.why.endswith("since no more is shown than that at most 31.0% of the labels are wrong")
    (card,) = world.state.cards
    told = story(card, [e for e in world.log if isinstance(e, Envelope)])
    assert "utility 0.6000 (ema10 of the best validated state, of step 700)" in told


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
