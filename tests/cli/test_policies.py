"""Policies are checked and compared, and the schemas come out as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from automode.planner.card_text import policy_from_yaml
from automode.planner.policy import Policy


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\npacing: {max_cards: 3}\ntrend: {gain: 1e-3}\n", encoding="utf-8")
    return path


def test_a_good_policy_is_said_to_be_good_with_its_digest_and_differences(cli: Any, file: Path) -> None:
    out = cli("policy", "check", file).output
    assert policy_from_yaml(file.read_text()).digest in out
    assert "  pacing.max_cards: 16 -> 3\n" in out
    assert "  trend.gain: 0.01 -> 0.001\n" in out
    assert out.count(" -> ") == 3


def test_a_preset_is_checked_by_its_name(cli: Any) -> None:
    assert "it is the default policy" in cli("policy", "check", "default").output


def test_every_problem_of_a_bad_policy_is_told_with_file_line_and_guess(cli: Any, file: Path) -> None:
    file.write_text("pacing: {max_card: 3}\ntrend:\n  gain: 0\n", encoding="utf-8")
    out = cli("policy", "check", file, code=1).output
    assert out.startswith(f"Error: {file}: this policy cannot be taken, for 2 reasons:\n")
    assert "line 1, column 10: pacing.max_card: unknown key, did you mean `max_cards`?" in out
    assert "line 3, column 9: trend.gain: expected a number above 0" in out


def test_a_reason_that_no_rule_gives_is_refused(cli: Any, file: Path) -> None:
    file.write_text("reasons: [manual]\n", encoding="utf-8")
    assert "no rule gives manual" in cli("policy", "check", file, code=1).output


def test_a_missing_file_is_refused_with_the_preset_that_may_be_meant(cli: Any) -> None:
    out = cli("policy", "check", "conservativ", code=1).output
    assert out == "Error: there is no file conservativ; did you mean conservative?\n"


def test_two_policies_are_compared_name_by_name(cli: Any, file: Path) -> None:
    lines = cli("policy", "diff", file, "default").output.splitlines()
    assert lines == ["name: mine -> default", "trend.gain: 0.001 -> 0.01", "pacing.max_cards: 3 -> 16"]
    assert cli("policy", "diff", file, file).output == "no differences\n"


def test_a_policy_is_shown_in_full(cli: Any, file: Path) -> None:
    out = cli("policy", "show", file).output
    assert policy_from_yaml(out) == policy_from_yaml(file.read_text())
    assert "max_cards: 3 " in out
    assert "cooldown_grow: 1.5 " in out
    assert policy_from_yaml(cli("policy", "show", "default").output) == Policy()


@pytest.mark.parametrize(("what", "key"), [("card", "training_recipe"), ("policy", "pacing")])
def test_the_schemas_are_printed_as_json(cli: Any, what: str, key: str) -> None:
    assert key in json.loads(cli("schema", what).output)["properties"]
