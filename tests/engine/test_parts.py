"""Specialists of parts in the fold: each trains its share, none competes, and the control goes on for as long as all of them."""

from __future__ import annotations

from typing import Any

import pytest

from automode.engine import fold
from automode.engine.climbing import climb_of
from automode.planner.card_text import submission_from_yaml
from automode.planner.events import Envelope, Resolved, TrialFailed
from automode.planner.inputs import ResolvedPart
from automode.planner.policy import Policy
from automode.planner.recipes import Variant

OWN = Policy.model_validate({"reasons": [], "pacing": {"exploration_share": 0.9, "total_share": 0.9}})
SIZES = (100, 300, 600)
CARD = """
action: fork
because: Each to its own.
selection: {kind: kmeans, k: 4, clusters: [0, 1, 3]}
training_recipe: {variants: [{name: plain}], per_part: by_size}
gate_recipe: {kind: switch_softmax}
budget_steps: 20
asha: {reduction_factor: 3, max_steps: 20}
"""
STEPS = (11, 19, 30)
"""1 + (.1 + .7 n_c / n) of the other 57, rounded by the largest remainders."""


def asked(world: Any, kind: str) -> list[Any]:
    return [e for e in world.log if isinstance(e, Envelope) and e.role == "command" and e.body.kind == kind]


def running(make_world: Any, rows: Any, text: str = CARD, slots: int = 8, **more: Any) -> Any:
    """A world in which such a card has begun, its selection resolved by hand."""
    hold = {"resolve"} | more.pop("hold", set())
    world = make_world(
        policy=OWN, run=make_world().run.model_copy(update={"slots": slots}), hold=hold, **more
    )
    world.start()
    world.rows(rows[:200])
    world.decide("submit", body=submission_from_yaml(text))
    (card,) = world.state.cards
    world.decide("approve", card, rev=1)
    (resolve,) = asked(world, "resolve")
    parts = tuple(
        ResolvedPart(name=f"cluster {c}", n=n, artifact="sha256:" + f"{c}" * 64)
        for c, n in zip((0, 1, 3), SIZES, strict=True)
    )
    variants = tuple(Variant(name=part.name) for part in parts)
    world.feed(Resolved(card=card, n=1000, pool=1000, variants=variants, parts=parts), resolve.command_id)
    return world


def test_each_trains_its_share_at_once_and_the_mixture_of_all_is_compared(
    make_world: Any, plateau_rows: Any
) -> None:
    world = running(make_world, plateau_rows, gate_value=0.9)
    starts = [e.body for e in asked(world, "start_trial")]
    assert [(s.trial, s.from_resource, s.to_resource, s.top_resource) for s in starts] == [
        (i, 0, n, n) for i, n in enumerate(STEPS)
    ]
    assert sum(STEPS) == 60
    (started,) = world.facts("card_started")
    assert started.control_at - started.step >= 60
    world.rows(plateau_rows[200:600])
    (gate,) = [e.body for e in asked(world, "fit_gate")]
    assert len(gate.experts) == 3
    assert sorted(gate.names) == ["cluster 0", "cluster 1", "cluster 3"]
    (look,) = [e.body for e in asked(world, "evaluate")]
    assert look.candidate == "mixture"
    assert fold(world.log).differences == 0


def test_a_specialist_of_a_part_is_no_candidate_however_good_it_looks(
    make_world: Any, plateau_rows: Any
) -> None:
    world = running(make_world, plateau_rows, trial_value=lambda trial, resource: 0.99, gate_value=0.1)
    world.rows(plateau_rows[200:600])
    assert not asked(world, "evaluate")
    (verdict,) = world.facts("verdict_given")
    assert verdict.candidate == "mixture"
    assert verdict.verdict == "inconclusive"


@pytest.mark.parametrize("slots", [1, 2])
def test_with_few_slots_the_next_begins_when_one_is_done(
    slots: int, make_world: Any, plateau_rows: Any
) -> None:
    world = running(make_world, plateau_rows, slots=slots, hold={"start_trial"})
    assert [e.body.trial for e in asked(world, "start_trial")] == [0, 1, 2][:slots]
    assert climb_of(world.state.fork).total == 60


def test_one_that_fails_is_left_out_and_not_repeated(make_world: Any, plateau_rows: Any) -> None:
    world = running(make_world, plateau_rows, hold={"start_trial"}, gate_value=0.9)
    first, *others = asked(world, "start_trial")
    world.feed(
        TrialFailed(
            card=first.body.card, trial=0, rung_attempt=1, resource=STEPS[0], error="gone", passes=96.0
        ),
        first.command_id,
    )
    assert world.facts("trial_decided")[-1].decision == "lost"
    assert world.facts("trial_decided")[-1].resource == STEPS[0]
    world.hold.clear()
    world.commands += others
    world.rows(plateau_rows[200:600])
    (gate,) = [e.body for e in asked(world, "fit_gate")]
    assert sorted(gate.names) == ["cluster 1", "cluster 3"]
    assert len(asked(world, "start_trial")) == 3
    assert fold(world.log).differences == 0


def test_what_a_card_takes_stays_within_what_was_reserved(make_world: Any, plateau_rows: Any) -> None:
    world = running(make_world, plateau_rows)
    world.rows(plateau_rows[200:600])
    (reserved,), (released,) = world.facts("budget_reserved"), world.facts("budget_released")
    assert 96 * 60 < released.spent <= reserved.passes
