"""What a person's request does, word for word where a person reads it."""

from __future__ import annotations

from typing import Any

import pytest

from automode.planner.approval import CardRecord, Lifetime, apply, move, propose
from automode.planner.cards import CardState, PlanCard, card_id
from automode.planner.facts import CardMoved, CardProposed, ModeChanged, RequestRefused
from automode.planner.fitting import Funds, Held, quote
from automode.planner.inputs import Decided, Mode, Run
from automode.planner.policy import Policy
from automode.planner.pricing import worst_case
from automode.planner.recipes import Base
from automode.planner.requests import Desk, Response, respond

POLICY = Policy()
RUN = Run(
    total_steps=4000,
    batch=32,
    train_samples=1000,
    val_a=100,
    val_b=100,
    task="classification",
    has_ids=True,
    exact_losses=True,
)
FUNDS = Funds(remaining=3000 * 96.0, total=4000 * 96.0, spent=0.0)


def price(card: PlanCard) -> PlanCard | Held:
    return quote(card, policy=POLICY, run=RUN, funds=FUNDS, remaining_steps=3000)


def card_of(**changes: Any) -> PlanCard:
    card = PlanCard.model_validate(
        {
            "id": "0123abcd",
            "session": "s",
            "step": 1000,
            "action": "fork",
            "reason": "loss_plateau",
            "because": "3 %",
            "training_recipe": {"variants": [{"name": "a"}, {"name": "b"}, {"name": "c"}]},
            "budget_steps": 20,
            "asha": {"reduction_factor": 3, "max_steps": 60},
            "cost": {"sample_passes": 0, "share_of_remaining": 0},
            "cooldown_steps": 10,
            "base": {"step": 1000, "policy": POLICY.digest},
        }
        | changes
    )
    priced = price(card)
    assert isinstance(priced, PlanCard)
    return priced


def desk_of(mode: Mode = "propose", **changes: Any) -> Desk:
    return Desk(
        **(
            {
                "session": "s",
                "mode": mode,
                "run": RUN,
                "base": Base(step=1200, policy=POLICY.digest),
                "step": 1200,
                "time": 50.0,
                "ordinal": 3,
                "quote": price,
                "restorable": {"0123abcd", "bbbbbbbb"},
            }
            | changes
        )
    )


def record_of(card: PlanCard | None = None, *path: CardState, **lifetime: Any) -> CardRecord:
    record = propose(card or card_of(), step=1000, time=10.0, lifetime=Lifetime(**lifetime))
    for at, state in enumerate(path):
        apply(record, move(record, state, actor="ann", why="so"), step=1100 + at, time=20.0 + at)
    return record


def ask(verb: Any, *records: CardRecord, desk: Desk | None = None, **fields: Any) -> Response:
    cards = {r.card.id: r for r in records}
    fields.setdefault("card", "0123abcd" if records else None)
    return respond(cards, Decided(request="r1", verb=verb, actor="ann", **fields), desk or desk_of())


def moved(response: Response) -> CardMoved:
    assert len(response.facts) == 1, response
    fact = response.facts[0]
    assert isinstance(fact, CardMoved), fact
    return fact


def refused(response: Response) -> str:
    assert response.refused is not None, response
    return response.refused


def test_an_approval_moves_the_card_and_names_who() -> None:
    fact = moved(ask("approve", record_of(), rev=1, note="go"))
    assert (fact.after, fact.actor, fact.why) == (CardState.APPROVED, "ann", "go")


@pytest.mark.parametrize(
    "path",
    [
        (CardState.APPROVED,),
        (CardState.APPROVED, CardState.RUNNING),
        (CardState.APPROVED, CardState.RUNNING, CardState.ACCEPTED, CardState.ADOPTED),
    ],
)
def test_approving_twice_is_no_error_and_does_nothing(path: tuple[CardState, ...]) -> None:
    assert ask("approve", record_of(None, *path), rev=1) == Response()


def test_an_approval_names_the_revision_that_was_read() -> None:
    assert "needs the revision" in refused(ask("approve", record_of()))


def test_two_people_at_one_card_get_a_conflict_that_names_both_revisions() -> None:
    record = record_of()
    first = moved(ask("edit", record, rev=1, body={"budget_steps": 25}))
    apply(record, first, step=1150, time=30.0)
    for verb in ("approve", "edit", "refuse", "cancel", "revise"):
        why = refused(ask(verb, record, rev=1, note="x", body={"budget_steps": 30}))
        assert why == (
            f"conflict: this {verb} is about revision 1 of card 0123abcd, which is at revision 2 by ann at step 1150 "
            "(budget_steps, cost.sample_passes, cost.share_of_remaining); read revision 2 and answer again"
        )
    assert record.card.budget_steps == 25


