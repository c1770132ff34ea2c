"""A card keeps its promises: states that lead somewhere, ids that replay, revisions that are validated."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from automode.planner.cards import TRANSITIONS, WAITING, CardState, PlanCard, card_id, difference

FINAL = {
    CardState.REFUSED,
    CardState.EXPIRED,
    CardState.STALE,
    CardState.REJECTED,
    CardState.INCONCLUSIVE,
    CardState.FAILED,
    CardState.ROLLED_BACK,
    CardState.APPLIED,
}


def plain(**changes: Any) -> dict[str, Any]:
    return {
        "id": "c7f3a1e0",
        "session": "s",
        "step": 100,
        "action": "fork",
        "reason": "loss_plateau",
        "because": "flat",
        "training_recipe": {"variants": [{"name": "third", "lr_mul": 1 / 3}]},
        "budget_steps": 20,
        "asha": {"max_steps": 180},
        "cost": {"sample_passes": 1000, "share_of_remaining": 0.1},
        "cooldown_steps": 50,
        "base": {"step": 100, "policy": "sha256:" + "0" * 64},
    } | changes


CARD = PlanCard.model_validate(plain())
MERGE = {"action": "merge", "training_recipe": None, "asha": None, "merge_recipe": {"kind": "swa"}}


# --------------------------------------------------------------------------------------------------------------- states


def test_every_state_has_its_row_in_the_table() -> None:
    assert set(TRANSITIONS) == set(CardState)


def test_every_state_can_be_reached_from_proposed_and_none_else_leads_back_but_an_edit() -> None:
    reached, border = {CardState.PROPOSED}, [CardState.PROPOSED]
    while border:
        new = TRANSITIONS[border.pop()] - reached
        reached |= new
        border += new
    assert reached == set(CardState)
    assert {s for s, to in TRANSITIONS.items() if CardState.PROPOSED in to} == WAITING


def test_only_the_states_that_say_so_are_final() -> None:
    assert {state for state, to in TRANSITIONS.items() if not to} == FINAL


def test_every_state_that_is_not_final_leads_to_a_final_one() -> None:
    ends = set(FINAL)
    for _ in CardState:
        ends |= {s for s, to in TRANSITIONS.items() if to & ends}
    assert ends == set(CardState)


def test_nothing_runs_without_approval_and_nothing_is_adopted_without_evidence() -> None:
    assert {s for s, to in TRANSITIONS.items() if CardState.RUNNING in to} == {CardState.APPROVED}
    assert {s for s, to in TRANSITIONS.items() if CardState.ADOPTED in to} == {CardState.ACCEPTED}
    assert {s for s, to in TRANSITIONS.items() if CardState.ACCEPTED in to} == {CardState.RUNNING}


def test_what_is_applied_without_evidence_is_never_called_adopted() -> None:
    assert {s for s, to in TRANSITIONS.items() if CardState.APPLIED in to} == {CardState.RUNNING}
    assert TRANSITIONS[CardState.APPLIED] == frozenset()


def test_whatever_waits_can_be_refused_can_expire_and_can_go_stale() -> None:
    assert all(
        {CardState.REFUSED, CardState.EXPIRED, CardState.STALE} <= TRANSITIONS[state] for state in WAITING
    )


# ------------------------------------------------------------------------------------------------------------------ ids


@given(st.text(), st.sampled_from(["loss_plateau", "manual"]), st.integers(0), st.integers(0, 99))
def test_an_id_is_eight_hex_digits_and_the_same_on_replay(
    session: str, reason: str, step: int, n: int
) -> None:
    made = card_id(session, reason, step, n)
    assert made == card_id(session, reason, step, n)
    assert len(made) == 8
    assert set(made) <= set("0123456789abcdef")


def test_an_id_never_changes_between_versions() -> None:
    assert card_id("digits-7", "loss_plateau", 2400, 0) == "6ca9d66e"


def test_session_reason_step_and_ordinal_each_change_the_id() -> None:
    made = {
        card_id("a", "manual", 1, 0),
        card_id("b", "manual", 1, 0),
        card_id("a", "loss_plateau", 1, 0),
        card_id("a", "manual", 2, 0),
        card_id("a", "manual", 1, 1),
        card_id("a", "manual", 11, 0),
    }
    assert len(made) == 6


# ------------------------------------------------------------------------------------------------------------ revisions


def test_a_revision_counts_up_and_says_what_changed() -> None:
    after = CARD.revised(budget_steps=40, training_recipe={"variants": [{"name": "half", "lr_mul": 0.5}]})
    assert (CARD.rev, after.rev) == (1, 2)
    changed = difference(CARD, after)
    assert changed["budget_steps"] == (20, 40)
    assert set(changed) == {
        "budget_steps",
        *(f"training_recipe.variants[0].{name}" for name in ("name", "lr_mul")),
    }


def test_a_revision_is_validated_as_a_new_card_is() -> None:
    with pytest.raises(ValidationError, match=r"must lie between 1 and asha\.max_steps"):
        CARD.revised(budget_steps=181)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        CARD.revised(color="red")
    with pytest.raises(ValidationError, match="frozen"):
        CARD.rev = 3


def test_equal_cards_do_not_differ_nan_included() -> None:
    readings = {"a": math.nan, "b": [1, math.nan, -math.inf], "c": None}
    a, b = (PlanCard.model_validate(plain(diagnostics=readings)) for _ in range(2))
    assert difference(a, b) == {}
    assert difference(a, a.revised()) == {}
    assert set(difference(a, a.revised(diagnostics=readings | {"a": 1.0}))) == {"diagnostics.a"}


def test_of_as_many_variants_the_changed_field_is_named() -> None:
    assert CARD.training_recipe is not None
    recipe = CARD.training_recipe.model_dump(mode="json")
    recipe["variants"][-1]["lr_mul"] = 0.125
    after = CARD.revised(training_recipe=recipe)
    last = len(recipe["variants"]) - 1
    before = CARD.training_recipe.variants[-1].lr_mul
    assert difference(CARD, after) == {f"training_recipe.variants[{last}].lr_mul": (before, 0.125)}
    recipe["variants"].append({"name": "one more"})
    assert set(difference(CARD, CARD.revised(training_recipe=recipe))) == {"training_recipe.variants"}


def test_a_part_that_comes_or_goes_is_a_difference() -> None:
    after = CARD.revised(gate_recipe={"kind": "switch_softmax"})
    before, now = difference(CARD, after)["gate_recipe"]
    assert before is None
    assert now["kind"] == "switch_softmax"


def test_nan_and_infinity_stay_numbers_through_json() -> None:
    readings = {"a": math.nan, "b": (1, math.inf, -math.inf, True, "x", None), "c": "nan"}
    card = PlanCard.model_validate(plain(diagnostics=readings))
    again = PlanCard.model_validate_json(card.model_dump_json()).diagnostics
    assert math.isnan(again["a"])
    assert again["b"] == (1, math.inf, -math.inf, True, "x", None)
    assert again["c"] == "nan"


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training_recipe": None}, "a fork needs `training_recipe` and `asha`"),
        ({"asha": None}, "a fork needs `training_recipe` and `asha`"),
        ({"budget_steps": 0}, "must lie between 1"),
        (MERGE | {"merge_recipe": None}, "a merge needs `merge_recipe`"),
        (MERGE | {"asha": {"max_steps": 3}}, "a merge trains nothing"),
        (MERGE | {"gate_recipe": {}}, "a merge trains nothing"),
        (MERGE | {"action": "stop"}, "a merge needs `merge_recipe`, and a stop has none"),
        (MERGE | {"action": "stop", "merge_recipe": None, "gate_recipe": {}}, "a stop trains nothing"),
        ({"id": "C7F3A1E0"}, "String should match pattern"),
        ({"because": ""}, "at least 1 character"),
        ({"training_recipe": {"variants": []}}, "needs `variants`, `search`, or both"),
        ({"training_recipe": {"variants": [{"name": "a"}, {"name": "a"}]}}, "stand twice"),
        ({"selection": {"kind": "quantile", "from": 0.5, "to": 0.5}}, "must be above"),
        ({"selection": {"kind": "quantile", "from": math.nan, "to": 0.5}}, "less than or equal to 1"),
        ({"selection": {"kind": "kmeans", "k": 3, "clusters": [3]}}, "do not exist"),
        ({"selection": {"kind": "kmeans", "k": 3, "clusters": [1, 1]}}, "name one cluster twice"),
        ({"selection": {"kind": "indices"}}, "needs `ids`, `artifact` or `slice`"),
        ({"selection": {"kind": "indices", "ids": []}}, "is empty"),
        ({"selection": {"kind": "indices", "ids": list(range(201))}}, "at most 200"),
        ({"diagnostics": {"a": [0] * 65}}, "at most 64"),
        ({"diagnostics": {"a": {"b": 1}}}, "diagnostics.a"),
        ({"diagnostics": [1]}, "valid dictionary"),
    ],
)
def test_a_card_that_says_something_impossible_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        PlanCard.model_validate(plain(**changes))
