"""A rate that the first probe cannot tell from the trunk: how far apart they are is looked up, and a longer trial follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from automode.engine import fold
from automode.engine.probing import may_restart
from automode.planner.events import Group, TrialFailed
from automode.planner.policy import Policy

POLICY = Policy.model_validate({"reasons": ["learning_rate_probe"], "approval": {"ask": []}})


def about(z: float, n: int = 200) -> Group:
    """A paired difference of so many standard errors, .01 each."""
    return Group(n=n, mean=0.01 * z, variance=n * 1e-4, effective_n=float(n))


@pytest.fixture
def shelf(to_rows: Any) -> Any:
    """A loss that falls to about half and stays there."""
    steps = np.arange(1, 2401)
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(len(steps)))
    return to_rows(np.maximum(1.1, 2 * np.exp(-steps / 500)) * noise)


def probed(make_world: Any, rows: Any, value: float, evidence: Group, **more: Any) -> Any:
    world = make_world(policy=POLICY, trial_value=lambda _t, _r: value, evidence=evidence, **more)
    world.start()
    world.rows(rows)
    world.end()
    return world


def asked(world: Any, kind: str) -> list[Any]:
    return [e.body for e in world.log if getattr(e, "role", "") == "command" and e.body.kind == kind]


def cards(world: Any) -> list[Any]:
    return [p.card for p in world.facts("card_proposed")]


@pytest.mark.parametrize(("z", "follows"), [(-0.9, True), (-1.1, False)])
def test_below_the_control_the_first_half_says_how_far(
    z: float, follows: bool, make_world: Any, shelf: Any
) -> None:
    # Losing .49 of .5 is more than noise may cost, so that the standard errors alone decide.
    world = probed(make_world, shelf, 0.01, about(z))
    first, *longer = cards(world)
    assert [c.reason for c in longer] == ["learning_rate_probe"] * follows
    (look, *_), verdict = asked(world, "evaluate"), world.facts("verdict_given")[0]
    assert (look.half, look.look, verdict.look) == ("A", 0, None)
    assert f"the control 0.5000, {-z:.1f} standard errors above, " in verdict.why
    assert "% of what the run had learnt), so the second half was not looked at" in verdict.why
    assert world.state.spending.looks == 0
    if follows:
        assert longer[0].training_recipe.variants == first.training_recipe.variants
        assert longer[0].asha.max_steps > 3 * first.asha.max_steps
        # Nothing follows the longer one, so that nothing is asked of the first half any more.
        assert len(asked(world, "evaluate")) == 1
    assert fold(world.log).differences == 0


def test_above_the_control_but_not_certainly_it_is_tried_for_longer(make_world: Any, shelf: Any) -> None:
    world = probed(make_world, shelf, 0.6, about(0.5))
    assert [c.reason for c in cards(world)] == ["learning_rate_probe"] * 2
    assert [(e.half, e.look) for e in asked(world, "evaluate")] == [("B", 1), ("B", 2)]
    assert fold(world.log).differences == 0


@pytest.mark.parametrize(("value", "z"), [(0.6, -2.0), (0.6, 9.0)])
def test_what_is_rejected_or_adopted_is_not_tried_again(
    value: float, z: float, make_world: Any, shelf: Any
) -> None:
    world = probed(make_world, shelf, value, about(z))
    assert len(cards(world)) == 1
    assert world.state.probed is None


@pytest.mark.parametrize(("lost", "follows"), [(0.19, True), (0.21, False)])
def test_a_higher_rate_may_lose_a_part_of_what_was_learnt(
    lost: float, follows: bool, make_world: Any, shelf: Any
) -> None:
    told = probed(make_world, shelf, 0.0, about(-3.0)).facts("verdict_given")[0].why
    of_all = int(told.split("% of what the run")[0].rsplit(" ", 1)[1]) / 100
    value = 0.5 - 0.5 * lost / of_all
    world = probed(make_world, shelf, value, about(-3.0))
    assert len(cards(world)) == 1 + follows


def test_a_probe_reserves_no_repeat_and_a_trial_that_fails_ends_it(make_world: Any, shelf: Any) -> None:
    world = make_world(policy=POLICY, hold={"start_trial"})
    world.start()
    world.rows(shelf[:600])
    start = next(e for e in world.log if getattr(e, "role", "") == "command" and e.body.kind == "start_trial")
    failed = TrialFailed(
        card=start.body.card,
        trial=0,
        rung_attempt=1,
        resource=start.body.to_resource,
        error="gone",
        passes=96.0,
    )
    world.feed(failed, start.command_id)
    assert [d.decision for d in world.facts("trial_decided")] == ["started", "lost"]
    assert world.states_of(start.body.card)[-1] == "inconclusive"
    assert len(asked(world, "start_trial")) == 1
    assert len(cards(world)) == 1


def test_a_loss_that_falls_by_itself_needs_no_longer_trial(make_world: Any, plateau_rows: Any) -> None:
    world = probed(make_world, plateau_rows[:2400], 0.6, about(0.5))
    assert len(cards(world)) == 1
    assert world.state.probed is not None
    assert "falls" in {r.code for r in world.facts("rule_evaluated") if r.rule == "learning_rate_probe"}


@pytest.mark.parametrize(("z", "kept"), [(0.5, True), (-2.0, False)])
def test_first_weights_are_kept_for_a_restart_that_is_undecided(
    z: float, kept: bool, make_world: Any, to_rows: Any
) -> None:
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(960))
    run = make_world().run.model_copy(update={"why_no_restart": None})
    world = make_world(policy=POLICY, run=run, trial_value=lambda _t, _r: 0.6, evidence=about(z))
    world.start()
    world.rows(to_rows(2.0 * noise))  # the loss stands where it began
    (card,) = cards(world)
    assert card.training_recipe.restarts
    assert world.states_of(card.id)[-1] == ("inconclusive" if kept else "rejected")
    assert world.state.step > POLICY.probe.until * run.total_steps
    assert may_restart(world.state) is kept


@pytest.mark.parametrize(("lead", "adopted"), [(0.06, False), (0.12, True)])
def test_a_higher_rate_that_leads_by_little_is_not_adopted_at_once(
    lead: float, adopted: bool, make_world: Any, shelf: Any
) -> None:
    # .5 is left of the log score, and four fifths of that were learnt.
    certain = Group(n=200, mean=lead, variance=1e-4, effective_n=200.0)
    world = probed(make_world, shelf, 0.6, certain)
    first, second = world.facts("verdict_given")[0], cards(world)[1:]
    assert first.verdict == ("accepted" if adopted else "inconclusive")
    assert f"it takes {lead / 0.5:.0%} of the loss that is left" in first.why
    assert ("any higher rate may lead by less than 20% so early" in first.why) is not adopted
    # The longer trial is judged by its evidence alone.
    assert len(second) == 1 - adopted
    assert world.facts("verdict_given")[-1].verdict == "accepted"
    assert fold(world.log).differences == 0
