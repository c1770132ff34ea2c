"""Search spaces are typed, refused where they reach too far, readable as YAML, and drawn within their ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from automode.errors import CardError
from automode.planner.card_text import card_html, card_summary, from_yaml, to_yaml
from automode.planner.cards import PlanCard
from automode.planner.inputs import Run
from automode.planner.pricing import worst_case
from automode.planner.recipes import TrainingRecipe
from automode.planner.rules.loss_plateau import DROPS, sweep
from automode.planner.variants import SearchSpace, Variant
from automode.presets import preset_text
from automode.scheduler.candidates import Candidates

RATES = {"kind": "log_uniform", "low": 0.1, "high": 10.0}
SAM = {"kind": "choice", "choices": ["keep", "sam"]}


def space(draws: int = 2, sampler: str = "random", **parameters: Any) -> SearchSpace:
    return SearchSpace.model_validate({"parameters": parameters, "draws": draws, "sampler": sampler})


def template(**search: Any) -> str:
    """The text of the plateau's template with other words in its search."""
    text = preset_text("cards/loss_plateau")
    for old, new in search.items():
        assert old in text
        text = text.replace(old, new, 1)
    return text


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"lr_mul": RATES | {"low": -1.0}}, "greater than 0"),
        ({"lr_mul": RATES | {"low": 10.0}}, r"`low` \(10\) must be below `high` \(10\)"),
        ({"lr_mul": RATES | {"high": 1e9}}, r"`lr_mul`: 1000000000.0 cannot be taken: .* 10000"),
        ({"lr_mul": RATES | {"high": "a"}}, "valid number"),
        ({"lr_mul": RATES | {"step": 1}}, "Extra inputs"),
        ({"lr_mul": {"low": 0.1, "high": 1.0}}, "Unable to extract tag"),
        ({"lr_mul": RATES | {"kind": "normal"}}, "'log_uniform', 'uniform', 'int', 'choice'"),
        (
            {"weight_decay": {"kind": "uniform", "low": -0.1, "high": 0.1}},
            "`weight_decay`: -0.1 cannot be taken",
        ),
        (
            {"lr_mul": {"kind": "uniform", "low": 1.0, "high": 2.0, "step": 3.0}},
            r"`step` \(3\) does not fit between",
        ),
        ({"batch_mul": {"kind": "int", "low": 1, "high": 2, "step": 0}}, "greater than or equal to 1"),
        ({"optimizer": {"kind": "choice", "choices": ["keep", "lion"]}}, "`optimizer`: 'lion' cannot be"),
        ({"optimizer": {"kind": "choice", "choices": []}}, "at least 1 item"),
        ({"lr_mul": {"kind": "choice", "choices": [1.0, 1.0]}}, "names 1.0 twice"),
        ({"lr_mul": {"kind": "choice", "choices": [True]}}, "`lr_mul`: True cannot be taken"),
        ({"lr_mul": {"kind": "choice", "choices": ["2"]}}, "`lr_mul`: '2' cannot be taken"),
        ({"name": {"kind": "choice", "choices": ["a", "b"]}}, "name: no such field of a variant"),
        ({"lr": RATES}, "known are batch_mul, batches, clip_norm"),
        ({}, "at least 1 item"),
    ],
)
def test_a_space_that_holds_what_no_variant_takes_is_refused(parameters: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){told}"):
        space(**parameters)


def test_a_grid_needs_values_that_can_be_counted_and_as_many_as_are_drawn() -> None:
    with pytest.raises(ValidationError, match="give `lr_mul` as a choice, as int, or uniform with a `step`"):
        space(sampler="grid", lr_mul=RATES)
    tenths = {"kind": "uniform", "low": 0.1, "high": 0.3, "step": 0.1}
    assert space(draws=6, sampler="grid", lr_mul=tenths, optimizer=SAM).draws == 6
    with pytest.raises(ValidationError, match="the grid has 6 points, and `draws` asks for 7"):
        space(draws=7, sampler="grid", lr_mul=tenths, optimizer=SAM)


def test_a_recipe_may_write_variants_out_beside_those_that_are_drawn() -> None:
    both = TrainingRecipe(variants=(Variant(name="drop", lr_mul=0.1),), search=space(3, lr_mul=RATES))
    assert both.candidates == 4
    with pytest.raises(ValidationError, match=r"\['draw1'\] are those of drawn variants"):
        TrainingRecipe(variants=(Variant(name="draw1"),), search=space(3, lr_mul=RATES))
    assert TrainingRecipe(variants=(Variant(name="drawback"),), search=space(lr_mul=RATES)).candidates == 3
    assert TrainingRecipe(variants=(Variant(name="draw1"),)).candidates == 1
    many = tuple(Variant(name=f"v{i}") for i in range(63))
    with pytest.raises(ValidationError, match="65 trials are too many: 64 at the most"):
        TrainingRecipe(variants=many, search=space(2, lr_mul=RATES))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"low: 0.03": "low: -1"},
            "search.parameters.lr_mul.low: expected a number above 0, came the number -1",
        ),
        ({"log_uniform": "loguniform"}, "there is no kind 'loguniform', did you mean `log_uniform`?"),
        ({"kind: log_uniform, ": ""}, "lr_mul: `kind` is missing; expected a mapping with `kind`"),
        ({"high: 3.0": "heigh: 3.0"}, "lr_mul.heigh: unknown key, did you mean `high`?"),
        ({"high: 3.0": "high: 0.01"}, "lr_mul: `low` (0.03) must be below `high` (0.01)"),
        (
            {"sampler: tpe": "sampler: grid"},
            "training_recipe.search: a grid needs values that can be counted",
        ),
    ],
)
def test_a_wrong_space_in_a_cards_text_is_told_with_its_line(changes: dict[str, str], told: str) -> None:
    with pytest.raises(CardError) as caught:
        from_yaml(template(**changes))
    assert told in str(caught.value)
    assert "line 2" in str(caught.value)


