"""Cards of two policies are matched by reason and nearness, and what scans cannot tell is told."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from automode.engine import scanning
from automode.engine.comparing import SCANNED, pairs_of, scan_limits
from automode.planner.card_text import from_yaml
from automode.planner.cards import PlanCard
from automode.planner.policy import Policy
from automode.presets import preset_text


def card(step: int, reason: str = "loss_plateau", **changes: Any) -> PlanCard:
    made = from_yaml(preset_text(f"cards/{reason}"))
    return made.model_copy(update={"step": step, "id": f"{step:08x}", **changes})


def test_cards_of_one_reason_are_matched_with_the_nearest() -> None:
    recorded = [card(100), card(900), card(300, "merge_cadence")]
    proposed = [card(880), card(1900), card(300, "merge_cadence")]
    pairs = pairs_of(recorded, proposed)
    shown = [(p.recorded and p.recorded.step, p.proposed and p.proposed.step, p.later) for p in pairs]
    assert shown == [(100, 1900, 1800), (300, 300, 0), (900, 880, -20)]


def test_what_only_one_of_them_has_stands_alone() -> None:
    pairs = pairs_of([card(100)], [card(50, "high_loss_tail")])
    assert [(p.recorded is None, p.proposed is None, p.later) for p in pairs] == [
        (True, False, None),
        (False, True, None),
    ]


def test_a_persons_own_card_is_matched_with_none() -> None:
    (mine, theirs) = pairs_of([card(100, created_by="alice")], [card(100)])
    assert (mine.proposed, theirs.recorded) == (None, None)


def test_only_what_is_asked_for_counts_as_a_difference() -> None:
    other = card(200, budget_steps=30, cooldown_steps=7, because="other words")
    (pair,) = pairs_of([card(100)], [other])
    assert set(pair.difference) == {"budget_steps", "cooldown_steps"}
    assert pair.difference["cooldown_steps"] == (800, 7)


SCANS = Policy(reasons=("high_loss_tail", "residual_cluster"))


def limits(other: Policy, *, scans: int = 3, clusterings: int = 3) -> tuple[set[str], str]:
    found = scan_limits(SCANS, other, total_steps=8000, scans=scans, clusterings=clusterings)
    return set(found.reasons), found.why


@pytest.mark.parametrize("change", [{"every": 50}, {"probe": 64}, {"tail_from": 0.9}, {"share": 0.5}])
def test_another_way_of_scanning_is_told(change: dict[str, float]) -> None:
    other = Policy.model_validate(SCANS.dump() | {"scan": SCANS.dump()["scan"] | change})
    reasons, why = limits(other)
    assert reasons == {"high_loss_tail", "residual_cluster"}
    (name,) = change
    assert f"scan.{name}" in why


def test_the_planning_budget_decides_when_scans_are_taken_unless_the_policy_does() -> None:
    other = Policy.model_validate(SCANS.dump() | {"trend": {"budget": 100}})
    assert "scan.every 400 -> 50" in limits(other)[1]
    fixed = {"scan": SCANS.dump()["scan"] | {"every": 100}}
    same = [Policy.model_validate(SCANS.dump() | fixed | {"trend": {"budget": b}}) for b in (100, 200)]
    assert scan_limits(*same, total_steps=8000, scans=1, clusterings=1).why == ""


def test_thresholds_on_what_scans_saw_can_be_tried() -> None:
    other = Policy.model_validate(SCANS.dump() | {"scan": SCANS.dump()["scan"] | {"tail_ratio": 2.0}})
    assert limits(other) == (set(), "")


def test_what_was_never_scanned_cannot_be_said() -> None:
    assert limits(SCANS, scans=0, clusterings=0)[0] == {"high_loss_tail", "residual_cluster"}
    assert limits(SCANS, clusterings=0)[0] == {"residual_cluster"}
    assert limits(Policy(reasons=("loss_plateau",)), scans=0) == (set(), "")


def test_a_pair_says_that_it_rests_on_scans() -> None:
    reasons = frozenset(SCANNED)
    (pair,) = pairs_of([], [card(10, "high_loss_tail")], on_scans=reasons)
    assert pair.on_scans
    (pair,) = pairs_of([card(10, "high_loss_tail")], [], on_scans=reasons)
    assert not pair.on_scans


def test_the_reasons_that_rest_on_scans_are_those_that_scans_are_taken_for() -> None:
    text = inspect.getsource(scanning)
    assert all(f'"{reason}"' in text for reason in SCANNED) or "SCANNED" in text
