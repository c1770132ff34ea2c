"""Another policy on the same observations."""

from __future__ import annotations

from automode.engine import what_if
from automode.planner.policy import Policy


def policy(**trend):
    return Policy.model_validate(
        {"reasons": ["loss_plateau"], "trend": trend, "pacing": {"max_cards": 1}, "approval": {"ask": []}}
    )


def test_the_same_policy_proposes_what_was_recorded(make_world, plateau_rows):
    world = make_world(policy=policy(), mode="observe")
    world.start()
    world.rows(plateau_rows[:4000])
    found = what_if(world.log, policy())
    assert [card.step for card in found.proposed] == [card.step for card in found.recorded]
    assert len(found.recorded) == 1
    assert found.counterfactual_from is None


def test_a_person_who_asks_for_more_hears_of_the_plateau_sooner(make_world, plateau_rows):
    world = make_world(policy=policy(), mode="observe")
    world.start()
    world.rows(plateau_rows[:4000])
    found = what_if(world.log, policy(gain=0.05))
    assert found.proposed[0].step < found.recorded[0].step


def test_after_an_adoption_the_rest_is_told_to_be_counterfactual(make_world, plateau_rows):
    world = make_world(policy=policy())
    world.start()
    world.rows(plateau_rows[:4000])
    found = what_if(world.log, policy(gain=0.05))
    assert found.counterfactual_from is not None
    assert found.counterfactual_from > found.recorded[0].step


def test_a_policy_without_rules_proposes_nothing(make_world, plateau_rows):
    world = make_world(policy=policy(), mode="observe")
    world.start()
    world.rows(plateau_rows[:4000])
    assert what_if(world.log, Policy(reasons=())).proposed == ()