def test_a_space_reads_well_in_yaml_and_at_a_glance() -> None:
    card = from_yaml(template())
    text = to_yaml(card)
    assert "    parameters: {lr_mul: {kind: log_uniform, low: 0.03, high: 3.0}}\n    draws: 2\n" in text
    assert "2 drawn by tpe over lr_mul 0.03 to 3 (log)" in card_summary(card)
    wide = space(
        lr_mul={"kind": "uniform", "low": 0.5, "high": 2, "step": 0.5},
        loss_weight={"kind": "int", "low": 1, "high": 4},
        optimizer=SAM,
    )
    recipe = TrainingRecipe(search=wide).model_dump(mode="json")
    again = PlanCard.model_validate(card.dump() | {"training_recipe": recipe})
    assert from_yaml(to_yaml(again)) == again
    assert "2 drawn by random over lr_mul 0.5 to 2 by 0.5, loss_weight 1 to 4" in card_summary(again)
    assert "optimizer one of keep, sam" in card_html(again)


DRAWS = {
    "lr_mul": st.tuples(st.floats(1e-3, 1.0), st.floats(1.5, 100.0)).map(
        lambda p: {"kind": "log_uniform", "low": p[0], "high": p[1]}
    ),
    "weight_decay": st.tuples(st.floats(0.0, 0.5), st.floats(1.0, 9.0), st.none() | st.floats(0.01, 0.5)).map(
        lambda p: {"kind": "uniform", "low": p[0], "high": p[1], "step": p[2]}
    ),
    "loss_weight": st.tuples(st.integers(1, 5), st.integers(7, 99), st.integers(1, 2)).map(
        lambda p: {"kind": "int", "low": p[0], "high": p[1], "step": p[2]}
    ),
    "optimizer": st.just(SAM),
}


@settings(max_examples=15, deadline=None)
@given(st.fixed_dictionaries({}, optional=DRAWS).filter(bool), st.integers(0, 99))
def test_whatever_is_drawn_from_a_space_is_a_variant_within_its_ends(
    parameters: dict[str, Any], seed: int
) -> None:
    source = Candidates(space(**parameters).as_space(), sampler="random", seed=seed)
    for i in range(3):
        drawn = source.ask().values
        Variant.model_validate({"name": f"draw{i}", **drawn})
        for name, value in drawn.items():
            asked = parameters[name]
            if asked["kind"] == "choice":
                assert value in asked["choices"]
                continue
            assert asked["low"] <= value <= asked["high"]
            if asked["kind"] == "int":
                assert (value - asked["low"]) % asked["step"] == 0


@pytest.mark.parametrize("arms", range(1, 17))
def test_the_plateaus_sweep_has_the_arms_that_were_asked_for_and_a_drop_among_them(arms: int) -> None:
    recipe = sweep(arms)
    assert recipe.candidates == arms
    assert recipe.variants[0] == DROPS[0]
    assert all(v.lr_mul < 1.0 for v in recipe.variants)
    if recipe.search is not None:
        (draw,) = recipe.search.parameters.values()
        low, high = draw.ends()
        assert low < 0.1 < 1.0 < high


def test_a_cards_price_counts_written_out_and_drawn_variants_alike() -> None:
    run = Run(total_steps=10_000, batch=32, train_samples=9_000, val_a=500, val_b=500, averages=True)
    card = from_yaml(template())
    assert card.training_recipe is not None
    three = TrainingRecipe(variants=tuple(Variant(name=n, ema=0.9) for n in "abc"))
    alike = card.model_copy(update={"training_recipe": three})
    assert worst_case(card, run) == worst_case(alike, run)


def test_an_adapter_has_nothing_that_could_not_be_merged_exactly() -> None:
    low = Variant.model_validate({"name": "low", "adapter": {"rank": 4, "targets": ["encoder.*"]}})
    assert low.adapter is not None
    assert (low.adapter.rank, low.adapter.alpha, low.adapter.targets) == (4, 16.0, ("encoder.*",))
    assert Variant(name="v").adapter is None
    for name in ("use_rslora", "use_dora", "bias"):
        with pytest.raises(ValidationError, match=rf"adapter.{name}\n  Extra inputs are not permitted"):
            Variant.model_validate({"name": "low", "adapter": {"rank": 4, name: True}})
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": []}, {"targets": [""]}, {"ranks": 3}):
        with pytest.raises(ValidationError):
            Variant.model_validate({"name": "low", "adapter": wrong})


def test_no_variant_has_the_name_of_a_control() -> None:
    with pytest.raises(ValidationError, match="`control annealed` is the name of a control"):
        TrainingRecipe.model_validate({"variants": [{"name": "control annealed"}]})
