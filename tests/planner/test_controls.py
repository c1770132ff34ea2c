"""What may be asked of a run, as it stands on a command line and in a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.errors import UsageError
from automode.planner.controls import (
    CHECKS,
    VERBS,
    ControlVerb,
    Order,
    arguments_from,
    arguments_of,
    order_of,
    verb_of,
)
from automode.planner.events import INPUT, Controlled
from automode.planner.plain_data import plain


@pytest.mark.parametrize(
    ("verb", "words", "found"),
    [
        ("step", ["500"], {"n": 500}),
        ("step", [], {}),
        ("step", ["n=2"], {"n": 2}),
        ("set", ["max_epochs=20", "lr=1e-4"], {"max_epochs": 20, "lr": 1e-4}),
        ("load", ["best"], {"checkpoint": "best"}),
        ("load", ["80e82514"], {"checkpoint": "80e82514"}),
        ("load", ["12345678"], {"checkpoint": "12345678"}),
        ("check", ["gradients", "steps=5"], {"what": "gradients", "steps": 5}),
        ("fork", ["lr_mul=0.5"], {"lr_mul": 0.5}),
        ("pause", [], {}),
    ],
)
def test_words_become_arguments(verb: ControlVerb, words: list[str], found: dict[str, Any]) -> None:
    assert arguments_from(verb, words) == found


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("step", ["0"]),
        ("step", ["1", "2"]),
        ("set", []),
        ("set", ["lr=inf"]),
        ("set", ["lr=nan"]),
        ("set", ["lr=0"]),
        ("set", ["max_epochs=1.5"]),
        ("check", ["everything"]),
        ("pause", ["x=1"]),
        ("merge", ["lr_mul=0.5"]),
    ],
)
def test_words_that_make_no_sense_are_refused(verb: ControlVerb, words: list[str]) -> None:
    with pytest.raises(UsageError, match=verb):
        arguments_from(verb, words)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_known_by_its_name_and_refuses_what_it_does_not_take(verb: ControlVerb) -> None:
    assert verb_of(verb) == verb
    with pytest.raises(UsageError, match="nonsense"):
        arguments_of(verb, {"nonsense": 1})


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_can_be_asked_for(check: str) -> None:
    assert arguments_of("check", {"what": check}).what == check


def test_an_order_in_the_log_reads_back_as_it_was() -> None:
    told = Controlled(
        request="r", verb="set", actor="ann", step=3, arguments={"lr": 0.1}, result={"rates": [0.1]}
    )
    assert INPUT.validate_json(told.model_dump_json()) == told


def test_an_order_holds_its_arguments_as_the_log_does() -> None:
    order = order_of("set", {"lr": np.float32(0.5), "max_epochs": np.int64(3)}, actor="ann")
    assert order.arguments == {"lr": 0.5, "max_epochs": 3}
    assert {name: type(value) for name, value in order.arguments.items()} == {"lr": float, "max_epochs": int}
    assert Order.model_validate_json(order.model_dump_json()) == order


ENDLESS: dict[str, Any] = {}
ENDLESS["a"] = ENDLESS


@pytest.mark.parametrize(
    ("verb", "arguments", "person", "why"),
    [
        ("pause", {}, {"actor": ""}, "actor"),
        ("pause", {}, {"actor": None}, "actor"),
        ("pause", {}, {"note": 5}, "note"),
        ("pause", {}, {"note": "\ud800"}, "half of a surrogate pair"),
        ("step", {"n": 10**16}, {}, "n: "),
        ("set", {"max_steps": 10**30}, {}, "max_steps: "),
        ("fork", {"card": {"a": object()}}, {}, "type object"),
        ("fork", {"card": {"a": {1: 2}}}, {}, "keys must be text"),
        ("fork", {"card": {"a": 2**64}}, {}, "65 bits"),
        ("fork", {"card": {"because": "\udfff"}}, {}, "half of a surrogate pair"),
        ("fork", {"card": {"a": ENDLESS}}, {}, "deeper than 64 levels"),
    ],
)
def test_an_order_that_the_log_could_not_hold_is_refused(
    verb: ControlVerb, arguments: dict[str, Any], person: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        order_of(verb, arguments, **{"actor": "ann", **person})


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50, deadline=None)
@given(values)
def test_plain_data_pass_as_they_are(value: Any) -> None:
    assert plain(value, "it") == value
    assert plain([(value,)], "it") == [[value]]
