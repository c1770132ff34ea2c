"""The generated pages are what the models and commands say today, and what they claim is so."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

from automode.planner.card_text import from_yaml, submission_from_yaml, to_yaml
from automode.planner.cards import CardState, PlanCard
from automode.planner.policy import Policy
from automode.planner.schema_problems import schema_of

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()


@pytest.mark.parametrize("name", sorted(generate.pages()))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    stands = (DOCS / name).read_text(encoding="utf-8")
    assert stands == generate.pages()[name], f"docs/{name} is stale: run `python docs/generate.py`"


def test_the_check_finds_a_stale_page_and_writing_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert "docs/card.md is stale" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    (tmp_path / "policy.md").write_text("edited", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    capsys.readouterr()
    assert generate.main() == 1
    assert capsys.readouterr().out == "docs/policy.md is stale: run python docs/generate.py\n"


def test_every_state_is_explained() -> None:
    assert set(generate.STATES) == set(CardState)


def properties(model: Any) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    schema = schema_of(model)
    for name, part in [(model.__name__, schema), *schema["$defs"].items()]:
        for field, inner in part.get("properties", {}).items():
            yield name, field, inner


@pytest.mark.parametrize("model", [PlanCard, Policy])
def test_every_field_says_what_it_means(model: Any) -> None:
    # `kind` names its section, and a group of the policy says it in its own docstring.
    silent = [
        f"{name}.{field}"
        for name, field, inner in properties(model)
        if not inner.get("description") and field != "kind" and not (name == "Policy" and "$ref" in inner)
    ]
    assert silent == []


def test_what_is_said_to_be_told_exists() -> None:
    known = {f"{name}.{field}" for model in (PlanCard, Policy) for name, field, _ in properties(model)}
    assert known >= generate.TOLD


def test_every_value_of_the_policy_that_is_said_to_run_is_read_somewhere() -> None:
    sources = [
        p for p in (REPOSITORY / "automode").rglob("*.py") if p.name not in ("policy.py", "capability.py")
    ]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    groups = {n: type(v) for n in Policy.model_fields if isinstance(v := getattr(Policy(), n), BaseModel)}
    unread = {
        f"{group}.{name}"
        for group, model in groups.items()
        for name in model.model_fields
        if not re.search(rf"\.{name}\b", code)
    }
    assert unread == set()


def test_a_card_of_ones_own_may_leave_out_what_the_page_says() -> None:
    left = submission_from_yaml(
        "action: fork\n"
        "training_recipe: {variants: [{name: gentle, lr_mul: 0.5}]}\n"
        "budget_steps: 20\n"
        "asha: {max_steps: 60}\n"
    )
    assert set(left) == {"action", "training_recipe", "budget_steps", "asha"}


def test_the_card_that_the_readme_shows_is_printed_as_a_session_prints_it() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```yaml\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert len(shown) == 1
    assert to_yaml(from_yaml(shown[0])) == shown[0]
