"""Rules of third parties: found, checked, and named when they are broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from automode.errors import UsageError
from automode.planner.policy import Policy
from automode.planner.rules import chosen
from automode.plugins import plugins

MODULE = """
from automode.planner.rules.base import Silence

class Mine:
    id = "loss_plateau"
    def propose(self, view):
        return Silence(code="mine", why="nothing to say")

ready = Mine()

class Nameless:
    def propose(self, view): ...

class Stranger:
    id = "boredom"
    def propose(self, view): ...

class Broken:
    def __init__(self):
        raise RuntimeError("no licence found")
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "their_rules.py").write_text(MODULE, encoding="utf-8")
    info = tmp_path / "their_rules-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-rules\nVersion: 1.2\n", encoding="utf-8"
    )
    sys.path.insert(0, str(tmp_path))
    yield info
    sys.path.remove(str(tmp_path))
    sys.modules.pop("their_rules", None)


def offer(info: Path, *lines: str) -> None:
    (info / "entry_points.txt").write_text("\n".join(["[automode.rules]", *lines]) + "\n", encoding="utf-8")


@pytest.mark.parametrize("target", ["Mine", "ready"])
def test_a_class_or_an_object_becomes_a_rule_with_its_origin(site: Path, target: str) -> None:
    offer(site, f"mine = their_rules:{target}")
    (found,) = plugins()
    assert (found.name, found.distribution, found.rule.id) == ("mine", "their-rules 1.2", "loss_plateau")
    assert found.rule in chosen(Policy(), [found.rule])


def test_without_plugins_there_are_none(site: Path) -> None:
    assert plugins() == ()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("their_rules:Nameless", "is no rule"),
        ("their_rules:Stranger", "is no rule"),
        ("their_rules:Broken", "no licence found"),
        ("their_rules:Absent", "cannot be loaded"),
        ("no_such_module:Mine", "cannot be loaded"),
    ],
)
def test_a_broken_plugin_is_an_error_that_names_who_offers_it(site: Path, target: str, words: str) -> None:
    offer(site, f"mine = {target}")
    with pytest.raises(UsageError, match=words) as caught:
        plugins()
    assert "their-rules 1.2" in str(caught.value)
