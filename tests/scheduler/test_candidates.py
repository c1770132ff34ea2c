"""Candidates are seeded, stay inside their space, survive a restart, and disturb nothing outside."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.errors import SchedulerError, UsageError
from automode.scheduler.candidates import Candidates

SPACE: dict[str, dict[str, Any]] = {
    "lr_mul": {"low": 0.1, "high": 10, "log": True},
    "weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1},
    "batch_mul": {"low": 1, "high": 4, "integer": True},
    "optimizer": {"choices": ["sgd", "adam", None, ["sam", 0.05]]},
}


def draw(source: Candidates, count: int) -> list[dict[str, Any]]:
    return [source.ask().values for _ in range(count)]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_draws_stay_inside_the_space(sampler: Any) -> None:
    source = Candidates(SPACE, sampler=sampler, seed=1)
    for number in range(40):
        candidate = source.ask()
        assert candidate.trial == number
        values = candidate.values
        assert list(values) == list(SPACE)
        assert 0.1 <= values["lr_mul"] <= 10
        assert min(abs(values["weight_decay"] - k / 10) for k in range(4)) < 1e-12
        assert values["batch_mul"] in (1, 2, 3, 4)
        assert type(values["batch_mul"]) is int
        assert values["optimizer"] in SPACE["optimizer"]["choices"]
        source.tell(number, values["lr_mul"])
        assert source.candidate(number) == candidate
    assert source.size is None


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_the_seed_fixes_the_draws_and_the_global_state_does_not(sampler: Any) -> None:
    space = {"a": {"low": 0.0, "high": 1.0, "step": 0.01}, "b": {"choices": [1, 2, 3]}}

    def drawn(seed: int) -> list[dict[str, Any]]:
        source = Candidates(space, sampler=sampler, seed=seed, startup=3)
        found = []
        for number in range(12):
            found.append(source.ask().values)
            source.tell(number, found[-1]["a"])
        return found

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - it is the global state that must not matter
    one = drawn(7)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002
    assert drawn(7) == one
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index] # noqa: NPY002
    assert drawn(8) != one


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_restart_at_any_moment_draws_the_same(sampler: Any) -> None:
    space = {name: spec for name, spec in SPACE.items() if name != "lr_mul"}
    alive = Candidates(space, sampler=sampler, seed=3, mode="max", startup=4)
    restarted = Candidates(space, sampler=sampler, seed=3, mode="max", startup=4)
    for number in range(16):
        restarted = Candidates.from_state(json.loads(json.dumps(restarted.to_state(), allow_nan=False)))
        assert alive.ask() == restarted.ask()
        for source in (alive, restarted):
            if number % 5 == 1:
                source.tell(number, math.nan, resource=1)
            elif number % 5 == 2:
                source.give_up(number)
            elif number % 5 == 3:
                source.tell(number, float(number), resource=4)
                source.tell(number, 99.0, resource=1)  # from a lower rung, and late: changes nothing
            elif number % 5 == 4:
                source.tell(number, float(number))
    assert alive.to_state() == restarted.to_state()


def test_a_grid_visits_every_point_once_in_a_seeded_order() -> None:
    space = {
        "a": {"low": 0.0, "high": 0.3, "step": 0.1},
        "b": {"choices": ["x", "y"]},
        "c": {"low": 1, "high": 3, "integer": True},
    }
    source = Candidates(space, sampler="grid", seed=1)
    assert source.size == 4 * 2 * 3
    points = draw(source, 24)
    assert {json.dumps(point) for point in points} == {
        json.dumps({"a": a, "b": b, "c": c}) for a in (0.0, 0.1, 0.2, 0.3) for b in "xy" for c in (1, 2, 3)
    }
    with pytest.raises(SchedulerError, match="the grid has 24 points and all of them were drawn"):
        source.ask()
    assert draw(Candidates(space, sampler="grid", seed=2), 24) != points


@pytest.mark.parametrize("mode", ["min", "max"])
def test_tpe_learns_where_the_good_candidates_are(mode: Any) -> None:
    """Seeds are fixed, so the outcome is too; uniform draws would lie within 0.1 of the best point 20 % of the time."""
    near = total = 0
    for seed in range(3):
        source = Candidates({"x": {"low": 0.0, "high": 1.0}}, sampler="tpe", seed=seed, mode=mode)
        for number in range(60):
            x = source.ask().values["x"]
            source.tell(number, (x - 0.3) ** 2 * (1 if mode == "min" else -1))
            if number >= 30:
                total += 1
                near += abs(x - 0.3) < 0.1
    assert near / total > 0.5


def test_higher_rungs_weigh_more_than_lower_ones_and_diverged_ones_least() -> None:
    """Candidates near 0.8 climbed; those near 0.2 look better at the first rung only; those near 0.5 diverged there."""
    source = Candidates({"x": {"low": 0.0, "high": 1.0}}, sampler="tpe", seed=5, startup=30)
    for number in range(30):
        x = source.ask().values["x"]
        if x > 0.7:
            source.tell(number, 0.5, resource=16)
        elif x < 0.3:
            source.tell(number, 0.1, resource=1)
        else:
            source.tell(number, math.nan, resource=64)
    drawn = [values["x"] for values in draw(source, 30)]
    assert sum(x > 0.7 for x in drawn) > 15


def test_nothing_is_logged_warned_or_left_changed(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.INFO)
    filters = list(warnings.filters)
    handlers = list(logging.getLogger().handlers)
    source = Candidates(SPACE, seed=1, startup=2)
    for number in range(5):
        source.ask()
        source.tell(number, 1.0)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert list(warnings.filters) == filters
    assert list(logging.getLogger().handlers) == handlers
    out, err = capfd.readouterr()
    assert out == err == ""


def test_drawing_loads_optuna_late_and_never_torch() -> None:
    code = (
        "import sys\n"
        "from automode.scheduler.candidates import Candidates\n"
        "assert 'optuna' not in sys.modules\n"
        "c = Candidates({'x': {'low': 0, 'high': 1}}, startup=1)\n"
        "for i in range(4): c.ask(); c.tell(i, 1.0)\n"
        "assert 'optuna' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


@given(
    low=st.floats(-100, 100, allow_nan=False),
    width=st.floats(0.001, 100),
    parts=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_a_stepped_range_never_leaves_its_ends(low: float, width: float, parts: int, seed: int) -> None:
    high, step = low + width, width / parts
    if not (low < high and step <= high - low):
        return
    for sampler in ("random", "grid"):
        source = Candidates({"x": {"low": low, "high": high, "step": step}}, sampler=sampler, seed=seed)  # type: ignore[arg-type]
        for values in draw(source, min(2, source.size or 2)):
            assert low - 1e-9 <= values["x"] <= high + 1e-9


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "the search space is empty"),
        ({"x": 3}, "x is 3, but must be a mapping"),
        ({"x": {"low": 1}}, "x: high missing"),
        ({"x": {}}, "x: high and low missing"),
        ({"x": {"low": 2, "high": 1}}, "low must be the smaller"),
        ({"x": {"low": 1, "high": 1}}, "low must be the smaller"),
        ({"x": {"low": 0, "high": 1, "log": True}}, "must start above 0"),
        ({"x": {"low": 1, "high": 2, "log": True, "step": 0.5}}, "takes no step"),
        ({"x": {"low": 1, "high": 2, "step": 0}}, "step is 0"),
        ({"x": {"low": 1, "high": 2, "step": 5}}, "step is 5"),
        ({"x": {"low": 1.5, "high": 3, "integer": True}}, "integer ranges need whole numbers"),
        ({"x": {"low": 1, "high": math.inf}}, "high is inf"),
        ({"x": {"low": 1, "high": 10**400}}, "high does not fit into a float"),
        ({"x": {"low": "1", "high": 2}}, "low is '1'"),
        ({"x": {"low": True, "high": 2}}, "low is True"),
        ({"x": {"low": 1, "high": 2, "log": "yes"}}, "log is 'yes'"),
        ({"x": {"choices": []}}, "choices is"),
        ({"x": {"choices": "abc"}}, "choices is 'abc'"),
        ({"x": {"choices": [1], "low": 0}}, "low cannot stand beside choices"),
        ({"x": {"low": 0, "high": 1, "logarithmic": True}}, "logarithmic cannot stand beside high, low"),
    ],
)
def test_a_space_that_cannot_be_taken_is_refused_with_its_parameter(space: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Candidates(space)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "bayes"}, "sampler is 'bayes'"),
        ({"mode": "up"}, "mode is 'up'"),
        ({"seed": -1}, "seed is -1"),
        ({"startup": 0}, "startup is 0"),
        ({"sampler": "grid"}, "x: a grid needs `choices`, or a range with a `step`"),
    ],
)
def test_arguments_that_cannot_be_taken_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Candidates({"x": {"low": 0, "high": 1}}, **arguments)


def test_a_grid_too_large_to_visit_is_refused() -> None:
    space = {name: {"low": 0, "high": 999, "integer": True} for name in "abc"}
    with pytest.raises(UsageError, match="1000000000 points"):
        Candidates(space, sampler="grid")


def test_a_candidate_that_was_never_drawn_is_refused() -> None:
    source = Candidates({"x": {"choices": [1]}})
    for call in (lambda: source.tell(0, 1.0), lambda: source.give_up(0), lambda: source.candidate(0)):
        with pytest.raises(SchedulerError, match="candidate 0 was never drawn"):
            call()


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.clear(),
        lambda s: s.update(version=2),
        lambda s: s["space"].update(x={"low": 3, "high": 1}),
        lambda s: s["drawn"][0].update(internal={}),
        lambda s: s["drawn"][0].update(value="bad"),
        lambda s: s["drawn"][0]["internal"].update(x=7),
    ],
)
def test_a_damaged_state_is_refused(damage: Any) -> None:
    source = Candidates({"x": {"choices": [1, 2]}}, seed=1)
    source.ask()
    state = source.to_state()
    damage(state)
    with pytest.raises(SchedulerError, match="candidates state"):
        Candidates.from_state(state)
