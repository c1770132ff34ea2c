"""The ledger adds up, never goes negative, and no cap is ever exceeded."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from automode.errors import SchedulerError, UsageError
from automode.scheduler import Account, Charge, Ledger, Refusal, Reservation, Work, optimizer_steps, units

CARDS = ["a", "b", "c"]
AMOUNTS = st.integers(0, 400)


def accounts() -> st.SearchStrategy[Account]:
    card = st.sampled_from(CARDS)
    return st.one_of(
        st.builds(lambda c, t: Account(card=c, purpose="trial", trial=t), card, st.integers(0, 2)),
        st.builds(
            lambda c, p: Account(card=c, purpose=p),
            card,
            st.sampled_from(["scan", "gate", "merge", "evaluate"]),
        ),
        st.builds(lambda p: Account(card=None, purpose=p), st.sampled_from(["scan", "evaluate", "average"])),
    )


class LedgerMachine(RuleBasedStateMachine):
    """Every operation in any order, beside a dictionary of what was charged."""

    @initialize(
        total=st.integers(1, 3000),
        share=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
        cap=st.one_of(st.none(), st.integers(0, 600)),
        within=st.booleans(),
    )
    def begin(self, total: int, share: float, cap: int | None, within: bool) -> None:
        self.ledger = Ledger(total=total, share=share, cap=cap, within=within)
        self.charged: dict[Account, int] = {}
        self.trunk = 0
        self.reserved: dict[str, int] = {}
        self.open: set[str] = set()
        self.beyond_cap = False

    @rule(card=st.sampled_from(CARDS), amount=AMOUNTS, limit=st.one_of(st.none(), AMOUNTS))
    def reserve(self, card: str, amount: int, limit: int | None) -> None:
        if card in self.reserved:
            with pytest.raises(SchedulerError, match="admitted before"):
                self.ledger.reserve(card, amount)
            return
        room = self.ledger.available
        answer = self.ledger.reserve(card, amount, limit=limit)
        fits = amount <= room and (limit is None or amount <= limit)
        if fits:
            assert answer == Reservation(card=card, amount=amount)
            self.reserved[card] = amount
            self.open.add(card)
        else:
            assert isinstance(answer, Refusal)
            assert answer.asked == amount > answer.available
            assert self.ledger.available == room

    @rule(account=accounts(), amount=AMOUNTS)
    def charge(self, account: Account, amount: int) -> None:
        if account.card is not None and account.card not in self.reserved:
            with pytest.raises(SchedulerError, match="never admitted"):
                self.ledger.charge(account, amount)
            return
        room = self.ledger.available if account.card is None else self.ledger.left(account.card)
        before = self.ledger.to_state()
        answer = self.ledger.charge(account, amount)
        if amount <= room:
            assert isinstance(answer, Charge)
            assert answer.left == (
                self.ledger.available if account.card is None else self.ledger.left(account.card)
            )
            self.charged[account] = self.charged.get(account, 0) + amount
        else:
            assert isinstance(answer, Refusal)
            assert answer.reason
            assert self.ledger.to_state() == before

    @rule(account=accounts(), amount=AMOUNTS)
    def count(self, account: Account, amount: int) -> None:
        before = self.ledger.to_state()
        if account.card is not None and account.card not in self.reserved:
            with pytest.raises(SchedulerError, match="never admitted"):
                self.ledger.count(account, amount)
            assert self.ledger.to_state() == before
            return
        room = self.ledger.available if account.card is None else self.ledger.left(account.card)
        self.ledger.count(account, amount)
        self.charged[account] = self.charged.get(account, 0) + amount
        if account.card is not None:
            spent = self.ledger.spent(account.card)
            self.reserved[account.card] = max(self.reserved[account.card], spent)
        self.beyond_cap |= amount > room

    @precondition(lambda self: self.charged)
    @rule(data=st.data(), amount=AMOUNTS)
    def refund(self, data: st.DataObject, amount: int) -> None:
        account = data.draw(st.sampled_from(sorted(self.charged, key=repr)))
        if amount > self.charged[account]:
            with pytest.raises(SchedulerError, match="cannot be refunded"):
                self.ledger.refund(account, amount)
            return
        self.ledger.refund(account, amount)
        self.charged[account] -= amount

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        card = data.draw(st.sampled_from(sorted(self.reserved)))
        left = self.ledger.left(card)
        assert self.ledger.release(card) == left
        assert self.ledger.left(card) == 0
        assert self.ledger.release(card) == 0
        self.open.discard(card)

    @rule(amount=st.integers(0, 300))
    def train(self, amount: int) -> None:
        self.trunk += amount
        assert self.ledger.charge_trunk(amount) == self.ledger.remaining

    @rule()
    def save_and_load(self) -> None:
        state = self.ledger.to_state()
        self.ledger = Ledger.from_state(json.loads(json.dumps(state, allow_nan=False)))
        assert self.ledger.to_state() == state

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        spent = sum(self.charged.values())
        assert ledger.trunk == self.trunk
        assert ledger.automode == spent == sum(ledger.accounts().values())
        assert {a: n for a, n in ledger.accounts().items() if n} == {
            a: n for a, n in self.charged.items() if n
        }
        assert ledger.remaining == max(0, ledger.total - self.trunk - (spent if ledger.within else 0))
        by_card = {card: sum(n for a, n in self.charged.items() if a.card == card) for card in CARDS}
        assert {card: ledger.spent(card) for card in CARDS} == by_card
        assert ledger.held == sum(self.reserved[card] - by_card[card] for card in self.open)
        assert all(0 <= by_card[card] <= self.reserved[card] for card in self.reserved)
        assert all(amount >= 0 for amount in ledger.accounts().values())
        assert min(ledger.held, ledger.available, ledger.remaining) >= 0
        if ledger.cap is not None and not self.beyond_cap:
            assert ledger.automode + ledger.held <= ledger.cap


LedgerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_the_books_balance_under_every_sequence_of_operations = LedgerMachine.TestCase


def test_what_was_spent_already_stands_in_the_books_whatever_the_caps_say() -> None:
    ledger = Ledger(total=1000, cap=100)
    ledger.reserve("c7", 50)
    ledger.count(Account(card="c7", purpose="trial", trial=0), 70)
    ledger.count(Account(card=None, purpose="scan"), 60)
    assert (ledger.automode, ledger.held, ledger.available) == (130, 0, 0)
    assert isinstance(ledger.charge(Account(card="c7", purpose="gate"), 1), Refusal)
    assert isinstance(ledger.reserve("d1", 1), Refusal)


@pytest.mark.parametrize(
    ("work", "samples", "size", "price"),
    [
        (Work.TRAIN, 100, 1.0, 300),
        (Work.SAM, 100, 1.0, 600),
        (Work.EVALUATE, 100, 1.0, 100),
        (Work.TRAIN, 100, 0.5, 150),
        (Work.EVALUATE, 3, 0.5, 2),  # rounded up
        (Work.TRAIN, 0, 2.0, 0),
    ],
)
def test_prices(work: Work, samples: int, size: float, price: int) -> None:
    assert units(work, samples, size=size) == price


def test_sam_takes_half_the_optimizer_steps_for_the_same_resource() -> None:
    assert optimizer_steps(120, Work.TRAIN) == 120
    assert optimizer_steps(121, Work.SAM) == 60
    with pytest.raises(UsageError, match="only TRAIN and SAM"):
        optimizer_steps(10, Work.EVALUATE)


def test_the_worst_case_is_reserved_at_admission_and_the_rest_comes_back() -> None:
    ledger = Ledger(total=100_000)
    assert ledger.available == 15_000
    assert ledger.reserve("c7", 9_000) == Reservation(card="c7", amount=9_000)
    assert ledger.available == 6_000
    refused = ledger.reserve("d1", 6_001)
    assert isinstance(refused, Refusal)
    assert refused.reason == (
        "6001 units are needed and 6000 are free: automode may hold 15% of the 100000 that remain, and 9000 are reserved"
    )
    ledger.charge(Account(card="c7", purpose="trial", trial=0), 4_000)
    assert ledger.release("c7") == 5_000
    assert ledger.remaining == 96_000
    assert ledger.available == math.floor(0.15 * 96_000)


def test_a_card_s_own_cap_refuses_it() -> None:
    refused = Ledger(total=1000).reserve("c7", 100, limit=99)
    assert isinstance(refused, Refusal)
    assert "the card's own cap is 99" in refused.reason


def test_a_reserve_that_runs_out_refuses_the_next_charge_and_counts_nothing() -> None:
    ledger = Ledger(total=1000)
    ledger.reserve("c7", 100)
    ledger.charge(Account(card="c7", purpose="trial", trial=1), 90)
    refused = ledger.charge(Account(card="c7", purpose="gate"), 11)
    assert isinstance(refused, Refusal)
    assert refused.reason == "card c7 has 10 units left of 100 and the gate needs 11"
    assert ledger.spent("c7") == 90
    ledger.release("c7")
    closed = ledger.charge(Account(card="c7", purpose="gate"), 1)
    assert isinstance(closed, Refusal)
    assert "card c7 is closed" in closed.reason


def test_the_trunk_is_never_refused_and_spending_on_top_leaves_it_its_budget() -> None:
    for within, remaining in ((True, 850), (False, 1000)):
        ledger = Ledger(total=1000, share=0.15, within=within)
        ledger.charge(Account(card=None, purpose="scan"), 150)
        assert ledger.remaining == remaining
        assert ledger.charge_trunk(5000) == 0
        assert ledger.trunk == 5000


def test_the_total_cap_holds_over_the_whole_run() -> None:
    ledger = Ledger(total=10_000, share=0.5, cap=100)
    ledger.reserve("a", 60)
    ledger.charge(Account(card="a", purpose="merge"), 60)
    ledger.release("a")
    assert ledger.available == 40
    refused = ledger.charge(Account(card=None, purpose="scan"), 41)
    assert isinstance(refused, Refusal)
    assert "60 of its total cap of 100 are spent" in refused.reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Ledger(total=0), "total is 0"),
        (lambda: Ledger(total=10, share=1.5), "share is 1.5"),
        (lambda: Ledger(total=10, share=math.nan), "share is nan"),
        (lambda: Ledger(total=10, cap=-1), "cap is -1"),
        (lambda: Ledger(total=10).reserve("", 1), "card is empty"),
        (lambda: Ledger(total=10).reserve("a", -1), "amount is -1"),
        (lambda: Ledger(total=10).charge_trunk(1.5), "amount is 1.5"),  # type: ignore[arg-type]
        (lambda: Account(card="a", purpose="trial"), "trial accounts name their trial"),
        (lambda: Account(card="a", purpose="gate", trial=1), "trial accounts name their trial"),
        (lambda: Account(card=None, purpose="trial", trial=1), "needs its card"),
        (lambda: Account(card="", purpose="gate"), "card is an empty string"),
        (lambda: Account(card="a", purpose="lunch"), "purpose is 'lunch'"),  # type: ignore[arg-type]
        (lambda: units(Work.TRAIN, 1, size=0.0), "size is 0.0"),
        (lambda: units(Work.TRAIN, -1), "samples is -1"),
    ],
)
def test_what_cannot_be_taken_is_refused(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.update(version=2),
        lambda s: s.update(extra=1),
        lambda s: s.update(trunk=-1),
        lambda s: s.update(share=2.0),
        lambda s: s["general"].update(lunch=1),
        lambda s: s["cards"]["a"].update(reserved=1),
        lambda s: s["cards"]["a"]["spent"].append(["gate", 3, 1]),
        lambda s: s["cards"]["a"]["spent"].append(["gate", None, 1]),
    ],
)
def test_a_damaged_state_is_refused(damage: Any) -> None:
    ledger = Ledger(total=1000)
    ledger.reserve("a", 100)
    ledger.charge(Account(card="a", purpose="gate"), 50)
    state = ledger.to_state()
    assert Ledger.from_state(state).to_state() == state
    damage(state)
    with pytest.raises(SchedulerError, match=r"no ledger state|contradicts itself"):
        Ledger.from_state(state)


def test_a_card_of_another_kind_may_hold_another_share_of_what_remains() -> None:
    ledger = Ledger(total=1000, share=0.1, cap=300)
    refused = ledger.reserve("a", 200)
    assert isinstance(refused, Refusal)
    assert (refused.available, "10% of the 1000" in refused.reason) == (100, True)
    assert ledger.reserve("a", 200, share=0.3) == Reservation(card="a", amount=200)
    more = ledger.reserve("b", 101, share=0.5)  # the run's own cap stands
    assert isinstance(more, Refusal)
    assert more.available == 100
