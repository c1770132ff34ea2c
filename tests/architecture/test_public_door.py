"""The public names are a promise: this list changes only together with the changelog."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import automode
from automode import errors

PUBLIC = {
    "Callback",
    "FlatAdam",
    "FlatAdamW",
    "flatten",
    "TensorLoader",
    "PlanCard",
    "Policy",
    "Session",
    "Trainer",
    "quickstart",
    "replay",
    "story",
    "watch",
    "__version__",
    # the error tree
    "AutomodeError",
    "UsageError",
    "CardError",
    "PolicyError",
    "NotExecutableError",
    "ConflictError",
    "DataError",
    "MergeError",
    "SessionError",
    "SessionCorruptError",
    "SessionBusyError",
    "ReplayDifferenceError",
    "SchedulerError",
}


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_exactly_these() -> None:
    assert set(automode.__all__) == PUBLIC
    assert len(automode.__all__) == len(set(automode.__all__))
    assert dir(automode) == sorted(PUBLIC)


def test_every_error_of_the_tree_is_public_and_stems_from_one_root() -> None:
    tree = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(tree) <= PUBLIC
    assert all(issubclass(error, automode.AutomodeError) for error in tree.values())


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(automode, name) is not None


@pytest.fixture(scope="module")
def loaded() -> list[str]:
    """What a new process says of itself: one for all who ask, since it loads torch."""
    code = """
import sys, automode
heavy = lambda: [name for name in ("torch", "lightning", "pytorch_lightning") if name in sys.modules]
print(heavy())
automode.Trainer
print(heavy())
automode.watch
print(heavy())
exec("from automode import *")
print(*sorted(name for name in globals()))
"""
    return in_a_fresh_process(code).splitlines()


@pytest.mark.torch
def test_a_star_import_brings_every_public_name(loaded: list[str]) -> None:
    assert set(loaded[3].split()) >= PUBLIC


@pytest.mark.torch
def test_torch_loads_with_the_trainer_and_not_before(loaded: list[str]) -> None:
    assert loaded[:2] == ["[]", "['torch']"]


@pytest.mark.torch
def test_lightning_is_loaded_by_its_own_door_alone(loaded: list[str]) -> None:
    assert loaded[2] == "['torch']"


@pytest.mark.parametrize("name", ["PlanCard", "Policy"])
def test_cards_and_policies_can_be_had_without_torch(name: str) -> None:
    code = f"import sys, automode; automode.{name}; print('torch' in sys.modules)"
    assert in_a_fresh_process(code) == "False"


def test_a_name_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="'automode' has no attribute 'Trianer'"):
        automode.Trianer  # noqa: B018  # the access is the test


def test_a_lazy_name_is_looked_up_once() -> None:
    first = automode.PlanCard
    assert vars(automode)["PlanCard"] is first is import_module("automode.planner.cards").PlanCard


def test_the_door_shows_type_checkers_the_same_homes_that_it_loads_from() -> None:
    tree = ast.parse(Path(automode.__file__).read_text(encoding="utf-8"))
    shown = {
        alias.name: block.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for block in branch.body
        if isinstance(block, ast.ImportFrom)
        for alias in block.names
    }
    assert shown == automode._HOMES


def test_one_version_stands_everywhere() -> None:
    citation = (Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {automode.__version__}\n" in citation
