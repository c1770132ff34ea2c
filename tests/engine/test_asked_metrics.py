"""A card that names its metric: candidates and control are compared by it, and the verdict says so."""

from __future__ import annotations

from typing import Any

import pytest

from automode.engine import fold
from automode.engine.story import story
from automode.planner.card_text import submission_from_yaml
from automode.planner.events import Envelope
from automode.planner.policy import Policy

OWN = Policy.model_validate({"reasons": [], "pacing": {"exploration_share": 0.9, "total_share": 0.9}})
FORK = """
action: fork
because: To see what happens.
training_recipe: {variants: [{name: a}]}
budget_steps: 10
asha: {reduction_factor: 2, max_steps: 10}
acceptance: {metric: accuracy}
"""
MERGE = """
action: merge
because: To see what happens.
merge_recipe: {kind: swa}
budget_steps: 0
acceptance: {metric: nll}
"""


def running(make_world: Any, rows: Any, text: str, **more: Any) -> tuple[Any, str]:
    world = make_world(policy=OWN, **more)
    world.start()
    world.rows(rows[:200])
    world.decide("submit", body=submission_from_yaml(text))
    (card,) = world.state.cards
    world.decide("approve", card, rev=1)
    world.rows(rows[200:400])
    return world, card


@pytest.mark.parametrize("trial", [0.9, 0.1])
def test_a_forks_candidates_are_compared_by_it(trial: float, make_world: Any, plateau_rows: Any) -> None:
    world, card = running(make_world, plateau_rows, FORK, trial_value=lambda *_: trial)
    asked = [e.body for e in world.log if isinstance(e, Envelope) and e.body.kind == "evaluate"]
    (verdict,) = world.facts("verdict_given")
    assert verdict.metric == "accuracy"
    assert [e.metric for e in asked] == (["accuracy"] if trial > 0.5 else [])
    if asked:
        assert verdict.why.endswith("; compared by accuracy, as the card asks")
        told = story(card, [e for e in world.log if isinstance(e, Envelope)])
        assert "held-out evidence for t0:a, accuracy: +0.05000 on 200 samples" in told
    assert fold(world.log).differences == 0


def test_a_merge_of_the_trunks_own_states_is_judged_by_it_alone(make_world: Any, plateau_rows: Any) -> None:
    world, _ = running(make_world, plateau_rows, MERGE, merged={"metric": "nll"})
    (verdict,) = world.facts("verdict_given")
    assert (verdict.metric, verdict.guard) == ("nll", None)
    assert "compared by log likelihood, as the card asks" in verdict.why
    assert fold(world.log).differences == 0
