"""Who may let a card run, when it goes stale, and a state machine over everything that can happen to one."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from automode.errors import ConflictError
from automode.planner.approval import (
    CardRecord,
    Lifetime,
    apply,
    decide,
    move,
    propose,
    staleness,
    sweep,
)
from automode.planner.cards import TRANSITIONS, WAITING, CardState, PlanCard, Reason
from automode.planner.facts import CardMoved, CardProposed, RequestRefused
from automode.planner.inputs import Decided, Run
from automode.planner.policy import Policy
from automode.planner.recipes import Base
from automode.planner.requests import Desk, respond

POLICY = Policy()
ASKED = ("residual_cluster", "loss_plateau")
FINAL = {state for state, after in TRANSITIONS.items() if not after}


def card_of(**changes: Any) -> PlanCard:
    return PlanCard.model_validate(
        {
            "id": "0123abcd",
            "session": "s",
            "step": 100,
            "action": "fork",
            "reason": "label_noise",
            "because": "3 %",
            "training_recipe": {"variants": [{"name": "a"}, {"name": "b"}, {"name": "c"}]},
            "budget_steps": 20,
            "asha": {"reduction_factor": 3, "max_steps": 60},
            "cost": {"sample_passes": 1000, "share_of_remaining": 0.1},
            "cooldown_steps": 10,
            "base": {"step": 100, "policy": POLICY.digest},
        }
        | changes
    )


def record_of(card: PlanCard | None = None, **lifetime: Any) -> CardRecord:
    return propose(card or card_of(), step=100, time=10.0, lifetime=Lifetime(**lifetime))


def test_the_lifetime_is_the_planning_budget_unless_the_policy_says_otherwise() -> None:
    assert Lifetime.of(Policy(), 320) == Lifetime(steps=320, seconds=None)
    policy = Policy.model_validate({"approval": {"expire_steps": 50, "timeout_seconds": 60}})
    assert Lifetime.of(policy, 320) == Lifetime(steps=50, seconds=60)


@pytest.mark.parametrize("state", list(CardState))
@pytest.mark.parametrize("to", list(CardState))
def test_only_the_moves_of_the_table_exist(state: CardState, to: CardState) -> None:
    record = record_of()
    record.state = state
    if to in TRANSITIONS[state]:
        moved = move(record, to, actor="ann", why="because")
        assert (moved.before, moved.after, moved.rev, moved.actor) == (state, to, 1, "ann")
        assert record.state is state  # wording a move does not make it
        apply(record, moved, step=120, time=11.0)
        assert record.state is to
        assert record.history[-1].why == "because"
    else:
        with pytest.raises(ConflictError, match=f"is {state} and cannot become {to}"):
            move(record, to, actor="ann", why="because")


def test_a_final_state_says_so() -> None:
    record = record_of()
    record.state = CardState.REFUSED
    with pytest.raises(ConflictError, match="that is final"):
        move(record, CardState.APPROVED, actor="ann", why="")


def test_an_edit_carries_the_revision_and_what_changed() -> None:
    record = record_of()
    edited = record.card.revised(budget_steps=30)
    moved = move(record, CardState.PROPOSED, actor="ann", why="longer", edited=edited)
    assert moved.rev == 2
    assert moved.difference == {"budget_steps": (20, 30)}
    apply(record, moved, step=120, time=11.0)
    assert record.card == edited
    assert record.history[-1].difference == {"budget_steps": (20, 30)}


def test_a_record_survives_json() -> None:
    record = record_of(steps=50, seconds=60.0)
    edited = record.card.revised(budget_steps=30)
    apply(
        record,
        move(record, CardState.PROPOSED, actor="ann", why="longer", edited=edited),
        step=120,
        time=11.0,
    )
    assert CardRecord.from_state(json.loads(json.dumps(record.to_state()))) == record


@pytest.mark.parametrize(
    ("mode", "changes", "decision"),
    [
        ("observe", {}, "record"),
        ("off", {}, "record"),
        ("propose", {}, "ask"),
        ("act", {}, "auto"),
        ("act", {"risk": "medium"}, "auto"),
        ("act", {"risk": "high"}, "ask"),
        ("act", {"rev": 2}, "ask"),
        ("act", {"created_by": "ann"}, "ask"),
        ("act", {"selection": {"kind": "quantile", "from": 0.8, "to": 1, "exclude_suspects": False}}, "ask"),
        ("act", {"selection": {"kind": "quantile", "from": 0.8, "to": 1}}, "auto"),
    ],
)
def test_who_may_let_a_card_run(mode: Any, changes: dict[str, Any], decision: str) -> None:
    assert decide(card_of(**changes), POLICY, mode) == decision


@pytest.mark.parametrize("reason", get_args(Reason))
def test_cards_of_the_reasons_that_a_policy_asks_about_wait_in_act_mode(reason: str) -> None:
    card = card_of(reason=reason)
    assert decide(card, POLICY, "act") == ("ask" if reason in ASKED else "auto")
    assert decide(card, POLICY, "propose") == "ask"
    assert decide(card, POLICY, "observe") == "record"
    bold = Policy.model_validate({"approval": {"ask": []}})
    assert decide(card, bold, "act") == "auto"
    careful = Policy.model_validate({"approval": {"ask": [reason]}})
    assert decide(card, careful, "act") == "ask"


def test_the_policys_share_decides_too() -> None:
    policy = Policy.model_validate({"approval": {"auto_share": 0.1}})
    assert decide(card_of(), policy, "act") == "auto"
    dear = card_of(cost={"sample_passes": 1001, "share_of_remaining": 0.1001})
    assert decide(dear, policy, "act") == "ask"


def stale(record: CardRecord, step: int = 110, time: float = 11.0, **changes: Any) -> Any:
    now = {"policy_digest": POLICY.digest, "lineage": "trunk:0"} | changes
    return staleness(record, step=step, time=time, **now)


def test_later_steps_alone_do_not_make_a_card_stale() -> None:
    assert stale(record_of(), step=1_000_000, time=1e9) is None


def test_a_card_expires_by_steps_and_by_seconds_whichever_comes_first() -> None:
    assert stale(record_of(steps=50), step=149) is None
    assert stale(record_of(steps=50), step=150) == (CardState.EXPIRED, "nobody answered within 50 steps")
    assert stale(record_of(seconds=5.0), time=14.9) is None
    assert stale(record_of(seconds=5.0), time=15.0) == (CardState.EXPIRED, "nobody answered within 5 seconds")


def test_another_policy_or_lineage_makes_a_card_stale() -> None:
    state, why = stale(record_of(), lineage="trunk:1")
    assert state is CardState.STALE
    assert why == "it was made for trunk:0, and the run goes on as trunk:1"
    state, why = stale(record_of(), policy_digest="sha256:" + "f" * 64)
    assert state is CardState.STALE
    assert "sha256:ffffffff" in why


@pytest.mark.parametrize("state", sorted(set(CardState) - WAITING))
def test_a_card_that_no_longer_waits_cannot_expire(state: CardState) -> None:
    record = record_of(steps=1, seconds=0.1)
    record.state = state
    assert stale(record, step=10_000, time=1e6, lineage="trunk:9") is None


def test_every_move_that_leaves_a_card_waiting_winds_its_timers_anew() -> None:
    record = record_of(steps=50, seconds=5.0)
    apply(record, move(record, CardState.APPROVED, actor="ann", why="good"), step=140, time=14.0)
    assert (record.expires_at_step, record.expires_at_time) == (190, 19.0)
    apply(record, move(record, CardState.RUNNING, actor="planner", why="its turn"), step=150, time=15.0)
    assert (record.expires_at_step, record.expires_at_time) == (None, None)


def test_sweeping_moves_what_expired_and_nothing_else() -> None:
    old, young = record_of(steps=5), record_of(card_of(id="aaaaaaaa"))
    moves = sweep([old, young], policy_digest=POLICY.digest, lineage="trunk:0", step=110, time=11.0)
    assert [(m.card, m.after, m.actor) for m in moves] == [("0123abcd", CardState.EXPIRED, "planner")]


class CardLife(RuleBasedStateMachine):
    """People and the machine do anything at any time; the record never leaves the table, and never runs unapproved."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.time, self.n = 100, 0.0, 0
        self.lineage = "trunk:0"
        self.cards: dict[str, CardRecord] = {}

    @initialize(steps=st.none() | st.integers(1, 60), seconds=st.none() | st.floats(0.5, 30.0))
    def open(self, steps: int | None, seconds: float | None) -> None:
        self.lifetime = Lifetime(steps=steps, seconds=seconds)
        self.cards["0123abcd"] = propose(card_of(), step=self.step, time=self.time, lifetime=self.lifetime)

    @property
    def record(self) -> CardRecord:
        return self.cards["0123abcd"]

    def desk(self) -> Desk:
        return Desk(
            session="s",
            mode="propose",
            run=Run(total_steps=1000, batch=10),
            base=Base(step=self.step, policy=POLICY.digest, lineage=self.lineage),
            step=self.step,
            time=self.time,
            ordinal=self.n,
            quote=lambda card: card,
            restorable={"0123abcd"},
        )

    def ask(self, verb: Any, **fields: Any) -> None:
        self.n += 1
        before = self.record.state
        rev_before = self.record.card.rev
        request = Decided(request=str(self.n), verb=verb, card="0123abcd", actor="ann", **fields)
        response = respond(self.cards, request, self.desk())
        again = respond(self.cards, request, self.desk())
        assert response == again  # answering changes nothing by itself
        for fact in response.facts:
            assert isinstance(fact, CardMoved | RequestRefused)
            if isinstance(fact, CardMoved):
                apply(self.record, fact, step=self.step, time=self.time)
        if fields.get("rev") not in (None, rev_before):
            assert response.refused is not None
            assert "conflict" in response.refused
            assert self.record.state is before
        if verb == "approve" and response.refused is None:
            assert self.record.state in {
                CardState.APPROVED,
                CardState.RUNNING,
                CardState.ACCEPTED,
                CardState.ADOPTED,
                CardState.APPLIED,
            }
        if verb == "edit" and self.record.card.rev > rev_before:
            assert self.record.state is CardState.PROPOSED

    @rule(steps=st.integers(0, 30), seconds=st.floats(0, 10))
    def time_passes(self, steps: int, seconds: float) -> None:
        self.step += steps
        self.time += seconds
        for moved in sweep(
            self.cards.values(),
            policy_digest=POLICY.digest,
            lineage=self.lineage,
            step=self.step,
            time=self.time,
        ):
            apply(self.record, moved, step=self.step, time=self.time)

    @rule()
    def something_else_is_adopted(self) -> None:
        self.lineage = f"trunk:{self.step}"

    @rule(offset=st.integers(-1, 1))
    def approve(self, offset: int) -> None:
        self.ask("approve", rev=self.record.card.rev + offset)

    @rule(verb=st.sampled_from(["refuse", "cancel"]))
    def give_up(self, verb: str) -> None:
        self.ask(verb)

    @rule(note=st.sampled_from(["", "shorter, please"]))
    def revise(self, note: str) -> None:
        self.ask("revise", note=note)

    @rule(first=st.integers(0, 80), offset=st.integers(-1, 1))
    def edit(self, first: int, offset: int) -> None:
        self.ask("edit", rev=self.record.card.rev + offset, body={"budget_steps": first})

    @rule()
    def rollback(self) -> None:
        self.ask("rollback")

    @precondition(
        lambda self: self.cards and TRANSITIONS[self.record.state] and self.record.state not in WAITING
    )
    @rule(data=st.data())
    def the_machine_moves_on(self, data: st.DataObject) -> None:
        to = data.draw(st.sampled_from(sorted(TRANSITIONS[self.record.state])))
        apply(
            self.record,
            move(self.record, to, actor="planner", why="it went on"),
            step=self.step,
            time=self.time,
        )

    @precondition(lambda self: self.cards and self.record.state is CardState.APPROVED)
    @rule()
    def its_turn_comes(self) -> None:
        apply(
            self.record,
            move(self.record, CardState.RUNNING, actor="planner", why="its turn"),
            step=self.step,
            time=self.time,
        )

    @invariant()
    def the_history_is_a_path_through_the_table(self) -> None:
        if not self.cards:
            return
        state = CardState.PROPOSED
        rev = 1
        approved = None
        for line in self.record.history:
            assert line.before is state
            assert line.after in TRANSITIONS[state]
            assert line.rev == rev + (1 if line.difference else 0)
            state, rev = line.after, line.rev
            approved = line.rev if state is CardState.APPROVED else approved
            if state is CardState.RUNNING:
                assert approved == rev, "a revision ran that nobody approved"
        assert self.record.state is state
        assert self.record.card.rev == rev

    @invariant()
    def timers_run_only_while_it_waits(self) -> None:
        if not self.cards:
            return
        waits = self.record.state in WAITING
        assert (self.record.expires_at_step is not None) == (waits and self.lifetime.steps is not None)
        assert (self.record.expires_at_time is not None) == (waits and self.lifetime.seconds is not None)

    @invariant()
    def the_record_survives_json(self) -> None:
        for record in self.cards.values():
            assert CardRecord.from_state(json.loads(json.dumps(record.to_state()))) == record


TestCardLife = CardLife.TestCase
TestCardLife.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_proposed_fact_opens_a_record_that_waits() -> None:
    record = propose(CardProposed(card=card_of()).card, step=5, time=1.0, lifetime=Lifetime(steps=10))
    assert record.state is CardState.PROPOSED
    assert record.expires_at_step == 15
    assert {CardState.REFUSED, CardState.EXPIRED} <= FINAL
