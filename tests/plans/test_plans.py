"""The shipped policies and card templates are what the models say, can run, and stay written the way we write."""

from __future__ import annotations

from typing import get_args

import pytest

from automode.planner.approval import decide
from automode.planner.capability import refusals
from automode.planner.card_text import (
    from_yaml,
    policy_from_yaml,
    policy_to_yaml,
    submission_from_yaml,
    to_yaml,
)
from automode.planner.cards import PlanCard, Reason
from automode.planner.events import Run
from automode.planner.policy import Policy
from automode.presets import preset_names, preset_text

POLICIES = ("aggressive", "conservative", "default", "observe-only")
REASONS = get_args(Reason)
OWN = ("manual", "distill", "adapter_fuse", "anneal", "parts")
"""Templates of cards that only a person makes: their reason is manual."""
TEMPLATES = (*REASONS, *OWN[1:], "stop")
PLANNED = tuple(reason for reason in REASONS if reason != "manual")

RUN = Run(
    total_steps=10_000,
    batch=32,
    train_samples=9_000,
    val_a=500,
    val_b=500,
    task="classification",
    has_ids=True,
    exact_losses=True,
    slices={"rare": 180},
    train_slices=("rare",),
    averages=True,
    why_no_restart=None,
)


def body(text: str) -> str:
    """The text without the remarks that it begins with."""
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if not line.startswith("#") and line.strip())
    return "".join(lines[first:])


def card_of(reason: str) -> PlanCard:
    text = preset_text(f"cards/{reason}")
    if reason not in OWN:
        return from_yaml(text)
    # What automode fills in is taken from another template.
    given = from_yaml(preset_text("cards/loss_plateau")).dump() | {"gate_recipe": None}
    return PlanCard.model_validate(given | submission_from_yaml(text))


def test_there_is_a_template_of_every_kind_and_nothing_else() -> None:
    assert set(preset_names()) == {*POLICIES, *(f"cards/{name}" for name in TEMPLATES)}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_a_card_of_its_kind_that_this_version_can_run(name: str) -> None:
    card = card_of(name)
    merge = None if card.merge_recipe is None else card.merge_recipe.kind
    recipe = card.training_recipe
    schedules = () if recipe is None else recipe.schedules
    parts = "parts" if recipe is not None and recipe.per_part is not None else None
    assert name in (card.reason, card.action, merge, *schedules, parts)
    assert refusals(card, RUN, min_held_out=30) == []


@pytest.mark.parametrize("name", [*PLANNED, "stop"])
def test_a_template_survives_reading_and_writing(name: str) -> None:
    text = preset_text(f"cards/{name}")
    assert body(to_yaml(from_yaml(text))) == body(text)


@pytest.mark.parametrize("name", OWN)
def test_the_template_of_an_own_card_leaves_out_what_automode_fills_in(name: str) -> None:
    given = submission_from_yaml(preset_text(f"cards/{name}"))
    assert given["reason"] == "manual"
    assert not set(given) & {"id", "rev", "session", "step", "created_by", "cost", "base"}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_valid_bears_its_name_and_survives_reading_and_writing(name: str) -> None:
    policy = policy_from_yaml(preset_text(name))
    assert policy.name == name
    assert policy_from_yaml(policy_to_yaml(policy)) == policy


def test_the_default_policy_is_the_models_defaults_written_out() -> None:
    text = preset_text("default")
    assert policy_from_yaml(text) == Policy()
    # Out of date? Write policy_to_yaml(Policy()) to plans/default.yaml.
    assert text == policy_to_yaml(Policy())


def test_conservative_asks_for_more_and_spends_less_than_default_and_aggressive_the_opposite() -> None:
    careful, plain, bold = (
        policy_from_yaml(preset_text(n)) for n in ("conservative", "default", "aggressive")
    )
    assert careful.pacing.total_share < plain.pacing.total_share < bold.pacing.total_share
    assert careful.pacing.exploration_share < plain.pacing.exploration_share < bold.pacing.exploration_share
    assert set(careful.reasons) < set(plain.reasons) < set(bold.reasons)
    assert careful.evidence.alpha < plain.evidence.alpha == bold.evidence.alpha
    assert careful.approval.auto_share < plain.approval.auto_share


@pytest.mark.parametrize(
    ("name", "by_itself"),
    [
        ("observe-only", set()),
        ("conservative", {"merge_cadence"}),
        ("default", set(PLANNED) - {"residual_cluster", "loss_plateau"}),
        ("aggressive", set(PLANNED)),
    ],
)
def test_a_policy_approves_by_itself_what_it_says(name: str, by_itself: set[str]) -> None:
    policy = policy_from_yaml(preset_text(name))
    assert {r for r in PLANNED if decide(card_of(r), policy, "act") == "auto"} == by_itself
    assert {r for r in PLANNED if decide(card_of(r), policy, "propose") == "auto"} == set()


@pytest.mark.parametrize("name", POLICIES)
def test_only_a_bold_policy_ends_a_run_by_itself(name: str) -> None:
    policy = policy_from_yaml(preset_text(name))
    assert (decide(card_of("stop"), policy, "act") == "auto") == (name == "aggressive")
    assert decide(card_of("stop"), policy, "propose") == "ask"


def test_observe_only_leaves_the_run_alone() -> None:
    policy = policy_from_yaml(preset_text("observe-only"))
    assert not policy.averages.enabled
    guards = policy.safeguards
    assert [guards.skip_nonfinite, guards.rewind, guards.clip] == [False, False, False]
    assert set(policy.reasons) == set(PLANNED)
