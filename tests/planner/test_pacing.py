"""Pacing: what is held and why, how ladders are fitted into caps and time, how cooldowns adapt."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil, floor
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.planner.approval import CardRecord, Lifetime, propose
from automode.planner.cards import CardState, PlanCard, Reason
from automode.planner.fitting import MARGIN_SHARE, no_time, unaffordable
from automode.planner.inputs import Run
from automode.planner.pacing import (
    EVERY,
    FACTOR_BOUNDS,
    Funds,
    Held,
    PacingState,
    admit,
    after_verdict,
    quote,
)
from automode.planner.policy import Policy
from automode.planner.pricing import WorstCase, price_fork, worst_case
from automode.planner.recipes import Base, MergeSwa, TrainingRecipe, Variant
from automode.planner.rules import PRIORITY
from automode.planner.rules.base import Proposal, View
from automode.planner.watching import signals_for

SHARE = Policy().pacing.exploration_share
THREE = TrainingRecipe(variants=tuple(Variant(name=n) for n in ("a", "b", "c")))


def run_of(**changes: Any) -> Run:
    return Run.model_validate(
        {
            "total_steps": 4000,
            "batch": 32,
            "train_samples": 1024,
            "val_a": 100,
            "val_b": 100,
            "task": "classification",
            "has_ids": True,
            "exact_losses": True,
        }
        | changes
    )


def view_of(
    step: int = 1000, remaining: int = 3000, budget: int = 800, policy: Policy | None = None, **run: Any
) -> View:
    policy = policy or Policy()
    return View(
        step=step,
        remaining=remaining,
        planning_budget=budget,
        policy=policy,
        run=run_of(**run),
        signals=signals_for(policy, budget),
    )


def fork(
    reason: Reason = "loss_plateau",
    recipe: TrainingRecipe = THREE,
    share: float | None = None,
    least_steps: int = 0,
) -> Proposal:
    return Proposal(
        reason=reason,
        action="fork",
        because="1 %.",
        training_recipe=recipe,
        share=share,
        least_steps=least_steps,
    )


MERGE = Proposal(reason="merge_cadence", action="merge", because="75 %.", merge_recipe=MergeSwa())


def try_admit(
    proposal: Proposal,
    view: View,
    state: PacingState | None = None,
    open_cards: list[CardRecord] | None = None,
    funds: Funds | None = None,
    outranked_by: str | None = None,
) -> PlanCard | Held:
    per_step = 3.0 * view.run.batch
    return admit(
        proposal,
        view=view,
        state=state or PacingState(),
        open_cards=open_cards or [],
        funds=funds
        or Funds(
            remaining=view.remaining * per_step, total=(view.step + view.remaining) * per_step, spent=0.0
        ),
        session="s",
        ordinal=0,
        base=Base(step=view.step, policy=view.policy.digest),
        outranked_by=outranked_by,
    )


def made(result: PlanCard | Held) -> PlanCard:
    assert isinstance(result, PlanCard), result
    return result


def held(result: PlanCard | Held) -> Held:
    assert isinstance(result, Held), result
    return result


def record_of(card: PlanCard, state: CardState) -> CardRecord:
    record = propose(card, step=card.step, time=0.0, lifetime=Lifetime())
    record.state = state
    return record


def test_a_proposal_that_fits_becomes_a_priced_card() -> None:
    view = view_of()
    card = made(try_admit(fork(), view))
    assert card.created_by == "planner"
    assert card.step == 1000
    assert card.asha is not None
    assert card.cost.sample_passes == worst_case(card, view.run).passes
    exact = card.cost.sample_passes / (3000 * 96)
    assert exact <= card.cost.share_of_remaining <= 1.01 * exact
    assert card.cost.share_of_remaining <= SHARE
    assert card.cooldown_steps == 800
    assert card.asha.max_steps <= 800
    assert card.asha.max_steps == card.budget_steps * 3


def test_the_same_proposal_gives_the_same_card() -> None:
    assert try_admit(fork(), view_of()) == try_admit(fork(), view_of())


@pytest.mark.parametrize(("remaining", "ratio"), [(3000, 3), (8000, 9)])
def test_the_ladder_is_the_longest_that_fits_with_one_rung_to_spare_in_a_long_run(
    remaining: int, ratio: int
) -> None:
    view = view_of(remaining=remaining)
    card = made(try_admit(fork(), view))
    assert card.asha is not None
    assert card.asha.max_steps == card.budget_steps * ratio
    top = (card.budget_steps + 1) * ratio
    longer = card.revised(budget_steps=card.budget_steps + 1, asha={"reduction_factor": 3, "max_steps": top})
    assert worst_case(longer, view.run).passes > SHARE * remaining * 96 or top > 800


def test_a_small_run_gets_a_short_ladder_without_the_extra_rung() -> None:
    card = made(try_admit(fork(), view_of(step=300, remaining=1700, budget=340)))
    assert card.asha is not None
    assert card.asha.max_steps == 3 * card.budget_steps
    assert card.budget_steps >= 20


@given(st.floats(0.001, 0.2))
def test_a_proposal_s_own_share_of_the_run_holds_below_the_policy_s_caps(share: float) -> None:
    view = view_of()
    answer = try_admit(fork(share=share), view)
    if isinstance(answer, Held):
        assert answer.code == "over_cap"
        assert f"{share:.0%} of the run for this reason" in answer.why
        shortest = price_fork(recipe=THREE, levels=(20, 60), reduction_factor=3, run=view.run)
        assert shortest.passes > floor(share * 4000 * 96)
    else:
        assert answer.cost.sample_passes <= share * 4000 * 96


def test_a_ladder_that_cannot_be_as_long_as_its_rule_asks_is_not_climbed() -> None:
    top = made(try_admit(fork(), view_of())).asha
    assert top is not None
    card = made(try_admit(fork(least_steps=top.max_steps), view_of()))
    assert card.asha == top
    answer = held(try_admit(fork(least_steps=2 * top.max_steps), view_of()))
    assert answer.code == "over_cap"
    assert f"3 trials, {ceil(2 * top.max_steps / 3)} to " in answer.why


def test_what_does_not_fit_is_held_with_the_numbers() -> None:
    answer = held(try_admit(fork(), view_of(step=300, remaining=700, budget=340)))
    assert answer.code == "over_cap"
    assert "3 trials, 20 to 60 steps" in answer.why
    assert f"{SHARE:.0%} of the 67,200 that remain" in answer.why


def test_a_planning_budget_below_the_shortest_ladder_is_held() -> None:
    answer = held(try_admit(fork(), view_of(budget=50)))
    assert answer.code == "no_time"
    assert "20 to 60 steps" in answer.why


def test_the_control_has_to_reach_the_top_before_the_run_ends() -> None:
    # Plenty of compute on top of the run, but only 70 steps left of it.
    policy = Policy.model_validate(
        {"budget": "on_top", "pacing": {"exploration_share": 1.0, "total_share": 1.0}}
    )
    answer = held(
        try_admit(
            fork(),
            view_of(step=3930, remaining=62, policy=policy),
            funds=Funds(remaining=1e7, total=1e7, spent=0),
        )
    )
    assert answer.code == "no_time"
    assert "62 steps are left" in answer.why
    card = made(
        try_admit(
            fork(),
            view_of(step=3930, remaining=64, policy=policy),
            funds=Funds(remaining=1e7, total=1e7, spent=0),
        )
    )
    assert card.asha is not None
    assert card.asha.max_steps == 60  # 60 + 3 % margin of 4 steps, exactly


def test_within_the_budget_the_cards_own_cost_is_taken_off_the_steps_that_are_left() -> None:
    policy = Policy.model_validate({"pacing": {"exploration_share": 1.0, "total_share": 1.0}})
    rich = Funds(remaining=1e7, total=1e7, spent=0)
    answer = held(try_admit(fork(), view_of(step=3800, remaining=200, policy=policy), funds=rich))
    assert answer.code == "no_time"
    assert "costs up to" in answer.why


def test_what_is_spent_counts_against_the_whole_runs_share() -> None:
    view = view_of()
    total = 4000 * 96.0
    answer = held(try_admit(fork(), view, funds=Funds(remaining=3000 * 96.0, total=total, spent=0.3 * total)))
    assert answer.code == "over_total"
    little = held(
        try_admit(fork(), view, funds=Funds(remaining=3000 * 96.0, total=total, spent=0.3 * total - 5000))
    )
    assert little.code == "over_cap"
    assert "5,000 may be spent" in little.why


@given(remaining=st.integers(300, 4000))
def test_where_all_trials_do_not_fit_fewer_are_tried_and_what_is_held_names_the_fewest(
    remaining: int,
) -> None:
    two, one = (fork(recipe=TrainingRecipe(variants=THREE.variants[:n])) for n in (2, 1))
    proposal = replace(fork(), cheaper=(two, one), diagnostics={"known": 1.0})
    view = view_of(step=300, remaining=remaining, budget=340)
    alone = [try_admit(each, view) for each in (fork(), two, one)]
    answer = try_admit(proposal, view)
    fits = [card for card in alone if isinstance(card, PlanCard)]
    if fits:
        assert made(answer).training_recipe == fits[0].training_recipe
        assert made(answer).cost == fits[0].cost
        assert made(answer).diagnostics["known"] == 1.0
    else:
        assert answer == alone[-1]
        assert "the shortest ladder worth running (1 trial, 20 steps)" in held(answer).why


def test_each_form_of_a_proposal_has_a_share_of_its_own() -> None:
    dear, rich = (replace(fork(), share=share) for share in (0.0001, 0.2))
    view = view_of()
    assert held(try_admit(dear, view)).code == "over_cap"
    answer = made(try_admit(replace(dear, cheaper=(rich,)), view))
    assert answer.cost == made(try_admit(rich, view)).cost
    assert held(try_admit(replace(rich, share=0.0001, cheaper=(dear,)), view)).code == "over_cap"


def test_the_shortest_rung_counts_optimizer_steps_and_not_batches() -> None:
    often = fork(recipe=TrainingRecipe(variants=(Variant(name="often", updates=4),)))
    once = fork(recipe=TrainingRecipe(variants=(Variant(name="once"),)))
    mixed = fork(recipe=TrainingRecipe(variants=(Variant(name="once"), Variant(name="often", updates=4))))
    view = view_of(step=20, remaining=180, budget=19)
    card = made(try_admit(often, view))
    assert 5 <= card.budget_steps <= 19
    for proposal in (once, mixed):
        assert "20" in held(try_admit(proposal, view)).why
    long = Policy.model_validate({"pacing": {"min_rung": 60}})
    low = held(try_admit(often, view_of(step=20, remaining=180, budget=12, policy=long)))
    assert "goes from 15 to 15 steps, and the planning budget is 12" in low.why


def test_a_card_is_judged_by_what_its_rule_asks_for() -> None:
    assert made(try_admit(fork(), view_of())).acceptance.metric == "utility"
    assert made(try_admit(replace(fork(), metric="log_score"), view_of())).acceptance.metric == "log_score"


def test_what_running_cards_hold_the_next_one_may_not_take() -> None:
    # The ledger lets cards hold one share of what remains together; a card beyond that would be approved and then refused.
    remaining, kept = 3000 * 96.0, 10_000.0
    card = made(
        try_admit(
            fork(), view_of(), funds=Funds(remaining=remaining - kept, total=1e7, spent=kept, held=kept)
        )
    )
    assert card.cost.sample_passes <= SHARE * remaining - kept
    full = Funds(
        remaining=(1.0 - SHARE) * remaining, total=1e7, spent=SHARE * remaining, held=SHARE * remaining
    )
    assert held(try_admit(fork(), view_of(), funds=full)).code == "over_cap"


def test_expected_seconds_and_memory_stand_on_the_card() -> None:
    view = view_of()
    funds = Funds(remaining=3000 * 96.0, total=4000 * 96.0, spent=0, seconds_per_step=0.5, memory_mib=12.0)
    card = made(try_admit(fork(), view, funds=funds))
    exact = card.cost.sample_passes / 96 * 0.5
    assert exact <= card.cost.seconds <= 1.01 * exact  # three digits, rounded up
    assert card.cost.memory_mib == 12.0


@given(
    remaining=st.integers(1, 5000),
    budget=st.integers(10, 1000),
    batch=st.floats(1, 256),
    val=st.integers(30, 2000),
    n=st.integers(1, 9),
    eta=st.integers(2, 4),
    share=st.floats(0.01, 1.0),
    within=st.booleans(),
    spent=st.floats(0, 1e6),
)
def test_every_admitted_card_fits_its_caps_and_its_time(
    remaining: int,
    budget: int,
    batch: float,
    val: int,
    n: int,
    eta: int,
    share: float,
    within: bool,
    spent: float,
) -> None:
    policy = Policy.model_validate(
        {
            "budget": "within" if within else "on_top",
            "pacing": {"exploration_share": share, "reduction_factor": eta},
        }
    )
    view = view_of(500, remaining, budget, policy, batch=batch, val_a=val, val_b=val, averages=True)
    per_step = 3.0 * batch
    funds = Funds(remaining=remaining * per_step, total=(500 + remaining) * per_step, spent=spent)
    recipe = TrainingRecipe(variants=tuple(Variant(name=f"v{i}") for i in range(n)))
    card = try_admit(fork(recipe=recipe), view, funds=funds)
    if isinstance(card, Held):
        assert card.code in {"over_cap", "over_total", "no_time"}
        return
    assert card.asha is not None
    worst = worst_case(card, view.run)
    assert ceil(worst.passes) <= floor(share * funds.remaining)
    assert ceil(worst.passes) <= floor(policy.pacing.total_share * funds.total - spent)
    paid = ceil(worst.passes / per_step) if within else 0
    assert worst.control_steps + paid + 1 + ceil(MARGIN_SHARE * worst.control_steps) <= remaining
    assert card.budget_steps >= policy.pacing.min_rung
    assert card.asha.max_steps <= budget
    assert quote(card, policy=policy, run=view.run, funds=funds, remaining_steps=remaining) == card


def test_warm_up_holds_and_trouble_at_the_start_may_come_at_half_of_it() -> None:
    answer = held(try_admit(fork(), view_of(step=199, remaining=3801)))
    assert (answer.code, answer.why) == ("warmup", "step 199 lies in the warm-up, which ends at step 200")
    made(try_admit(fork(), view_of(step=200, remaining=3800)))
    assert held(try_admit(fork("instability_spike"), view_of(step=99, remaining=3901))).code == "warmup"
    made(try_admit(fork("instability_spike"), view_of(step=100, remaining=3900)))
    made(try_admit(fork("learning_rate_probe"), view_of(step=100, remaining=3900)))


def test_a_warm_up_that_the_policy_states_binds_every_reason() -> None:
    policy = Policy.model_validate({"pacing": {"warmup_steps": 500}})
    for reason in ("instability_spike", "loss_plateau"):
        answer = held(try_admit(fork(reason), view_of(step=499, remaining=3501, policy=policy)))
        assert answer.code == "warmup"


def test_no_more_cards_than_the_policy_allows() -> None:
    state = PacingState(counts={"loss_plateau": 10, "high_loss_tail": 6})
    answer = held(try_admit(fork(), view_of(), state))
    assert (answer.code, answer.why) == ("max_cards", "16 cards were made, and pacing.max_cards is 16")


def test_no_more_adopted_cards_on_top_of_each_other_than_the_policy_allows() -> None:
    policy = Policy.model_validate({"pacing": {"max_depth": 2}})
    view = view_of(policy=policy)
    cards = [record_of(made(try_admit(fork(), view)), CardState.ADOPTED) for _ in range(2)]
    rolled_back = record_of(cards[0].card, CardState.ROLLED_BACK)
    made(try_admit(fork(), view, open_cards=[cards[0], rolled_back]))
    for proposal in (fork("instability_spike"), MERGE):
        answer = held(try_admit(proposal, view, open_cards=cards))
        assert answer.code == "max_depth"
        assert "2 adopted cards stand on top of each other, and pacing.max_depth is 2" in answer.why
    none = view_of(policy=Policy.model_validate({"pacing": {"max_depth": 0}}))
    assert held(try_admit(fork(), none)).code == "max_depth"


def test_the_policy_says_by_how_much_cooldowns_adapt() -> None:
    policy = Policy.model_validate(
        {"pacing": {"cooldown_grow": 2.0, "cooldown_shrink": 0.25, "cooldown_steps": 100}}
    )
    for outcome, factor in (
        (CardState.ADOPTED, 0.25),
        (CardState.INCONCLUSIVE, 2.0),
        (CardState.REJECTED, 4.0),
    ):
        state = PacingState()
        view = view_of(policy=policy)
        after_verdict(
            state, made(try_admit(fork(), view)), outcome, step=1000, policy=policy, planning_budget=800
        )
        assert state.until["loss_plateau"] == 1000 + round(100 * factor)
        again = view_of(step=5000, remaining=5000, policy=policy)
        assert made(try_admit(fork(), again, state)).cooldown_steps == round(100 * factor)


def test_a_reason_cools_down_and_so_do_the_others_but_never_instability() -> None:
    state = PacingState(until={"loss_plateau": 1200, EVERY: 1100})
    assert held(try_admit(fork(), view_of(step=1199), state)).code == "cooldown"
    made(try_admit(fork(), view_of(step=1200), state))
    assert held(try_admit(fork("high_loss_tail"), view_of(step=1099), state)).code == "global_cooldown"
    made(try_admit(fork("instability_spike"), view_of(step=1000), state))
    own = PacingState(until={"instability_spike": 1200})
    assert held(try_admit(fork("instability_spike"), view_of(step=1000), own)).code == "cooldown"


@pytest.mark.parametrize("state", [CardState.APPROVED, CardState.RUNNING, CardState.ACCEPTED])
def test_one_fork_at_a_time(state: CardState) -> None:
    view = view_of()
    running = record_of(made(try_admit(fork("residual_cluster"), view)), state)
    answer = held(try_admit(fork(), view, open_cards=[running]))
    assert answer.code == "busy"
    assert running.card.id in answer.why
    made(try_admit(MERGE, view, open_cards=[running]))


def test_a_merge_stands_in_no_forks_way_and_no_fork_outranks_it() -> None:
    view = view_of()
    merging = record_of(made(try_admit(MERGE, view)), CardState.RUNNING)
    made(try_admit(fork(), view, open_cards=[merging]))
    assert held(try_admit(MERGE, view, open_cards=[merging])).code == "waiting"
    just_now = record_of(made(try_admit(fork("instability_spike"), view)), CardState.PROPOSED)
    made(try_admit(MERGE, view, open_cards=[just_now], outranked_by=just_now.card.id))
    made(try_admit(fork(), view, open_cards=[merging], outranked_by=merging.card.id))


@pytest.mark.parametrize("state", [CardState.APPROVED, CardState.RUNNING, CardState.ACCEPTED])
def test_no_run_is_ended_while_a_fork_trains(state: CardState) -> None:
    stop = Proposal(
        reason="generalization_gap", action="stop", because="It memorises: 8 validations.", risk="high"
    )
    view = view_of(step=4000)
    working = record_of(made(try_admit(fork(), view)), state)
    assert held(try_admit(stop, view, open_cards=[working])).code == "busy"
    waiting = record_of(working.card, CardState.PROPOSED)
    card = made(try_admit(stop, view, open_cards=[waiting]))
    assert (card.action, card.budget_steps, card.asha) == ("stop", 0, None)
    assert (card.acceptance.z, card.acceptance.slices) == (0.0, "ignore")


def test_a_card_that_waits_for_a_person_blocks_its_own_reason_only() -> None:
    view = view_of()
    for state in (CardState.PROPOSED, CardState.REVISE):
        waiting = record_of(made(try_admit(fork(), view)), state)
        assert held(try_admit(fork(), view, open_cards=[waiting])).code == "waiting"
        made(try_admit(fork("instability_spike"), view, open_cards=[waiting]))


def test_of_two_proposals_of_one_moment_the_urgent_one_wins() -> None:
    view = view_of()
    first = record_of(made(try_admit(fork("instability_spike"), view)), CardState.PROPOSED)
    answer = held(try_admit(fork(), view, open_cards=[first], outranked_by=first.card.id))
    assert answer.code == "outranked"
    assert "instability_spike" in answer.why


def test_finished_cards_are_passed_over() -> None:
    view = view_of()
    finals = [s for s in CardState if s in {CardState.ADOPTED, CardState.REJECTED, CardState.STALE}]
    cards = [record_of(made(try_admit(fork(), view)), s) for s in finals]
    made(try_admit(fork(), view, open_cards=cards))


def test_what_this_run_cannot_do_is_held() -> None:
    answer = held(try_admit(fork(), view_of(why_no_evidence="no validation loader")))
    assert answer.code == "cannot_run"
    assert "no validation loader" in answer.why


def test_no_steps_left_is_no_time() -> None:
    assert held(try_admit(MERGE, view_of(step=4000, remaining=0))).code == "no_time"


def test_every_reason_has_a_place_in_the_order() -> None:
    assert set(PRIORITY) == set(get_args(Reason))


def test_adoption_shortens_a_cooldown_and_disappointment_lengthens_it() -> None:
    expected = {
        CardState.ADOPTED: 0.75,
        CardState.INCONCLUSIVE: 1.5,
        CardState.FAILED: 1.5,
        CardState.REJECTED: 2.25,
        CardState.ROLLED_BACK: 2.25,
    }
    for outcome, factor in expected.items():
        state = PacingState()
        card = made(try_admit(fork(), view_of()))
        facts = after_verdict(state, card, outcome, step=1500, policy=Policy(), planning_budget=800)
        assert [(f.reason, f.until) for f in facts] == [
            ("loss_plateau", 1500 + round(800 * factor)),
            (EVERY, 1700),
        ]
        assert state.factor == {"loss_plateau": factor}
        assert state.until == {f.reason: f.until for f in facts}


@pytest.mark.parametrize("outcome", [CardState.REFUSED, CardState.EXPIRED])
def test_a_card_that_nobody_wanted_cools_down_its_own_reason_only(outcome: Any) -> None:
    state = PacingState()
    card = made(try_admit(fork(), view_of()))
    facts = after_verdict(state, card, outcome, step=1500, policy=Policy(), planning_budget=800)
    assert [f.reason for f in facts] == ["loss_plateau"]


def test_a_stale_card_cools_nothing_down() -> None:
    state = PacingState()
    card = made(try_admit(fork(), view_of()))
    assert after_verdict(state, card, CardState.STALE, step=1500, policy=Policy(), planning_budget=800) == []
    assert state == PacingState()


def test_the_next_card_of_a_disappointing_reason_carries_the_longer_cooldown() -> None:
    state = PacingState()
    card = made(try_admit(fork(), view_of()))
    after_verdict(state, card, CardState.REJECTED, step=1000, policy=Policy(), planning_budget=800)
    again = made(try_admit(fork(), view_of(step=2800, remaining=1200), state))
    assert again.cooldown_steps == round(800 * 2.25)


def test_the_factor_stays_within_bounds() -> None:
    low, high = FACTOR_BOUNDS
    card = made(try_admit(fork(), view_of()))
    for outcome, bound in ((CardState.REJECTED, high), (CardState.ADOPTED, low)):
        state = PacingState()
        for step in range(30):
            after_verdict(state, card, outcome, step=step, policy=Policy(), planning_budget=800)  # type: ignore[arg-type]
        assert state.factor["loss_plateau"] == bound


def test_a_later_cooldown_is_never_shortened_by_an_earlier_one() -> None:
    state = PacingState(until={"loss_plateau": 9000, EVERY: 9000})
    card = made(try_admit(fork(), view_of()))
    after_verdict(state, card, CardState.ADOPTED, step=1000, policy=Policy(), planning_budget=800)
    assert state.until == {"loss_plateau": 9000, EVERY: 9000}


def test_the_state_survives_json() -> None:
    state = PacingState(until={"loss_plateau": 10}, factor={"loss_plateau": 1.5}, counts={"loss_plateau": 2})
    assert PacingState.from_state(json.loads(json.dumps(state.to_state()))) == state


def test_making_a_card_counts_it() -> None:
    state = PacingState()
    card = made(try_admit(fork(), view_of(), state))
    state.made(card)
    state.made(card)
    assert state.counts == {"loss_plateau": 2}


def test_a_part_of_a_sample_pass_does_not_slip_under_the_cap() -> None:
    policy, funds = Policy(), Funds(remaining=1e6, total=1e6, spent=0)
    assert unaffordable(WorstCase(train=100.4), 100.4, funds, policy) is not None  # the ledger would need 101
    assert unaffordable(WorstCase(train=100.4), 101.0, funds, policy) is None


def test_the_limits_are_inclusive() -> None:
    view = view_of()
    priced = worst_case(made(try_admit(fork(), view)), view.run)
    funds = Funds(remaining=1e6, total=1e6, spent=0)
    assert unaffordable(priced, ceil(priced.passes), funds, view.policy) is None
    assert unaffordable(priced, ceil(priced.passes) - 1, funds, view.policy) is not None
    needed = priced.control_steps + ceil(priced.passes / 96) + 1 + ceil(MARGIN_SHARE * priced.control_steps)
    assert no_time(priced, needed, view.run, view.policy) is None
    assert no_time(priced, needed - 1, view.run, view.policy) is not None


def test_a_merge_explores_nothing_and_may_take_the_total_share_of_what_remains() -> None:
    """Short runs with much held-out data were denied their finish, whose price is a fixed number of looks at that data."""
    price = worst_case(made(try_admit(MERGE, view_of())), view_of().run).passes
    rest = price / 0.2
    funds = Funds(remaining=rest, total=20 * rest, spent=0.0)
    made(try_admit(MERGE, view_of(), funds=funds))
    answer = held(try_admit(MERGE, view_of(), funds=replace(funds, remaining=price / 0.31)))
    assert answer.code == "over_cap"
    assert "30% of the" in answer.why
    pacing = Policy().pacing.model_copy(update={"total_share": 0.1})
    small = view_of(policy=Policy().model_copy(update={"pacing": pacing}))
    made(try_admit(MERGE, small, funds=replace(funds, remaining=price / 0.14)))
    spent_up = replace(funds, spent=0.3 * funds.total - price / 2)
    assert held(try_admit(MERGE, view_of(), funds=spent_up)).code == "over_cap"
