"""What is written into the log reads back as it was."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import SessionCorruptError, UsageError
from automode.session.records import dump_json, load_json

_keys = st.one_of(st.sampled_from(["$float", "$dict", "a", ""]), st.text())
_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.text(st.characters(exclude_categories=())),
    st.sampled_from(["NaN", "Infinity", "-Infinity", "$float"]),
)
json_values = st.recursive(
    _leaves, lambda inner: st.one_of(st.lists(inner), st.dictionaries(_keys, inner)), max_leaves=20
)


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type; NaN equals NaN, 0.0 differs from -0.0, key order counts."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@given(json_values)
def test_every_value_reads_back_equal_in_value_and_type(value: Any) -> None:
    text = dump_json(value)
    assert same(load_json(text), value)


@given(json_values)
def test_the_text_is_strict_json(value: Any) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(dump_json(value), parse_constant=refuse)


def test_special_floats_and_their_names_are_told_apart() -> None:
    body = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": "NaN", "e": {"$float": "NaN"}}
    assert same(load_json(dump_json(body)), body)
    assert json.loads(dump_json(body))["a"] == {"$float": "NaN"}


def test_what_pydantic_writes_for_a_nan_stays_the_string_that_it_wrote() -> None:
    assert load_json('{"loss":"NaN"}') == {"loss": "NaN"}


def test_a_tuple_becomes_a_list_and_an_enum_its_value() -> None:
    class Colour(StrEnum):
        RED = "red"

    assert load_json(dump_json({"a": (1, 2), "b": Colour.RED, "c": np.float64(0.5)})) == {
        "a": [1, 2],
        "b": "red",
        "c": 0.5,
    }


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [np.int64(1)]}, r"\$\.a\[0\]: a value of type int64 .*tolist"),
        ({"a": {1: 2}}, r"\$\.a: keys must be strings .* got 1"),
        ({"a": {1, 2}}, r"\$\.a: a value of type set cannot"),
        (object(), r"\$: a value of type object cannot"),
        pytest.param(10**5000, "cannot be written", id="huge"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        dump_json(value)


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="nested too deeply"):
        dump_json(loop)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a":NaN}', "[Infinity]", '{"$float":"nan"}', '{"$float":[]}', '{"$dict":3}', "[" * 100_000],
)
def test_text_that_dump_json_never_writes_is_corrupt(text: str) -> None:
    with pytest.raises(SessionCorruptError, match="cannot be read"):
        load_json(text)
