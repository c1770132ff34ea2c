"""The fold: whole cards against a simulated world, no torch, no mocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.engine import fold, story
from automode.errors import ReplayDifferenceError
from automode.planner.approval import CardRecord
from automode.planner.card_text import submission_from_yaml
from automode.planner.events import Checkpointed, Clustered, Envelope, Evaluated, Group, Rows, TrialsNoted
from automode.planner.policy import Policy
from automode.planner.recipes import Resources


def plateau_policy(**pacing):
    return Policy.model_validate(
        {"reasons": ["loss_plateau"], "approval": {"ask": []}, "pacing": {"max_cards": 1} | pacing}
    )


def test_a_plateau_card_runs_up_the_ladder_and_is_adopted_on_evidence(make_world, plateau_rows):
    world = make_world(policy=plateau_policy())
    world.start()
    world.rows(plateau_rows[:4500])
    card = world.facts("card_proposed")[0].card
    assert card.reason == "loss_plateau"
    assert world.states_of(card.id) == ["approved", "running", "accepted", "adopted"]
    verdict = world.facts("verdict_given")[0]
    assert verdict.verdict == "accepted"
    assert verdict.z >= verdict.threshold
    assert world.facts("trial_decided")
    assert world.state.lineage == "trunk:1"


def waiting_plateau(make_world, plateau_rows):
    """A world in act mode whose plateau card was just made under a policy that asks about it, and the card."""
    policy = Policy.model_validate({"reasons": ["loss_plateau"], "pacing": {"max_cards": 1}})
    world = make_world(policy=policy)
    world.start()
    while not world.facts("card_proposed"):
        at = world.state.rows
        world.rows(plateau_rows[at : at + 100])
    return world, world.facts("card_proposed")[0].card


def test_a_card_that_the_policy_asks_about_waits_in_act_mode_and_spends_nothing(make_world, plateau_rows):
    world, card = waiting_plateau(make_world, plateau_rows)
    assert card.reason == "loss_plateau"
    asked = [e.body for e in world.log if isinstance(e, Envelope) and e.body.kind == "ask_approval"]
    assert [command.card for command in asked] == [card.id]
    assert world.states_of(card.id) == []
    world.rows(plateau_rows[world.state.rows : world.state.rows + 1000])
    assert world.states_of(card.id) == ["expired"]
    assert world.state.ledger.automode == 0
    assert fold(world.log).differences == 0


def test_a_card_that_the_policy_asks_about_runs_once_a_person_approves_it(make_world, plateau_rows):
    world, card = waiting_plateau(make_world, plateau_rows)
    # All but the last of the 800 steps that it may wait: it has to fit then too.
    world.rows(plateau_rows[world.state.rows : card.step + 780])
    world.decide("approve", card.id, rev=card.rev)
    world.rows(plateau_rows[world.state.rows : 4500])
    assert world.states_of(card.id) == ["approved", "running", "accepted", "adopted"]


@pytest.mark.parametrize(("most", "seen"), [(None, 3), (2, 2), (1, 1), (9, 3)])
def test_no_more_trials_train_at_once_than_backend_and_policy_have_room_for(
    make_world, plateau_rows, most, seen
):
    world = make_world(policy=plateau_policy(max_parallel=most))
    world.run = world.run.model_copy(update={"slots": 8})
    world.start()
    at_once = []
    handled = world._answer

    def counted(command):
        waiting = [c for c in world.state.pending.values() if c.kind == "start_trial"]
        at_once.append(len(waiting))
        return handled(command)

    world._answer = counted
    world.rows(plateau_rows[:4500])
    assert max(at_once) == seen


def test_a_card_whose_candidates_do_not_beat_the_control_spends_no_look(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(), control_value=0.9)
    world.start()
    world.rows(plateau_rows[:4500])
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id)[-1] == "inconclusive"
    assert world.state.spending.looks == 0
    assert not [e for e in world.log if isinstance(e, Envelope) and e.body.kind == "evaluate"]


def test_weak_evidence_keeps_the_control(make_world, plateau_rows):
    world = make_world(
        policy=plateau_policy(), evidence=Group(n=200, mean=0.001, variance=0.04, effective_n=200.0)
    )
    world.start()
    world.rows(plateau_rows[:4500])
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id)[-1] == "inconclusive"
    assert world.state.spending.looks >= 1
    assert world.state.lineage == "trunk:0"


def test_a_candidate_that_is_worse_on_the_second_half_is_rejected(make_world, plateau_rows):
    world = make_world(
        policy=plateau_policy(), evidence=Group(n=200, mean=-0.05, variance=0.01, effective_n=200.0)
    )
    world.start()
    world.rows(plateau_rows[:4500])
    assert world.states_of(world.facts("card_proposed")[0].card.id)[-1] == "rejected"


def test_every_trial_diverging_ends_inconclusive(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(), trial_value=lambda trial, resource: float("nan"))
    world.start()
    world.rows(plateau_rows[:4500])
    assert world.states_of(world.facts("card_proposed")[0].card.id)[-1] == "inconclusive"


def test_in_propose_mode_nothing_runs_without_an_approval(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(), mode="propose")
    world.start()
    world.rows(plateau_rows[:2200])
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id) == []
    world.decide("approve", card.id, rev=card.rev)
    world.rows(plateau_rows[2200:4500])
    assert world.states_of(card.id)[:2] == ["approved", "running"]


def test_a_stale_revision_is_a_conflict_and_changes_nothing(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(), mode="propose")
    world.start()
    world.rows(plateau_rows[:2200])
    card = world.facts("card_proposed")[0].card
    world.decide("approve", card.id, rev=card.rev + 1)
    assert world.states_of(card.id) == []
    assert "conflict" in world.facts("request_refused")[0].why


def test_observe_only_records_cards(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(), mode="observe")
    world.start()
    world.rows(plateau_rows[:3000])
    card = world.facts("card_proposed")[0].card
    assert "running" not in world.states_of(card.id)
    assert not any(e.body.kind == "ask_approval" for e in world.log if isinstance(e, Envelope))


def test_a_cancelled_running_card_is_refused_and_its_trials_stopped(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(), hold={"start_trial"})
    world.start()
    world.rows(plateau_rows[:2200])
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id)[-1] == "running"
    world.decide("cancel", card.id)
    assert world.states_of(card.id)[-1] == "refused"
    assert any(e.body.kind == "stop_trial" for e in world.log if isinstance(e, Envelope))
    assert world.state.ledger.held == 0


def test_the_mode_changes_at_any_step(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(), mode="observe")
    world.start()
    world.rows(plateau_rows[:1000])
    world.decide("mode", mode="act")
    world.rows(plateau_rows[1000:4500])
    assert world.state.mode == "act"
    assert world.states_of(world.facts("card_proposed")[0].card.id)[-1] == "adopted"


def test_an_adoption_can_be_rolled_back(make_world, plateau_rows):
    world = make_world(policy=plateau_policy())
    world.start()
    world.rows(plateau_rows[:4500])
    card = world.facts("card_proposed")[0].card
    world.decide("rollback", card.id)
    assert world.states_of(card.id)[-1] == "rolled_back"
    assert world.state.lineage == "trunk:2"


@pytest.mark.parametrize("rolled_back", [True, False])
def test_a_run_that_is_stopped_does_not_keep_the_best_of_a_trunk_that_was_rolled_back(
    make_world, plateau_rows, rolled_back
):
    before, after = (f"sha256:{digit * 64}" for digit in "12")
    world = make_world(policy=plateau_policy())
    world.start()
    world.feed(Checkpointed(checkpoint=before, step=0, why="best"))
    world.rows(plateau_rows[:4500])
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id)[-1] == "adopted"
    world.feed(Checkpointed(checkpoint=after, step=world.state.step, why="best"))
    if rolled_back:
        world.decide("rollback", card.id)
        assert world.states_of(card.id)[-1] == "rolled_back"
    world.decide("submit", body=submission_from_yaml("{action: stop, because: Enough.}"))
    stop = world.facts("card_proposed")[-1].card
    world.decide("approve", stop.id, rev=stop.rev)
    world.end()
    (merge,) = [e.body for e in world.log if isinstance(e, Envelope) and e.body.kind == "merge"]
    assert [member.checkpoint for member in merge.members] == [before if rolled_back else after]
    assert fold(world.log).differences == 0


def test_the_finishing_merge_waits_for_the_end_and_is_judged(make_world, plateau_rows):
    world = make_world(policy=Policy(reasons=("merge_cadence",)))
    world.start()
    world.rows(plateau_rows)
    world.end()
    card = world.facts("card_proposed")[0].card
    assert card.action == "merge"
    assert world.states_of(card.id) == ["approved", "running", "accepted", "adopted"]


def test_a_finishing_merge_without_a_better_average_spends_no_look_and_says_so(make_world, plateau_rows):
    world = make_world(policy=Policy(reasons=("merge_cadence",)), trunk_choice="raw")
    world.start()
    world.rows(plateau_rows)
    world.end()
    verdict = world.facts("verdict_given")[0]
    assert (verdict.verdict, verdict.look) == ("inconclusive", None)
    assert "no average and no earlier state is above the raw weights" in verdict.why


def test_a_run_that_is_ended_before_its_length_has_its_finish_then(make_world, plateau_rows):
    worlds = {}
    for early in (False, True):
        worlds[early] = world = make_world(policy=Policy(reasons=("merge_cadence",)))
        world.start()
        world.rows(plateau_rows[:1000])
        world.end(early=early)
    assert not worlds[False].facts("card_proposed")
    card = worlds[True].facts("card_proposed")[0].card
    assert worlds[True].states_of(card.id) == ["approved", "running", "accepted", "adopted"]
    assert f"Step 1000 of {worlds[True].state.run.total_steps} (the run was ended here)" in card.because
    assert fold(worlds[True].log).differences == 0


def test_only_the_finish_comes_at_an_early_end_and_only_where_it_may_run_by_itself(make_world, plateau_rows):
    for mode, reasons in (("act", ("loss_plateau",)), ("propose", ("merge_cadence",))):
        world = make_world(policy=Policy(reasons=reasons), mode=mode)
        world.start()
        world.rows(plateau_rows[:300])
        world.end(early=True)
        assert not world.facts("card_proposed")


def test_a_finish_that_was_made_already_is_not_made_again_at_an_early_end(make_world, plateau_rows):
    world = make_world(policy=Policy(reasons=("merge_cadence",)))
    world.start()
    world.rows(plateau_rows)
    world.end(early=True)
    assert len(world.facts("card_proposed")) == 1


def test_a_run_that_ends_first_leaves_a_fork_inconclusive(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(), hold={"start_trial"})
    world.start()
    world.rows(plateau_rows[:2200])
    world.end()
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id)[-1] == "inconclusive"
    assert world.state.ledger.held == 0


def test_nothing_is_proposed_beyond_the_compute_caps(make_world, plateau_rows):
    world = make_world(policy=plateau_policy(exploration_share=0.0001))
    world.start()
    world.rows(plateau_rows[:4000])
    assert not world.facts("card_proposed")
    assert "over_cap" in {f.code for f in world.facts("rule_evaluated") if f.outcome == "held"}


def test_a_persistent_non_finite_loss_makes_an_instability_card(make_world, to_rows):
    rng = np.random.default_rng(3)
    loss = np.exp(0.05 * rng.standard_normal(1500))
    loss[900:905] = np.nan
    world = make_world(policy=Policy(reasons=("instability_spike",)))
    world.start()
    world.rows(to_rows(loss))
    assert world.facts("card_proposed")[0].card.reason == "instability_spike"


@pytest.mark.parametrize(("gate", "merged"), [(0.9, 0.3), (0.2, 0.9)], ids=["mixture", "interpolation"])
def test_a_mixture_or_merge_descends_from_the_trunk_and_from_the_specialists_that_it_is_made_of(
    make_world, plateau_rows, gate, merged
):
    clusters = Clustered(
        step=0,
        feature="embedding",
        k=3,
        sizes=(400, 400, 200),
        losses=(0.4, 0.4, 1.2),
        errors=(0.02, 0.02, 0.05),
        noise=(0.0, 0.0, 0.02),
        ari=0.9,
        artifact="sha256:" + "c4" * 32,
        likelihoods={3: -1.0, 6: -1.5},
    )
    policy = Policy.model_validate(
        {"reasons": ["residual_cluster"], "approval": {"ask": []}, "pacing": {"max_cards": 1}}
    )
    world = make_world(policy=policy, clusters=clusters, gate_value=gate, merged={"value": merged})
    world.start()
    world.rows(plateau_rows[:4500])
    card = world.facts("card_proposed")[0].card
    assert world.states_of(card.id)[-1] == "adopted"
    nodes = {fact.node: fact for fact in world.facts("lineage_grew")}
    name, role = ("mixture", "mixture") if gate > merged else ("merge:interpolate", "merge")
    made = nodes[f"{card.id}:{name}"]
    trials = [node for node, fact in nodes.items() if fact.role == "specialist"]
    assert made.role == role
    assert made.parents[0] == "trunk:0"
    assert set(made.parents[1:]) <= set(trials)
    assert len(made.parents[1:]) == (len(trials) if role == "mixture" else 1)
    assert fold(world.log).differences == 0


def test_the_story_tells_what_a_candidate_gains_on_each_slice():
    evaluated = Evaluated(
        card="c",
        candidate="t0:plain",
        overall=Group(n=400, mean=0.004, variance=0.01),
        slices={"b": Group(n=40, mean=-0.02, variance=0.01), "a": Group(n=60, mean=0.05, variance=0.01)},
        passes=0,
    )
    told = story("c", [Envelope(seq=1, role="input", body=evaluated)])
    assert "+0.00400 on 400 samples; by slice: a +0.05000 on 60, b -0.02000 on 40" in told


def test_the_story_of_a_card_runs_from_the_rule_to_the_adoption(make_world, plateau_rows):
    world = make_world(policy=plateau_policy())
    world.start()
    world.rows(plateau_rows[:4500])
    card = world.facts("card_proposed")[0].card
    told = story(card.id, [e for e in world.log if isinstance(e, Envelope)])
    for part in ("rule loss_plateau fired", "proposed by planner", "reserved", "verdict accepted", "adopted"):
        assert part in told


def test_replay_of_a_whole_run_has_no_difference(make_world, plateau_rows):
    world = make_world(policy=Policy())
    world.start()
    world.rows(plateau_rows)
    world.end()
    outcome = fold(world.log)
    assert outcome.differences == 0
    assert outcome.observations == len(plateau_rows)
    assert outcome.decisions > 20


def test_replay_names_the_first_difference(make_world, plateau_rows):
    world = make_world(policy=plateau_policy())
    world.start()
    world.rows(plateau_rows[:4500])
    forged = []
    for recorded in world.log:
        item = recorded
        if isinstance(item, Envelope) and item.body.kind == "verdict_given":
            item = Envelope(
                seq=item.seq,
                role=item.role,
                body=item.body.model_copy(update={"verdict": "rejected"}),
                cause=item.cause,
                frame_cursor=item.frame_cursor,
            )
        forged.append(item)
    outcome = fold(forged)
    assert outcome.differences == 1
    assert "verdict_given.verdict" in str(outcome.shown[0])


def test_facts_lost_behind_the_last_durable_event_are_no_difference(make_world, plateau_rows):
    world = make_world(policy=plateau_policy())
    world.start()
    world.rows(plateau_rows[:2200])
    last = max(i for i, e in enumerate(world.log) if isinstance(e, Envelope) and e.role == "input")
    cut = [e for i, e in enumerate(world.log) if i <= last or isinstance(e, Rows)]
    assert fold(cut).differences == 0


def test_a_gap_in_the_rows_is_an_error(make_world, plateau_rows):
    world = make_world()
    world.start()
    from automode.engine import handle

    with pytest.raises(ReplayDifferenceError, match="row 5 came where 0 was due"):
        handle(world.state, [Rows(first=5, names=("step",), values=plateau_rows[:1])])


@settings(max_examples=12)
@given(sizes=st.lists(st.integers(1, 170), min_size=1, max_size=6))
def test_any_split_into_blocks_gives_the_same_facts(sizes):
    # Commands are answered between blocks, so answers are held back: only what rows alone lead to is compared.
    from tests.engine.conftest import World, plateau, rows_of

    values = rows_of(plateau(2600, seed=5))
    logs = []
    for split in ([20], sizes):
        world = World(policy=Policy(), mode="observe", hold={"scan", "diagnose"})
        world.start()
        world.rows(values, split)
        logs.append([(e.seq, e.frame_cursor, e.body) for e in world.log if isinstance(e, Envelope)])
    assert logs[0] == logs[1]


def test_what_is_said_of_trials_is_kept_with_their_card_and_changes_no_decision(make_world, plateau_rows):
    def played(says):
        world = make_world(policy=plateau_policy())
        answer = world._answer

        def also_says(command):
            if says and command.body.kind == "start_trial":
                body = command.body
                for card in (body.card, "0badcafe"):  # what no card stands for is nobody's
                    world.feed(
                        TrialsNoted(
                            card=card, trials=(body.trial,), resource=body.to_resource, what="alone", why="it"
                        )
                    )
            return answer(command)

        world._answer = also_says
        world.start()
        world.rows(plateau_rows[:4500])
        return world

    world, silent = played(True), played(False)
    (card,) = world.state.cards
    record = world.state.cards[card]
    started = [e.body for e in world.log if isinstance(e, Envelope) and e.body.kind == "start_trial"]
    assert [(n.trials[0], n.resource) for n in record.notes] == [(b.trial, b.to_resource) for b in started]
    assert CardRecord.from_state(record.to_state()) == record
    told = story(card, [e for e in world.log if isinstance(e, Envelope)])
    assert f"trial 0 to {record.notes[0].resource}: alone: it" in told
    outcome = fold(world.log)
    assert (outcome.differences, outcome.state.cards[card].notes) == (0, record.notes)
    assert world.states_of(card) == silent.states_of(card)
    assert world.facts("verdict_given") == silent.facts("verdict_given")
    assert world.facts("trial_decided") == silent.facts("trial_decided")


PLACED = {
    "schema": 1,
    "action": "fork",
    "reason": "manual",
    "because": "It fits one core.",
    "training_recipe": {"variants": [{"name": "a"}, {"name": "b"}], "resources": {"cpus": 2, "gpus": 0}},
    "budget_steps": 10,
    "asha": {"max_steps": 30},
}


@pytest.mark.parametrize("why", [None, "trials train in the training process"])
def test_what_a_card_asks_for_goes_with_every_trial_or_the_card_is_refused(make_world, plateau_rows, why):
    world = make_world(policy=Policy(reasons=()), mode="propose")
    world.run = world.run.model_copy(update={"why_no_resources": why})
    world.start()
    world.rows(plateau_rows[:1000])
    world.decide("submit", body=PLACED)
    if why is not None:
        (refused,) = world.facts("request_refused")
        assert "training_recipe.resources: the card asks for 2 cores and 0 GPUs" in refused.why
        assert why in refused.why
        assert not world.state.cards
        return
    (card,) = world.state.cards
    world.decide("approve", card, rev=1)
    world.rows(plateau_rows[1000:1200])
    started = [e.body for e in world.log if isinstance(e, Envelope) and e.body.kind == "start_trial"]
    assert len(started) >= 3
    assert {body.resources for body in started} == {Resources(cpus=2.0, gpus=0.0)}
    assert fold(world.log).differences == 0
