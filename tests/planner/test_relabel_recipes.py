"""Recipes that give samples new labels: what belongs together, and what a card with them costs at the most."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from automode.planner.card_text import card_summary, from_yaml
from automode.planner.inputs import Run
from automode.planner.pricing import price_fork
from automode.planner.recipes import RelabelGiven, SearchSpace, TrainingRecipe
from automode.presets import preset_text

EXCLUDE = {"kind": "indices", "ids": [1, 2]}
PREDICTED = {"kind": "predicted"}
NEW = {"name": "new", "labels": "relabel"}


def recipe(**parts: Any) -> TrainingRecipe:
    return TrainingRecipe.model_validate({"variants": [{"name": "old"}, NEW]} | parts)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"relabel": PREDICTED}, "predicts labels of the samples of `exclude`, which is missing"),
        ({"exclude": EXCLUDE}, "`relabel` does not say where they come from"),
        (
            {"exclude": EXCLUDE, "relabel": PREDICTED, "variants": [{"name": "old"}]},
            "no variant takes the labels of `relabel`",
        ),
        (
            {"exclude": EXCLUDE, "relabel": PREDICTED | {"confidence": 1.1}},
            "less than or equal to 1",
        ),
        ({"relabel": {"kind": "given", "ids": [1, 2], "labels": [0]}}, "2 `ids` and 1 `labels`"),
        ({"relabel": {"kind": "given", "ids": [1, 1], "labels": [0, 1]}}, "names one sample twice"),
        ({"relabel": {"kind": "given", "ids": [1], "labels": [-1]}}, "greater than or equal to 0"),
    ],
)
def test_what_does_not_belong_together_is_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(**parts)


def test_given_labels_need_nothing_to_be_excluded() -> None:
    given = recipe(relabel={"kind": "given", "ids": [5, 3], "labels": [0, 1]})
    assert isinstance(given.relabel, RelabelGiven)
    assert given.label_sources == {"keep", "relabel"}


def test_a_space_that_draws_labels_takes_new_ones() -> None:
    space = {"parameters": {"labels": {"kind": "choice", "choices": ["keep", "relabel"]}}, "draws": 2}
    drawn = recipe(variants=[], search=SearchSpace.model_validate(space), exclude=EXCLUDE, relabel=PREDICTED)
    assert drawn.label_sources == {"keep", "relabel"}
    plain = {"parameters": {"lr_mul": {"kind": "choice", "choices": [1.0, 2.0]}}, "draws": 2}
    assert recipe(exclude=EXCLUDE, relabel=PREDICTED, search=plain).label_sources == {"keep", "relabel"}


def test_predicting_costs_a_pass_over_the_training_samples_at_the_most() -> None:
    run = Run(total_steps=1000, batch=10, train_samples=500, val_a=100, val_b=100, refresh=64, averages=True)

    def cost(**parts: Any) -> float:
        return price_fork(recipe=recipe(**parts), levels=(10, 30), reduction_factor=3, run=run).resolve

    assert cost(exclude=EXCLUDE, relabel=PREDICTED) == 500 + 64
    assert cost(relabel={"kind": "given", "ids": [1], "labels": [0]}) == 1


def test_a_cards_summary_says_what_is_left_out_and_where_labels_come_from() -> None:
    card = from_yaml(preset_text("cards/label_noise"))
    line = next(row for row in card_summary(card).splitlines() if row.strip().startswith("data"))
    assert "every training sample, without given samples (artifact); new labels predicted" in line
    assert "relabelled (schedule constant, labels relabel)" in card_summary(card)
    assert card.training_recipe is not None
    given = card.training_recipe.model_copy(update={"relabel": RelabelGiven(ids=(1, 2), labels=(0, 0))})
    assert "; 2 labels given" in card_summary(card.model_copy(update={"training_recipe": given}))