def test_a_card_that_does_not_exist_is_said_so() -> None:
    assert "there is no card 0123abcd" in refused(ask("approve", card="0123abcd", rev=1))
    assert "needs the id of a card" in refused(ask("approve", card=None, rev=1))


def test_nothing_is_approved_while_the_mode_only_observes() -> None:
    assert "the mode is observe" in refused(ask("approve", record_of(), desk=desk_of("observe"), rev=1))


def test_a_card_that_cannot_run_or_no_longer_fits_is_not_approved() -> None:
    late = desk_of(quote=lambda c: quote(c, policy=POLICY, run=RUN, funds=FUNDS, remaining_steps=50))
    assert "cannot run (no_time)" in refused(ask("approve", record_of(), desk=late, rev=1))
    blind = RUN.model_copy(update={"why_no_evidence": "no validation loader"})
    unable = desk_of(quote=lambda c: quote(c, policy=POLICY, run=blind, funds=FUNDS, remaining_steps=3000))
    assert "no validation loader" in refused(ask("approve", record_of(), desk=unable, rev=1))


def test_a_stale_card_moves_there_and_the_approval_is_refused() -> None:
    desk = desk_of(base=Base(step=1200, policy=POLICY.digest, lineage="trunk:1"))
    response = ask("approve", record_of(), desk=desk, rev=1)
    fact, answer = response.facts
    assert isinstance(fact, CardMoved)
    assert fact.after is CardState.STALE
    assert isinstance(answer, RequestRefused)
    assert answer.why == "card 0123abcd is stale: it was made for trunk:0, and the run goes on as trunk:1"


def test_an_expired_card_is_not_approved() -> None:
    response = ask("approve", record_of(steps=200), rev=1)
    assert "is expired: nobody answered within 200 steps" in refused(response)


def test_a_finished_card_says_what_it_is() -> None:
    why = refused(ask("approve", record_of(None, CardState.REFUSED), rev=1))
    assert why == (
        "card 0123abcd is refused and cannot become approved; from there leads only: nothing: that is final"
    )


def test_a_card_sent_back_for_revision_needs_an_edit_before_it_can_be_approved() -> None:
    record = record_of()
    fact = moved(ask("revise", record, note="shorter, please"))
    assert (fact.after, fact.why) == (CardState.REVISE, "shorter, please")
    apply(record, fact, step=1201, time=51.0)
    assert "cannot become approved" in refused(ask("approve", record, rev=1))
    apply(record, moved(ask("edit", record, rev=1, body={"budget_steps": 25})), step=1202, time=52.0)
    assert moved(ask("approve", record, rev=2)).after is CardState.APPROVED


def test_a_revision_needs_a_note() -> None:
    assert "needs a note" in refused(ask("revise", record_of(), note="  "))


def test_an_edit_is_priced_again_and_cannot_state_its_own_cost() -> None:
    record = record_of()
    body = record.card.dump() | {"budget_steps": 30, "cost": {"sample_passes": 1, "share_of_remaining": 0}}
    fact = moved(ask("edit", record, rev=1, body=body, note="longer"))
    assert fact.edited is not None
    assert fact.edited.rev == 2
    assert fact.edited.cost.sample_passes == worst_case(fact.edited, RUN).passes
    assert fact.difference["budget_steps"] == (20, 30)


def test_an_edit_after_approval_asks_for_approval_again() -> None:
    record = record_of(None, CardState.APPROVED)
    fact = moved(ask("edit", record, rev=1, body={"budget_steps": 30}))
    assert (fact.before, fact.after, fact.rev) == (CardState.APPROVED, CardState.PROPOSED, 2)


