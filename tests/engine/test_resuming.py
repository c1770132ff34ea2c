"""A log that goes on from a checkpoint: numbers never start again, and only what must is forgotten."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from automode.engine import fold, handle, initial, recover, story, what_if
from automode.engine.resuming import looks_of, next_look
from automode.errors import ReplayDifferenceError
from automode.planner.events import Checkpointed, Envelope, Evaluate, Resumed, Weights
from automode.planner.policy import Policy

POLICY = Policy.model_validate(
    {"reasons": ["loss_plateau", "merge_cadence"], "approval": {"ask": []}, "pacing": {"max_cards": 2}}
)
DIGEST = "sha256:" + "0" * 64
KEPT = ("card_proposed", "card_moved", "trial_decided", "verdict_given", "lineage_grew", "budget_released")


def decisions(log):
    return [e.body for e in log if isinstance(e, Envelope) and e.role == "fact" and e.body.kind in KEPT]


def cut(make_world, values, *, at: int, lost: int, exact: bool = True, **more):
    """A run that is cut ``lost`` rows behind its checkpoint and goes on from there; the log without what was lost."""
    world = make_world(policy=POLICY)
    world.start()
    world.rows(values[:at])
    world.feed(Checkpointed(checkpoint=DIGEST, step=at, why="periodic"))
    kept, at_seq = list(world.log), world.state.next_seq - 1
    world.rows(values[at : at + lost])
    seq, rows = world.state.next_seq + 3, world.state.rows
    found = recover(kept, until=at_seq)
    assert found.unrecorded == ()
    again = make_world(policy=POLICY, state=found.state, log=kept)
    body = Resumed(
        checkpoint=DIGEST,
        at_seq=at_seq,
        step=at,
        attempt=2,
        exact=exact,
        why_approximate=None if exact else "another machine",
        **more,
    )
    envelope = Envelope(seq=seq, role="input", body=body, frame_cursor=rows, attempt=2)
    _, facts, commands = handle(again.state, [envelope])
    again._keep([envelope, *facts], commands)
    again.commands.extend(found.commands)
    again._answer_all()
    return again, rows


@pytest.fixture
def values(to_rows) -> np.ndarray:
    rng = np.random.default_rng(11)
    steps = np.arange(1, 6001)
    return to_rows(np.maximum(0.4, 2 * np.exp(-steps / 300)) * np.exp(0.1 * rng.standard_normal(6000)))


def whole(make_world, values):
    world = make_world(policy=POLICY)
    world.start()
    world.rows(values)
    world.end()
    return world


@pytest.mark.parametrize(("at", "lost"), [(400, 60), (2220, 7), (2600, 900), (4700, 0)])
def test_an_exact_run_decides_as_if_it_had_not_been_cut(make_world, values, at, lost):
    world, rows = cut(make_world, values, at=at, lost=lost)
    world.rows(values[at:])
    world.end()
    expected = whole(make_world, values)
    assert decisions(world.log) == decisions(expected.log)
    assert world.state.rows == rows + len(values) - at
    assert world.state.trained == len(values)
    assert world.state.ledger.trunk == expected.state.ledger.trunk
    facts = [e for e in world.log if isinstance(e, Envelope) and e.role == "fact" and e.frame_cursor > rows]
    assert {e.attempt for e in facts} <= {2}


def test_a_log_that_goes_on_replays_without_a_difference(make_world, values):
    world, _ = cut(make_world, values, at=2600, lost=200)
    world.rows(values[2600:])
    world.end()
    outcome = fold(world.log)
    assert outcome.differences == 0, outcome.shown
    assert outcome.observations == len(values)


def test_signals_begin_anew_only_where_the_rows_may_be_others(make_world, values):
    exact, _ = cut(make_world, values, at=2100, lost=50)
    assert exact.state.suite.trend.blocks > 0
    other, _ = cut(make_world, values, at=2100, lost=50, exact=False)
    assert other.state.suite.trend.blocks == 0
    assert "taken up" in other.state.suite.reset_by


@pytest.mark.parametrize(("exact", "looks"), [(True, 0), (False, 4)])
def test_looks_at_the_second_half_stay_spent_where_the_candidates_are_others(
    make_world, values, exact, looks
):
    world, _ = cut(make_world, values, at=400, lost=10, exact=exact, looks=("a", "b", "c", "d"))
    assert world.state.spending.looks == looks


def test_a_run_that_was_made_longer_has_more_to_spend(make_world, values):
    world, _ = cut(make_world, values, at=400, lost=10, total_steps=12000)
    assert world.state.run.total_steps == 12000
    assert world.state.ledger.total == 12000 * 96
    assert world.state.planning_budget == whole(make_world, values).state.planning_budget


def test_going_on_from_another_event_than_the_last_one_is_refused(make_world, values):
    world, rows = cut(make_world, values, at=400, lost=10)
    body = Resumed(checkpoint=DIGEST, at_seq=3, step=400, attempt=3, exact=True)
    seq = world.state.next_seq
    with pytest.raises(ReplayDifferenceError, match="behind event 3"):
        handle(world.state, [Envelope(seq=seq, role="input", body=body, frame_cursor=rows)])


def test_a_record_that_is_not_in_the_story_cannot_be_gone_back_to(make_world, values):
    world = make_world(policy=POLICY)
    world.start()
    world.rows(values[:400])
    with pytest.raises(ReplayDifferenceError, match="not in the log's story"):
        recover(world.log, until=world.state.next_seq + 5)


def test_another_policy_is_asked_across_a_cut(make_world, values):
    world, _ = cut(make_world, values, at=1000, lost=300)
    world.rows(values[1000:])
    world.end()
    other = what_if(world.log, POLICY)
    plain = what_if(whole(make_world, values).log, POLICY)
    assert [card.reason for card in other.proposed] == [card.reason for card in plain.proposed]
    assert [card.step for card in other.proposed] == [card.step for card in plain.proposed]


def test_a_story_tells_of_a_cut_within_it(make_world, values):
    world = whole(make_world, values)
    card = next(
        e.body.card.id for e in world.log if isinstance(e, Envelope) and e.body.kind == "card_proposed"
    )
    events = [e for e in world.log if isinstance(e, Envelope)]
    moved = next(i for i, e in enumerate(events) if e.body.kind == "card_moved" and e.body.card == card)
    body = Resumed(checkpoint=DIGEST, at_seq=events[moved].seq, step=7, attempt=2, exact=True)
    last = events[-1].seq
    told = story(
        card,
        [
            *events[: moved + 1],
            Envelope(seq=last + 1, role="input", body=body),
            *(replace(e, seq=e.seq + last + 1) for e in events[moved + 1 :]),
        ],
    )
    assert "cut off here, and taken up again exactly from its checkpoint at step 7" in told


def weights(digit):
    return Weights(checkpoint="sha256:" + digit * 64)


def test_a_look_is_repeated_at_the_same_and_spent_anew_at_anything_else():
    asked = [
        Evaluate(card="c", candidate="x", weights=weights(w), control=weights("0"), look=look)
        for look, w in [(1, "1"), (2, "2"), (1, "1")]
    ]
    state = initial()
    state.looked = looks_of(asked)
    assert len(state.looked) == 2
    assert next_look(state, weights("1"), weights("0")) == 1
    assert next_look(state, weights("2"), weights("0")) == 2
    other = initial()
    other.looked = looks_of(asked)
    assert next_look(other, weights("1"), weights("5")) == 3
    assert next_look(other, weights("1"), weights("0")) == 4
    fresh = initial()
    assert [next_look(fresh, weights(w), weights("0")) for w in "99"] == [1, 2]
