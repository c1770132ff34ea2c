"""A log may break off anywhere: what is taken up decides as if nothing had happened."""

from __future__ import annotations

import numpy as np
import pytest

from automode.engine import recover
from automode.errors import ReplayDifferenceError
from automode.planner.events import Envelope, Rows
from automode.planner.policy import Policy

POLICY = Policy.model_validate(
    {"reasons": ["loss_plateau", "merge_cadence"], "approval": {"ask": []}, "pacing": {"max_cards": 2}}
)
KEPT = ("card_proposed", "card_moved", "trial_decided", "verdict_given", "lineage_grew", "budget_released")


def decisions(world):
    """What was decided, without the places in the log where it stands."""
    return [e.body for e in world.log if isinstance(e, Envelope) and e.role == "fact" and e.body.kind in KEPT]


def taken_up(make_world, log, values):
    """A new process: the log folded, what it lost written again, and every unanswered command carried out."""
    found = recover(log)
    world = make_world(policy=POLICY, state=found.state, log=[*log, *found.unrecorded])
    world.commands.extend(found.commands)
    world._answer_all()
    world.rows(values[found.state.rows :])
    world.end()
    return world


def whole_run(make_world, values):
    world = make_world(policy=POLICY)
    world.start()
    world.rows(values)
    world.end()
    return world


@pytest.fixture
def values(to_rows) -> np.ndarray:
    rng = np.random.default_rng(11)
    steps = np.arange(1, 6001)
    return to_rows(np.maximum(0.4, 2 * np.exp(-steps / 300)) * np.exp(0.1 * rng.standard_normal(6000)))


@pytest.mark.no_cover
@pytest.mark.parametrize("offset", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_log_cut_at_every_event_of_a_card_leads_to_the_same_decisions(offset, make_world, values):
    """Every second event every time, the others nightly."""
    whole = whole_run(make_world, values)
    events = [i for i, item in enumerate(whole.log) if isinstance(item, Envelope)]
    first = next(i for i in events if whole.log[i].body.kind == "card_proposed") - 3
    last = max(i for i in events if whole.log[i].body.kind == "card_moved")
    cuts = [i for i in events if first <= i <= last and whole.log[i].body.kind != "run_ended"]
    assert len(cuts) > 40
    expected = decisions(whole)
    for cut in cuts[offset::2]:
        log = whole.log[: cut + 1]
        if any(isinstance(e, Envelope) and e.body.kind == "trunk_ended" for e in log):
            continue  # what follows the trunk's end is answered by the ending run itself
        again = taken_up(make_world, log, values)
        assert decisions(again) == expected, f"cut behind event {whole.log[cut].seq}"


def test_only_unanswered_commands_are_asked_again(make_world, values):
    world = make_world(policy=POLICY, hold={"start_trial"})
    world.start()
    world.rows(values[:2600])
    found = recover(world.log)
    kinds = sorted(c.body.kind for c in found.commands if c.body.kind != "scan")
    assert kinds == ["start_trial"]
    assert {c.command_id for c in found.commands} == set(world.state.pending)


def test_decisions_lost_behind_the_last_event_are_made_again(make_world, values):
    world = make_world(policy=POLICY, hold={"snapshot"})
    world.start()
    world.rows(values[:2600])
    proposed = next(
        i for i, e in enumerate(world.log) if isinstance(e, Envelope) and e.body.kind == "card_proposed"
    )
    cut = [item for i, item in enumerate(world.log) if i < proposed or isinstance(item, Rows)]
    found = recover(cut)
    assert "card_proposed" in [e.body.kind for e in found.unrecorded]
    assert found.state.next_seq == world.state.next_seq
    assert set(found.state.pending) == set(world.state.pending)


def test_a_log_of_another_machine_is_not_taken_up(make_world, values):
    world = make_world(policy=POLICY)
    world.start()
    world.rows(values[:2600])
    forged = [
        Envelope(seq=e.seq, role=e.role, body=e.body.model_copy(update={"why": "no"}), cause=e.cause)
        if isinstance(e, Envelope) and e.body.kind == "rule_evaluated"
        else e
        for e in world.log
    ]
    with pytest.raises(ReplayDifferenceError, match="cannot be taken up"):
        recover(forged)
