"""Which samples a card's trials train on, and with which labels, variant by variant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from automode.planner.recipes import TrainingRecipe, Variant
from automode.trainer.card_data import CardData
from automode.trainer.new_labels import NewLabels

pytestmark = pytest.mark.torch

OLD, NEW = Variant(name="old"), Variant(name="new", labels="relabel")


def ids(*which: int) -> Any:
    return np.array(which, dtype=np.int64)


DATA = CardData(
    recipe=TrainingRecipe(variants=(OLD,)),
    selected=ids(1, 2),
    others=ids(3, 4),
    entropy=(7, 0),
    step=0,
    left_out=ids(5, 6, 7),
    trunk_labels=NewLabels.of([2, 3], [8, 8]),
    new_labels=NewLabels.of([1, 3, 5, 6], [0, 0, 0, 0]),
    chosen=ids(1, 5),
)


def test_what_was_left_out_comes_back_with_its_label_where_it_belongs() -> None:
    assert [pool.tolist() for pool in DATA.pools(OLD)] == [[1, 2], [3, 4]]
    assert [pool.tolist() for pool in DATA.pools(NEW)] == [[1, 2, 5], [3, 4, 6]]
    assert DATA.stays_out("keep").tolist() == [5, 6, 7]
    assert DATA.stays_out("relabel").tolist() == [7]


def test_the_trunks_labels_hold_for_every_variant_and_the_cards_come_before_them() -> None:
    assert DATA.labels("keep").packed().tolist() == [[2, 8], [3, 8]]
    assert DATA.labels("relabel").packed().tolist() == [[1, 0], [2, 8], [3, 0], [5, 0], [6, 0]]


def test_without_new_labels_all_variants_train_on_the_same() -> None:
    plain = CardData(
        recipe=DATA.recipe, selected=ids(1), others=ids(2), entropy=(1,), step=0, left_out=ids(3)
    )
    for variant in (OLD, NEW):
        assert [pool.tolist() for pool in plain.pools(variant)] == [[1], [2]]
        assert plain.labels(variant.labels).size == 0
        assert plain.stays_out(variant.labels).tolist() == [3]
