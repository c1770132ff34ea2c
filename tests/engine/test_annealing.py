"""The control that anneals alike, and the merge that waits for its router: what is asked for, when, and what is compared."""

from __future__ import annotations

from typing import Any

import pytest

from automode.engine import fold
from automode.planner.card_text import submission_from_yaml
from automode.planner.events import (
    CommandFailed,
    Envelope,
    StartTrial,
    TrialFailed,
    TrialReported,
)
from automode.planner.policy import Policy

OWN = Policy.model_validate({"reasons": [], "pacing": {"exploration_share": 0.9, "total_share": 0.9}})
ANNEALING = """
action: fork
because: To see what happens.
training_recipe: {variants: [{name: a, schedule: anneal}, {name: b, schedule: anneal}]}
budget_steps: 10
asha: {reduction_factor: 2, max_steps: 20}
"""
TAUGHT = """
action: fork
because: To see what happens.
training_recipe: {variants: [{name: a}]}
gate_recipe: {kind: switch_softmax}
merge_recipe: {kind: distill, steps: 5, teacher: mixture}
budget_steps: 10
asha: {reduction_factor: 2, max_steps: 10}
"""


def running(make_world: Any, rows: Any, text: str, **more: Any) -> Any:
    """A world in which a person's card has begun to run at step 200."""
    world = make_world(policy=OWN, **more)
    world.start()
    world.rows(rows[:200])
    world.decide("submit", body=submission_from_yaml(text))
    (card,) = world.state.cards
    world.decide("approve", card, rev=1)
    return world


def asked(world: Any, kind: str) -> list[Any]:
    """Commands of a kind, in order."""
    return [e for e in world.log if isinstance(e, Envelope) and e.role == "command" and e.body.kind == kind]


def values(own: float) -> Any:
    """The control is trial 2; the better variant trial 1."""
    return lambda trial, resource: own if trial == 2 else 0.5 + 0.1 * trial


@pytest.mark.parametrize(
    ("trunk", "annealed", "looks"),
    [
        (0.55, 0.5, True),
        (0.5, 0.55, True),
        (0.65, 0.5, False),
        (0.5, 0.65, False),
        (0.5, float("nan"), False),
    ],
)
def test_a_candidate_is_looked_at_where_it_is_above_the_trunk_and_above_the_anneal_alone(
    trunk: float, annealed: float, looks: bool, make_world: Any, plateau_rows: Any
) -> None:
    world = running(make_world, plateau_rows, ANNEALING, trial_value=values(annealed), control_value=trunk)
    world.rows(plateau_rows[200:600])
    starts = [e.body for e in asked(world, "start_trial")]
    (control,) = [s for s in starts if s.trial == 2]
    assert (control.from_resource, control.to_resource, control.variant.schedule) == (0, 20, "anneal")
    assert control.checkpoint == control.base
    reports = [e.body for e in world.log if isinstance(e, Envelope) and e.body.kind == "trial_reported"]
    (mine,) = [r for r in reports if r.trial == 2]
    evaluated = [e.body for e in asked(world, "evaluate")]
    assert [e.control.checkpoint for e in evaluated] == ([mine.checkpoint] if looks else [])
    card = next(iter(world.state.cards))
    assert world.states_of(card)[-1] == ("adopted" if looks else "inconclusive")
    if looks:
        assert "warms the annealed weights up again" in world.facts("card_moved")[-1].why
    assert replay_differences(world) == 0


def replay_differences(world: Any) -> int:
    found: int = fold(world.log).differences
    return found


def test_trials_wait_for_room_beside_the_control(make_world: Any, plateau_rows: Any) -> None:
    for slots in (1, 2):
        run = make_world().run.model_copy(update={"slots": slots})
        world = running(make_world, plateau_rows, ANNEALING, run=run, hold={"start_trial"})
        assert [e.body.trial for e in asked(world, "start_trial")] == [2, 0][:slots]


def held(make_world: Any, rows: Any) -> tuple[Any, str, Any]:
    """A world whose trials are answered by hand; the card, and what starts the control."""
    world = running(make_world, rows, ANNEALING, hold={"start_trial"})
    (start,) = asked(world, "start_trial")
    return world, next(iter(world.state.cards)), start


