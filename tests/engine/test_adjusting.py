"""Adjustments in the fold: proposed where no fork can be, applied on a person's word, and never called accepted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from automode.engine import fold
from automode.planner.events import CommandFailed, Run
from automode.planner.policy import Policy

WATCHED = Run(
    total_steps=6000, batch=32, adjusts=True, why_no_forks="the loop is not ours", why_no_evidence="no data"
)
POLICY = Policy.model_validate({"reasons": ["loss_plateau", "instability_spike"], "pacing": {"max_cards": 2}})


def watched(make_world: Any, mode: str = "propose", **run: Any) -> Any:
    world = make_world(policy=POLICY, mode=mode)
    world.run = WATCHED.model_copy(update=run)
    world.start()
    return world


@pytest.mark.parametrize("mode", ["propose", "act"])
def test_a_plateau_becomes_a_lower_rate_once_a_person_has_said_so(make_world, plateau_rows, mode: str):
    world = watched(make_world, mode)
    world.rows(plateau_rows[:2200])
    card = world.facts("card_proposed")[0].card
    assert (card.action, card.reason, card.risk) == ("adjust", "loss_plateau", "high")
    assert card.adjustment.rate_factor == pytest.approx(1 / 3)
    assert "unproven" in card.because
    assert world.states_of(card.id) == []
    world.decide("approve", card.id, rev=card.rev)
    assert world.states_of(card.id) == ["approved", "running", "applied"]
    assert (
        world.state.suite.trend.blocks == 0
    )  # what was learned of the old rate does not hold for the new one
    assert not world.state.executions
    assert not world.facts("verdict_given")
    assert world.state.ledger.automode == 0
    world.decide("rollback", card.id)
    assert "cannot be taken back" in world.facts("request_refused")[-1].why
    world.rows(plateau_rows[2200:4500])
    world.end()
    assert fold(world.log).differences == 0


def test_act_mode_applies_it_by_itself_where_the_policy_lets_it(make_world, plateau_rows):
    world = make_world(
        policy=POLICY.model_copy(
            update={"approval": POLICY.approval.model_copy(update={"auto_risk": "high", "ask": ()})}
        )
    )
    world.run = WATCHED
    world.start()
    world.rows(plateau_rows[:2200])
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id) == ["approved", "running", "applied"]


def test_spikes_are_answered_by_clipping_which_stays_when_the_safeguards_cap_is_lifted(make_world, to_rows):
    rng = np.random.default_rng(3)
    losses = np.exp(0.05 * rng.standard_normal(1200))
    losses[[700, 715, 730, 745]] *= 30.0
    world = make_world(policy=POLICY.model_copy(update={"reasons": ("instability_spike",)}), mode="act")
    world.run = WATCHED
    world.start()
    values = to_rows(losses)
    values[:, 3] = np.where(losses > 10.0, 50.0, np.exp(0.05 * rng.standard_normal(len(losses))))
    world.rows(values[:760])
    card = world.facts("card_proposed")[0].card
    assert (card.action, card.reason) == ("adjust", "instability_spike")
    assert card.adjustment.rate_factor == 1.0
    assert card.adjustment.clip_norm is not None
    assert world.state.guards.cap is not None
    world.decide("approve", card.id, rev=card.rev)
    assert world.states_of(card.id) == ["approved", "running", "applied"]
    world.rows(values[760:])
    assert world.state.guards.cap is None  # the safeguard's own
    clips = [e.body for e in world.log if getattr(e, "role", "") == "command" and e.body.kind == "set_clip"]
    assert [(clip.card, clip.norm is None) for clip in clips] == [
        (None, False),
        (card.id, False),
        (None, True),
    ]


def test_a_change_that_cannot_be_made_fails_its_card_alone(make_world, plateau_rows):
    world = watched(make_world)
    world.hold.add("set_learning_rate")
    world.rows(plateau_rows[:2200])
    card = world.facts("card_proposed")[0].card
    world.decide("approve", card.id, rev=card.rev)
    (command_id,) = [k for k, c in world.state.pending.items() if c.kind == "set_learning_rate"]
    world.feed(CommandFailed(command="set_learning_rate", card=card.id, error="no"), command_id)
    assert world.states_of(card.id)[-1] == "failed"


def test_without_leave_to_adjust_the_rule_stays_silent_and_says_why(make_world, plateau_rows):
    world = watched(make_world, adjusts=False)
    world.rows(plateau_rows[:2200])
    assert not world.facts("card_proposed")
    assert any("the loop is not ours" in fact.why for fact in world.facts("rule_evaluated"))


def test_a_schedule_that_is_not_known_keeps_the_rule_silent(make_world, plateau_rows):
    world = watched(make_world, why_no_rate="a scheduler drives the rates")
    world.rows(plateau_rows[:2200])
    assert not world.facts("card_proposed")
    assert any("a scheduler drives the rates" in fact.why for fact in world.facts("rule_evaluated"))
