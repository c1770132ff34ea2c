"""Specialists for the parts of a selection: their shares, their price, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import UsageError
from automode.planner.capability import refusals
from automode.planner.card_text import from_yaml, submission_from_yaml
from automode.planner.card_view import card_summary
from automode.planner.cards import PlanCard
from automode.planner.fitting import Funds, choose_ladder
from automode.planner.inputs import Run
from automode.planner.policy import Policy
from automode.planner.pricing import worst_case
from automode.planner.recipes import SelectAll, SelectKMeans, SelectSlices
from automode.planner.rules.base import Proposal, View
from automode.planner.sharing import MOST_PARTS, part_names, shares, split_steps
from automode.planner.signals.suite import SignalSuite

BASE = {"step": 0, "checkpoint": None, "policy": "sha256:" + "0" * 64, "lineage": "trunk:0"}
RUN = {
    "total_steps": 1000,
    "batch": 10,
    "train_samples": 500,
    "val_a": 100,
    "val_b": 100,
    "task": "classification",
    "has_ids": True,
    "exact_losses": True,
    "slices": {"a": 40, "b": 30, "listed": 30},
    "train_slices": ["a", "b"],
}
CLUSTERS = {"kind": "kmeans", "k": 6, "clusters": [0, 2, 5]}


def card(**changes: Any) -> PlanCard:
    recipe = {"variants": [{"name": "plain"}], "per_part": "by_size"} | changes.pop("training_recipe", {})
    fields: dict[str, Any] = {
        "id": "0" * 8,
        "session": "s",
        "step": 0,
        "action": "fork",
        "reason": "manual",
        "because": "Each to its own.",
        "selection": CLUSTERS,
        "training_recipe": recipe,
        "gate_recipe": {"kind": "switch_softmax"},
        "budget_steps": 20,
        "asha": {"reduction_factor": 3, "max_steps": 20},
        "cost": {"sample_passes": 0, "share_of_remaining": 0},
        "cooldown_steps": 0,
        "base": BASE,
    }
    return PlanCard.model_validate(fields | changes)


def test_three_tenths_are_shared_equally_and_the_rest_by_size() -> None:
    assert shares([100, 300], "by_size") == pytest.approx((0.15 + 0.7 * 0.25, 0.15 + 0.7 * 0.75))
    assert shares([100, 300, 7], "equal") == pytest.approx((1 / 3, 1 / 3, 1 / 3))


@given(
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    more=st.integers(0, 10**5),
    how=st.sampled_from(["equal", "by_size"]),
)
def test_every_step_is_given_to_somebody_as_the_shares_say(sizes: list[int], more: int, how: Any) -> None:
    total = len(sizes) + more
    steps = split_steps(total, sizes, how)
    assert sum(steps) == total
    assert min(steps) >= 1
    for step, share in zip(steps, shares(sizes, how), strict=True):
        assert abs(step - share * total) <= len(sizes)  # one step each is given beforehand
    by_size = sorted(zip(sizes, steps, strict=True))
    assert all(a[1] <= b[1] + 1 for a, b in pairwise(by_size))


@pytest.mark.parametrize(("total", "sizes"), [(2, [1, 1, 1]), (10, [3, 0]), (10, [])])
def test_what_cannot_be_shared_out_is_refused(total: int, sizes: list[int]) -> None:
    with pytest.raises(UsageError):
        split_steps(total, sizes, "by_size")


def test_clusters_and_slices_are_the_parts_in_the_order_of_the_card() -> None:
    assert part_names(SelectKMeans(k=6, clusters=(5, 2))) == ("cluster 5", "cluster 2")
    assert part_names(SelectSlices(slices=("b", "a"))) == ("b", "a")
    assert part_names(SelectAll()) == ()


def test_the_price_is_that_of_all_together_whatever_the_sizes_and_the_control_goes_on_for_as_long() -> None:
    run = Run.model_validate(RUN)
    for how in ("equal", "by_size"):
        asked = card(training_recipe={"per_part": how})
        price = worst_case(asked, run)
        assert refusals(asked, run) == []
        assert (price.train, price.retry) == (3 * 20 * 30.0, 3 * 8 * 30.0)
        assert price.resource_steps == 60
        assert price.control_steps >= 60
        assert price.copies == 4
    wide = card(selection={"kind": "kmeans", "k": 8, "clusters": list(range(8))})
    outputs = 9 * 3 * 100
    assert worst_case(wide, run).gate == outputs + 3.0 * (9 / 4) * 2 * 5 * 100
    merged = card(gate_recipe=None, merge_recipe={"kind": "interpolate"})
    assert worst_case(merged, run).control_steps == 60


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"selection": {"kind": "all"}}, "a selection of kind all has no parts"),
        ({"selection": {"kind": "kmeans", "k": 3, "clusters": [1]}}, "the selection has 1 part, and 2 to 8"),
        ({"selection": {"kind": "kmeans", "k": 12, "clusters": list(range(9))}}, "has 9 parts"),
        (
            {"selection": {"kind": "slices", "slices": ["a", "c"]}},
            "there is no slice 'c'; this run has a, b, listed",
        ),
        (
            {"selection": {"kind": "slices", "slices": ["a", "listed"]}},
            "slice 'listed' is a list of held-out samples",
        ),
        ({"training_recipe": {"variants": [{"name": "a"}, {"name": "b"}]}}, "by one variant"),
        (
            {
                "training_recipe": {
                    "search": {"draws": 2, "parameters": {"lr_mul": {"kind": "uniform", "low": 1, "high": 2}}}
                }
            },
            "leave `search` out",
        ),
        (
            {
                "training_recipe": {
                    "variants": [{"name": "a", "labels": "relabel"}],
                    "relabel": {"kind": "given", "ids": [1], "labels": [0]},
                }
            },
            "belong to no part",
        ),
        ({"gate_recipe": None}, "no candidate by itself"),
        ({"budget_steps": 10}, "set `budget_steps` to asha.max_steps (20)"),
    ],
)
def test_a_card_whose_parts_cannot_each_have_a_specialist_is_refused_with_the_reason(
    changes: dict[str, Any], told: str
) -> None:
    found = refusals(card(**changes), Run.model_validate(RUN))
    assert any(told in why for why in found), found


def test_a_rules_proposal_gets_the_longest_way_that_fits_and_no_rungs() -> None:
    run, policy = Run.model_validate(RUN), Policy()
    asked = card()
    proposal = Proposal(
        reason="residual_cluster",
        action="fork",
        because="1",
        selection=asked.selection,
        training_recipe=asked.training_recipe,
        gate_recipe=asked.gate_recipe,
    )
    view = View(
        step=0,
        remaining=10_000,
        planning_budget=800,
        policy=policy,
        run=run,
        signals=SignalSuite.__new__(SignalSuite),
    )
    funds = Funds(remaining=300_000.0, total=300_000.0, spent=0.0)
    first, asha, price = choose_ladder(proposal, view, 30_000.0, funds)
    assert first == asha.max_steps >= policy.pacing.min_rung
    assert price.resource_steps == 3 * first
    assert price.passes <= 30_000 < price.passes + 3 * 30 * 3 + 1
    held = choose_ladder(proposal, view, 100.0, funds)
    assert held.code == "over_cap"
    assert "3 trials" in held.why


def test_at_most_as_many_parts_as_a_router_is_priced_for() -> None:
    most = {"kind": "kmeans", "k": 12, "clusters": list(range(MOST_PARTS))}
    assert refusals(card(selection=most), Run.model_validate(RUN)) == []


def test_a_person_reads_how_many_there_are_and_how_their_steps_are_shared() -> None:
    assert "a specialist for each of 3, 60 steps shared by size" in card_summary(card())
    slices = card(selection={"kind": "slices", "slices": ["a", "b"]}, training_recipe={"per_part": "equal"})
    told = card_summary(slices)
    assert "slices a, b" in told
    assert "a specialist for each of 2, 20 steps each" in told
    assert "first rung" not in told


def test_such_a_card_is_written_and_read_without_loss() -> None:
    from automode.planner.card_text import to_yaml

    slices = card(selection={"kind": "slices", "slices": ["a", "b"]})
    assert from_yaml(to_yaml(slices)) == slices
    with pytest.raises(UsageError, match="name one slice twice"):
        submission_from_yaml(to_yaml(slices).replace("[a, b]", "[a, a]"))
