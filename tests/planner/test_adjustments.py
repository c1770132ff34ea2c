"""Cards that change how the trunk trains: what they are, what refuses them, and which rules fall back on them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from automode.planner.capability import refusals
from automode.planner.card_text import from_yaml, to_yaml
from automode.planner.card_view import card_summary
from automode.planner.cards import PlanCard
from automode.planner.fitting import Funds, Held, quote
from automode.planner.inputs import Run
from automode.planner.policy import Policy

RUN = Run(
    total_steps=4000, batch=32, adjusts=True, why_no_forks="the loop is not ours", why_no_evidence="none"
)
FUNDS = Funds(remaining=96_000.0, total=384_000.0, spent=384_000.0)


def card_of(**changes: Any) -> PlanCard:
    return PlanCard.model_validate(
        {
            "id": "0123abcd",
            "session": "s",
            "step": 1000,
            "action": "adjust",
            "reason": "loss_plateau",
            "because": "3 %",
            "adjustment": {"rate_factor": 0.5, "clip_norm": 2.0},
            "budget_steps": 0,
            "cost": {"sample_passes": 0, "share_of_remaining": 0},
            "cooldown_steps": 10,
            "risk": "high",
            "base": {"step": 1000, "policy": Policy().digest},
        }
        | changes
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adjustment": None}, "belongs to action adjust"),
        ({"action": "merge", "merge_recipe": {"kind": "swa"}}, "belongs to action adjust"),
        ({"merge_recipe": {"kind": "swa"}}, "an adjustment has none"),
        ({"training_recipe": {"variants": [{"name": "a"}]}}, "an adjustment trains nothing"),
        ({"selection": {"kind": "indices", "ids": [1]}}, "leave `selection` out"),
        ({"acceptance": {"metric": "nll"}}, "leave `acceptance` out"),
        ({"adjustment": {}}, "changes nothing"),
        ({"adjustment": {"rate_factor": 0.0}}, "greater than 0"),
        ({"adjustment": {"clip_norm": -1.0}}, "greater than 0"),
    ],
)
def test_an_adjustment_that_makes_no_sense_is_no_card(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        card_of(**changes)


def test_its_face_says_what_changes_and_that_nothing_proves_it() -> None:
    text = to_yaml(card_of())
    assert "adjustment: {rate_factor: 0.5, clip_norm: 2.0}" in text
    assert "acceptance" not in text
    assert "selection" not in text
    assert from_yaml(text) == card_of()
    summary = card_summary(card_of())
    assert "change    learning rates times 0.5 and gradient norm at most 2, from the next step on" in summary
    assert "no control to be compared with" in summary


def test_it_needs_neither_held_out_data_nor_compute() -> None:
    priced = quote(card_of(), policy=Policy(), run=RUN, funds=FUNDS, remaining_steps=100)
    assert isinstance(priced, PlanCard)
    assert priced.cost.sample_passes == 0.0
    late = quote(card_of(), policy=Policy(), run=RUN, funds=FUNDS, remaining_steps=0)
    assert isinstance(late, Held)
    assert late.code == "no_time"


def test_rates_that_somebody_elses_schedule_sets_are_not_changed() -> None:
    run = RUN.model_copy(update={"why_no_rate": "a scheduler drives them"})
    assert refusals(card_of(), run) == [
        "adjustment.rate_factor: the rates cannot be changed in this run: a scheduler drives them"
    ]
    assert refusals(card_of(adjustment={"clip_norm": 1.0}), run) == []