def test_an_edit_that_changes_nothing_does_nothing() -> None:
    record = record_of()
    assert ask("edit", record, rev=1, body=record.card.dump()) == Response()
    assert (
        ask("edit", record, rev=1, body={"cost": {"sample_passes": 1, "share_of_remaining": 0}}) == Response()
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"reason": "manual"}, ["cannot change reason"]),
        ({"base": {"step": 1, "policy": POLICY.digest}}, ["cannot change base"]),
        ({"diagnostics": {"z": 9.0}}, ["cannot change diagnostics"]),
        ({"id": "ffffffff", "session": "t"}, ["cannot change id, session"]),
        ({"budget_steps": -1}, ["budget_steps", "greater than or equal to 0"]),
        ({"budgetsteps": 3}, ["budgetsteps", "Extra inputs"]),
        ({"budget_steps": 61}, ["must lie between 1 and asha.max_steps (60)"]),
        (
            {"merge_recipe": {"kind": "distill", "steps": 100_000}},
            ["cannot run (over_cap)", "distilling takes", "grant it by `pacing.exploration_share`"],
        ),
        (
            {"merge_recipe": {"kind": "distill", "teacher": "mixture"}},
            ["cannot run (cannot_run)", "gate_recipe"],
        ),
        ({"asha": {"reduction_factor": 3, "max_steps": 3000}}, ["cannot run (over_cap)"]),
    ],
)
def test_an_edit_into_nonsense_is_refused_with_the_reason(body: dict[str, Any], words: list[str]) -> None:
    why = refused(ask("edit", record_of(), rev=1, body=body))
    for word in words:
        assert word in why


def test_an_edit_brings_the_card() -> None:
    assert "edit needs the card" in refused(ask("edit", record_of(), rev=1))


def test_a_running_card_cannot_be_edited() -> None:
    record = record_of(None, CardState.APPROVED, CardState.RUNNING)
    assert "is running and cannot become proposed" in refused(
        ask("edit", record, rev=1, body={"budget_steps": 30})
    )


def test_refuse_and_cancel_end_a_card_once() -> None:
    for verb in ("refuse", "cancel"):
        for path in ((), (CardState.APPROVED,), (CardState.REVISE,)):
            assert moved(ask(verb, record_of(None, *path))).after is CardState.REFUSED
        assert ask(verb, record_of(None, CardState.REFUSED)) == Response()


def test_cancel_stops_what_runs_and_refuse_points_to_it() -> None:
    record = record_of(None, CardState.APPROVED, CardState.RUNNING)
    assert moved(ask("cancel", record)).after is CardState.REFUSED
    assert "cancel stops it" in refused(ask("refuse", record))


ADOPTED = (CardState.APPROVED, CardState.RUNNING, CardState.ACCEPTED, CardState.ADOPTED)


def test_a_rollback_is_asked_of_the_world_and_moves_nothing_yet() -> None:
    assert ask("rollback", record_of(None, *ADOPTED)) == Response(roll_back="0123abcd")


def test_only_what_was_adopted_can_be_rolled_back_and_only_once() -> None:
    assert "only an adopted card" in refused(ask("rollback", record_of()))
    assert ask("rollback", record_of(None, *ADOPTED, CardState.ROLLED_BACK)) == Response()


def test_an_export_has_nothing_to_roll_back() -> None:
    why = refused(ask("rollback", record_of(None, *ADOPTED), desk=desk_of(restorable=set())))
    assert "exported beside the trunk" in why


def test_a_later_adoption_is_rolled_back_first() -> None:
    early, late = record_of(None, *ADOPTED), record_of(card_of(id="bbbbbbbb"), *ADOPTED)
    late.history[-1] = late.history[-1].__class__(
        **{f: getattr(late.history[-1], f) for f in late.history[-1].__slots__} | {"step": 1190}
    )
    assert "card bbbbbbbb was adopted on top" in refused(ask("rollback", early, late))
    assert ask("rollback", early, late, card="bbbbbbbb") == Response(roll_back="bbbbbbbb")
    exported = desk_of(restorable={"0123abcd"})
    assert ask("rollback", early, late, desk=exported) == Response(roll_back="0123abcd")


def test_nothing_is_rolled_back_under_a_running_card() -> None:
    running = record_of(card_of(id="bbbbbbbb"), CardState.APPROVED, CardState.RUNNING)
    assert "card bbbbbbbb is running on top" in refused(ask("rollback", record_of(None, *ADOPTED), running))


def test_the_mode_changes_at_any_step() -> None:
    response = ask("mode", mode="act")
    assert response.facts == (ModeChanged(before="propose", after="act", actor="ann"),)
    assert ask("mode", mode="propose") == Response()


