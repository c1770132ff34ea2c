"""Every rule against its table of cases: signals are real, fed with scripted series; only the numbers stand in YAML."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from automode.errors import PolicyError
from automode.planner.capability import refusals
from automode.planner.cards import PlanCard
from automode.planner.inputs import Run, Validated
from automode.planner.pacing import Funds, PacingState, admit, in_order
from automode.planner.policy import Policy
from automode.planner.recipes import Base, Variant
from automode.planner.rules import BUILT_IN, PRIORITY, chosen
from automode.planner.rules.base import Probed, Proposal, Silence, View
from automode.planner.scans import Clustered, Scanned
from automode.planner.watching import signals_for, watch_validation

CASES = Path(__file__).parent / "cases"
KINDS = {"firing", "silent", "at_threshold"}
DIGEST = "sha256:" + "a" * 64
RULES = {rule.id: rule for rule in BUILT_IN}


def load(rule: str) -> list[dict[str, Any]]:
    text = (CASES / f"{rule}.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text.replace("$DIGEST", DIGEST))
    assert data["rule"] == rule
    return list(data["cases"])


def script(series: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Turn segments into one row for each step; the noise is seeded, so a case is the same every time."""
    rng = np.random.default_rng(seed)
    rows = []
    for part in series:
        n = part["steps"]
        levels = np.linspace(part["from"], part.get("to", part["from"]), n)
        losses = levels * (1.0 + part.get("noise", 0.0) * rng.standard_normal(n))
        norms = part.get("grad_norm", 1.0) * (1.0 + 0.05 * rng.standard_normal(n))
        for i in range(n):
            loss = nan if i in part.get("nan_at", ()) else float(losses[i])
            loss *= 50.0 if i in part.get("spikes_at", ()) else 1.0
            norm = None if part.get("no_grad_norm") else float(norms[i])
            rows.append({"loss": loss, "grad_norm": norm, "applied": i not in part.get("unapplied_at", ())})
    return rows


def probed_of(asked: dict[str, Any] | None) -> Probed | None:
    if asked is None:
        return None
    return Probed(
        **{"steps": 40, "step": 100, "loss": 1.2}
        | asked
        | {"variant": Variant.model_validate(asked["variant"])}
    )


def view_of(case: dict[str, Any]) -> View:
    asked = dict(case.get("view", {}))
    policy = Policy.model_validate(asked.pop("policy", {}))
    budget = asked.pop("budget", 400)
    run = Run.model_validate(
        {
            "total_steps": 4000,
            "batch": 32,
            "train_samples": 1024,
            "val_a": 200,
            "val_b": 200,
            "task": "classification",
            "has_ids": True,
            "exact_losses": True,
            "averages": True,
            "why_no_restart": None,
            "slices": {"rotated": 80},
            "train_slices": ["rotated"],
        }
        | asked.pop("run", {})
    )
    suite = signals_for(policy, budget)
    validated = [Validated.model_validate({"value": 0.5, "n": 400, **v}) for v in asked.pop("validated", ())]
    rows = script(case.get("series", []), case.get("seed", 0))
    for step, row in enumerate(rows, start=1):
        suite.observe(step, row["loss"], row["grad_norm"], 0.1, row["applied"])
        for event in validated:
            if event.step == step:
                watch_validation(suite, event)
    assert all(v.step <= len(rows) for v in validated), "a validation comes after the series"
    return View(
        step=asked.pop("step", len(rows)),
        remaining=asked.pop("remaining", 3000),
        planning_budget=budget,
        policy=policy,
        run=run,
        signals=suite,
        validated=validated,
        scanned=[Scanned.model_validate(s) for s in asked.pop("scanned", ())],
        clustered=[Clustered.model_validate(c) for c in asked.pop("clustered", ())],
        counts=asked.pop("counts", {}),
        probed=probed_of(asked.pop("probed", None)),
        **asked,
    )


ALL = [pytest.param(rule, case, id=f"{rule}-{case['name']}") for rule in RULES for case in load(rule)]


