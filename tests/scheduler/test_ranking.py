"""The ranking agrees with a sorted list, block splits and removals included."""

from __future__ import annotations

import random
from bisect import insort

from hypothesis import given
from hypothesis import strategies as st

from automode.scheduler import ranking
from automode.scheduler.ranking import Ranking


@given(
    losses=st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, 0.5]), max_size=60),
    removals=st.lists(st.integers(0, 59), max_size=40),
)
def test_ranks_are_those_of_a_sorted_list(losses: list[float], removals: list[int]) -> None:
    ranks, model = Ranking(), []
    for seq, loss in enumerate(losses):
        ranks.add((loss, seq, seq))
        insort(model, (loss, seq, seq))
    for index in removals:
        if index < len(model):
            ranks.remove(model.pop(index))
    assert list(ranks) == model
    assert [ranks.rank(key) for key in model] == list(range(len(model)))
    assert ranks.first == (model[0] if model else None)
    assert len(ranks) == len(model)


def test_ranks_stay_exact_across_many_block_splits() -> None:
    chance = random.Random(7)
    ranks, model = Ranking(), []
    for seq in range(6 * ranking._BLOCK):
        key = (float(chance.randrange(500)), seq, seq)
        ranks.add(key)
        insort(model, key)
    for key in chance.sample(model, 4 * ranking._BLOCK):
        ranks.remove(key)
        model.remove(key)
    assert list(ranks) == model
    assert [ranks.rank(key) for key in model] == list(range(len(model)))