def test_a_mode_that_makes_no_sense_is_refused() -> None:
    assert "one of observe, propose and act" in refused(ask("mode"))
    assert "one of observe, propose and act" in refused(ask("mode", mode="off"))
    assert "started with automode off" in refused(ask("mode", mode="act", desk=desk_of("off")))
    overlapping = desk_of(run=RUN.model_copy(update={"overlap": 7}))
    assert "7 validation samples are training samples too" in refused(
        ask("mode", mode="act", desk=overlapping)
    )


MINE = {
    "action": "fork",
    "selection": {"kind": "indices", "ids": [1, 2, 3]},
    "training_recipe": {"variants": [{"name": "plain"}]},
    "budget_steps": 20,
    "asha": {"max_steps": 20},
}


def submitted(response: Response) -> PlanCard:
    assert len(response.facts) == 1, response
    fact = response.facts[0]
    assert isinstance(fact, CardProposed), fact
    return fact.card


def test_a_person_submits_a_card_of_their_own() -> None:
    card = submitted(ask("submit", body=MINE, note="these three"))
    assert card.created_by == "ann"
    assert card.reason == "manual"
    assert card.because == "these three"
    assert card.id == card_id("s", "manual", 1200, 3)
    assert card.base == Base(step=1200, policy=POLICY.digest)
    assert card.cost.sample_passes == worst_case(card, RUN).passes
    assert card.cooldown_steps == 0


def test_a_person_may_insist_on_the_raw_tail() -> None:
    tail = {"kind": "quantile", "from": 0.9, "to": 1.0, "exclude_suspects": False}
    card = submitted(ask("submit", body=MINE | {"selection": tail}))
    assert card.selection.kind == "quantile"


def test_a_stop_of_ones_own_needs_nothing_but_the_word() -> None:
    card = submitted(ask("submit", body={"action": "stop"}))
    assert (card.action, card.budget_steps) == ("stop", 0)
    assert (card.acceptance.z, card.acceptance.slices) == (0.0, "ignore")


def test_a_merge_of_ones_own_needs_no_ladder() -> None:
    card = submitted(ask("submit", body={"action": "merge", "merge_recipe": {"kind": "swa"}}))
    assert card.budget_steps == 0


def test_where_a_submitted_card_comes_from_is_ours_to_say() -> None:
    forged = MINE | {"created_by": "planner", "id": "ffffffff", "rev": 9, "session": "t", "step": 1}
    card = submitted(ask("submit", body=forged | {"cost": {"sample_passes": 0, "share_of_remaining": 0}}))
    assert (card.created_by, card.rev, card.session, card.step) == ("ann", 1, "s", 1200)
    assert card.id != "ffffffff"
    assert card.cost.sample_passes > 0
    request = Decided(request="r1", verb="submit", actor="planner", body=MINE)
    assert "belongs to automode" in refused(respond({}, request, desk_of()))


def test_a_saved_card_is_bound_to_what_it_was_made_against() -> None:
    saved = card_of().dump()
    assert submitted(ask("submit", body=saved)).budget_steps == 20
    gone_on = desk_of(base=Base(step=1200, policy=POLICY.digest, lineage="trunk:1"))
    assert "the card is stale: it was made against lineage trunk:0" in refused(
        ask("submit", body=saved, desk=gone_on)
    )
    stranger = saved | {"base": saved["base"] | {"policy": "sha256:" + "e" * 64}}
    assert "the card is stale: it was made against policy" in refused(ask("submit", body=stranger))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (None, "submit needs the card"),
        ({"action": "fork"}, "budget_steps: Field required"),
        ({"action": "fork", "budget_steps": 3}, "a fork needs"),
        (MINE | {"selection": {"kind": "indices"}}, "needs `ids`, `artifact` or `slice`"),
        (MINE | {"asha": {"max_steps": 2900}}, "cannot run (over_cap)"),
        (MINE | {"merge_recipe": {"kind": "adapter_fuse"}}, "whole networks are trained by"),
        (MINE | {"reason": "boredom"}, "reason"),
    ],
)
def test_a_submission_that_cannot_be_taken_is_refused(body: dict[str, Any] | None, words: str) -> None:
    assert words in refused(ask("submit", body=body))


def test_nothing_is_submitted_while_the_mode_only_observes() -> None:
    assert "the mode is observe" in refused(ask("submit", desk=desk_of("observe"), body=MINE))


def test_a_refusal_names_the_request_it_answers() -> None:
    answer = ask("revise", record_of()).facts[-1]
    assert isinstance(answer, RequestRefused)
    assert (answer.request, answer.verb, answer.card) == ("r1", "revise", "0123abcd")