@pytest.mark.parametrize(("rule", "case"), ALL)
def test_a_rule_answers_its_case(rule: str, case: dict[str, Any]) -> None:
    answer = RULES[rule].propose(view_of(case))
    expect = case["expect"]
    if "code" in expect:
        assert isinstance(answer, Silence), answer
        assert answer.code == expect["code"], answer
        text = answer.why
    else:
        assert isinstance(answer, Proposal), answer
        assert answer.reason == rule
        text = answer.because
        if "variants" in expect:
            assert answer.training_recipe is not None
            assert [v.name for v in answer.training_recipe.variants] == expect["variants"]
        if "cheaper" in expect:
            recipes = [fewer.training_recipe for fewer in answer.cheaper]
            assert [[v.name for v in recipe.variants] for recipe in recipes if recipe] == expect["cheaper"]
        if "drawn" in expect:
            assert answer.training_recipe is not None
            search = answer.training_recipe.search
            assert (0 if search is None else search.draws) == expect["drawn"]
        for name, value in expect.get("has", {}).items():
            part = getattr(answer, name)
            got = (
                part if part is None or isinstance(part, str) else part.model_dump(mode="json", by_alias=True)
            )
            assert got == value or (isinstance(got, dict) and got | value == got), (name, got)
    for words in expect.get("says", ()):
        assert words in text, text


@pytest.mark.parametrize(("rule", "case"), ALL)
def test_every_silence_is_a_sentence_and_every_proposal_becomes_a_card(
    rule: str, case: dict[str, Any]
) -> None:
    view = view_of(case)
    answer = RULES[rule].propose(view)
    if isinstance(answer, Silence):
        assert answer.code.replace("_", "").isalpha()
        assert len(answer.why) > 20
        return
    assert any(c.isdigit() for c in answer.because)
    assert answer.because.endswith(".")
    assert refusals(answer, view.run) == []
    for value in answer.diagnostics.values():
        for one in value if isinstance(value, tuple) else (value,):
            assert one is None or isinstance(one, float | int | str)
    card = admit(
        answer,
        view=view,
        state=PacingState(),
        open_cards=[],
        funds=Funds(remaining=1e9, total=1e9, spent=0.0),
        session="s",
        ordinal=0,
        base=Base(step=view.step, policy=view.policy.digest),
    )
    if isinstance(card, PlanCard):
        assert PlanCard.model_validate(card.dump()) == card
    else:
        assert card.code in {"warmup", "no_time"}, card


def test_every_built_in_rule_has_firing_silent_and_threshold_cases() -> None:
    files = {path.stem for path in CASES.glob("*.yaml")}
    assert files == set(RULES)
    for rule in RULES:
        kinds = {case["kind"] for case in load(rule)}
        assert kinds == KINDS, f"{rule} lacks {KINDS - kinds}"
        names = [case["name"] for case in load(rule)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("rule", RULES)
def test_firing_cases_fire_and_silent_cases_do_not(rule: str) -> None:
    for case in load(rule):
        if case["kind"] != "at_threshold":
            assert ("code" in case["expect"]) == (case["kind"] == "silent"), case["name"]


def test_a_rule_says_the_same_twice() -> None:
    for name, rule in RULES.items():
        for case in load(name):
            assert rule.propose(view_of(case)) == rule.propose(view_of(case))


def test_what_cannot_run_is_not_proposed_and_the_silence_says_why() -> None:
    case = next(c for c in load("loss_plateau") if c["kind"] == "firing")
    case["view"] = {"run": {"why_no_evidence": "no validation loader was given"}}
    answer = RULES["loss_plateau"].propose(view_of(case))
    assert isinstance(answer, Silence)
    assert answer.code == "cannot_run"
    assert "no validation loader was given" in answer.why


def test_the_policy_chooses_the_rules_and_priority_orders_them() -> None:
    policy = Policy(reasons=("loss_plateau", "instability_spike"))
    assert [r.id for r in chosen(policy)] == ["instability_spike", "loss_plateau"]
    assert [r.id for r in chosen(Policy(reasons=()))] == []
    assert PRIORITY[: len(BUILT_IN)] == tuple(r.id for r in BUILT_IN)


def test_a_plugin_takes_the_place_of_the_built_in_with_its_reason() -> None:
    class Mine:
        id = "loss_plateau"

        def propose(self, view: View) -> Silence:
            return Silence(code="mine", why="because it is mine")

    mine = Mine()
    assert chosen(Policy(), [mine])[[r.id for r in chosen(Policy())].index("loss_plateau")] is mine
    with pytest.raises(PolicyError, match="two plugins"):
        chosen(Policy(), [mine, Mine()])


def test_a_reason_that_no_rule_gives_is_refused() -> None:
    with pytest.raises(PolicyError, match="manual"):
        chosen(Policy(reasons=("manual",)))


def test_urgent_proposals_go_first_and_equals_keep_their_order() -> None:
    plateau = RULES["loss_plateau"].propose(view_of(load("loss_plateau")[0]))
    merge = RULES["merge_cadence"].propose(
        view_of(next(c for c in load("merge_cadence") if c["kind"] == "firing"))
    )
    assert isinstance(plateau, Proposal)
    assert isinstance(merge, Proposal)
    assert in_order([plateau, merge]) == [merge, plateau]
