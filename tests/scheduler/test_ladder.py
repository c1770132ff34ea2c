"""The ladder is made of exact integers and refuses what it cannot be built from."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import UsageError
from automode.scheduler import Ladder


@pytest.mark.parametrize(
    ("low", "high", "eta", "levels"),
    [
        (1, 256, 4, (1, 4, 16, 64, 256)),
        (1, 81, 3, (1, 3, 9, 27, 81)),
        (1, 1000, 10, (1, 10, 100, 1000)),  # a floating-point logarithm gives 2.9999999999999996 here
        (120, 1080, 3, (120, 360, 1080)),
        (1, 100, 3, (1, 3, 9, 27, 81, 100)),
        (7, 7, 2, (7,)),
        (5, 6, 2, (5, 6)),
        (1, 3**40, 3, tuple(3**k for k in range(41))),
    ],
)
def test_the_rungs_are_the_powers_and_then_the_top(
    low: int, high: int, eta: int, levels: tuple[int, ...]
) -> None:
    assert Ladder(low, high, eta).levels == levels


@given(low=st.integers(1, 10**9), extra=st.integers(0, 10**12), eta=st.integers(2, 1000))
def test_every_ladder_starts_and_ends_where_it_was_told_to(low: int, extra: int, eta: int) -> None:
    ladder = Ladder(low, low + extra, eta)
    levels = ladder.levels
    assert levels[0] == low
    assert levels[-1] == low + extra
    assert all(type(level) is int for level in levels)
    assert all(below * eta == above for below, above in pairwise(levels[:-1]))
    assert all(below < above <= below * eta for below, above in pairwise(levels))
    assert [ladder.rung_of(level) for level in levels] == list(range(len(levels)))
    assert Ladder(ladder.min_resource, ladder.max_resource, ladder.reduction_factor) == ladder


def test_a_resource_between_the_rungs_belongs_to_none() -> None:
    ladder = Ladder(1, 16, 4)
    assert [ladder.rung_of(resource) for resource in (0, 2, 5, 15, 17)] == [None] * 5


def test_numpy_integers_are_welcome_and_become_plain_ones() -> None:
    ladder = Ladder(np.int64(2), np.int32(8), np.uint8(2))  # type: ignore[arg-type]
    assert ladder == Ladder(2, 8, 2)
    assert all(type(level) is int for level in ladder.levels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 2), "min_resource is 0, but must be >= 1"),
        ((-3, 4, 2), "min_resource is -3"),
        ((8, 4, 2), "cannot lie above the last"),
        ((1, 4, 1), "reduction_factor is 1, but must be >= 2"),
        ((1, 4, 2.0), "reduction_factor is 2.0, but must be a whole number"),
        ((1.5, 4, 2), "min_resource is 1.5"),
        ((1, float("inf"), 2), "max_resource is inf"),
        ((True, 4, 2), "min_resource is True"),
        ((1, "4", 2), "max_resource is '4'"),
        ((1, None, 2), "max_resource is None"),
    ],
)
def test_what_is_no_ladder_is_refused_with_the_argument_named(
    arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        Ladder(*arguments)  # type: ignore[arg-type]