def failure(start: StartTrial, *, retryable: bool) -> TrialFailed:
    return TrialFailed(
        card=start.card,
        trial=start.trial,
        rung_attempt=start.rung_attempt,
        resource=start.to_resource,
        error="the disk is away",
        retryable=retryable,
        passes=960.0,
    )


def test_a_control_that_fails_is_started_once_more_and_ends_the_card_then(
    make_world: Any, plateau_rows: Any
) -> None:
    world, card, start = held(make_world, plateau_rows)
    world.feed(failure(start.body, retryable=True), start.command_id)
    again = asked(world, "start_trial")[-1]
    assert (again.body.trial, again.body.rung_attempt) == (2, 2)
    # What the given-up attempt says after all changes nothing.
    late = TrialReported(
        card=card,
        trial=2,
        rung_attempt=1,
        resource=20,
        value=0.9,
        checkpoint="sha256:" + "0" * 64,
        passes=1.0,
    )
    world.feed(late)
    assert world.state.fork.annealed is None
    world.feed(failure(again.body, retryable=True), again.command_id)
    assert world.states_of(card)[-1] == "failed"
    assert "the annealed control could not be trained: the disk is away" in world.facts("card_moved")[-1].why
    assert world.state.ledger.spent(card) >= 2 * 960
    assert [d.decision for d in world.facts("trial_decided") if d.trial == 2] == [
        "started",
        "requeued",
        "lost",
    ]
    assert replay_differences(world) == 0


def test_a_control_that_would_fail_again_is_not_tried_again(make_world: Any, plateau_rows: Any) -> None:
    world, card, start = held(make_world, plateau_rows)
    world.feed(failure(start.body, retryable=False), start.command_id)
    assert world.states_of(card)[-1] == "failed"
    assert len(asked(world, "start_trial")) == 1


def test_where_no_specialist_gets_to_the_top_its_control_is_stopped(
    make_world: Any, plateau_rows: Any
) -> None:
    run = make_world().run.model_copy(update={"slots": 3})
    world = running(make_world, plateau_rows, ANNEALING, run=run, hold={"start_trial"})
    for start in asked(world, "start_trial")[1:]:
        world.feed(failure(start.body, retryable=False), start.command_id)
    card = next(iter(world.state.cards))
    assert world.states_of(card)[-1] == "inconclusive"
    assert [e.body.trial for e in asked(world, "stop_trial")] == [2]


# A merge that is taught by a mixture.


def test_a_mixture_teaches_when_its_router_is_there_and_not_before(
    make_world: Any, plateau_rows: Any
) -> None:
    world = running(make_world, plateau_rows, TAUGHT, hold={"fit_gate"}, merged={"value": 0.9})
    world.rows(plateau_rows[200:700])
    (fit,) = asked(world, "fit_gate")
    assert not asked(world, "merge")
    world.hold.clear()
    world._answer(fit)
    world._answer_all()
    (merge,) = [e.body for e in asked(world, "merge")]
    (fitted,) = [e.body for e in world.log if isinstance(e, Envelope) and e.body.kind == "gate_fitted"]
    assert (merge.gate, merge.members, merge.control) == (
        fitted.checkpoint,
        fit.body.experts,
        fit.body.control,
    )
    (looked,) = [e.body for e in asked(world, "evaluate")]
    assert looked.candidate == "merge:distill"
    assert replay_differences(world) == 0


def test_without_its_router_a_mixture_teaches_nobody(make_world: Any, plateau_rows: Any) -> None:
    world = running(make_world, plateau_rows, TAUGHT, hold={"fit_gate"})
    world.rows(plateau_rows[200:700])
    (fit,) = asked(world, "fit_gate")
    world.feed(CommandFailed(command="fit_gate", card=fit.body.card, error="no features"), fit.command_id)
    assert not asked(world, "merge")
    assert world.states_of(fit.body.card)[-1] in ("inconclusive", "adopted", "rejected")
