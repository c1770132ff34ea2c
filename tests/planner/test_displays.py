"""Cards, policies and verdicts show themselves in terminals and notebooks, and no name in them is ever markup."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest

from automode.planner.card_text import from_yaml
from automode.planner.displays import Panel
from automode.planner.events import VerdictGiven
from automode.planner.policy import Policy
from automode.presets import preset_text

BAD = "<script>alert(1)</script><img src=x onerror=y>[bold red]loud[/] [link=http://x]\x1b[31m\u202e"


def card() -> Any:
    made = from_yaml(preset_text("cards/slice_underperformance"))
    return made.model_copy(update={"because": BAD, "diagnostics": {BAD: BAD}, "created_by": BAD})


def verdict(**changes: Any) -> VerdictGiven:
    fields: dict[str, Any] = {
        "card": BAD,
        "verdict": "accepted",
        "candidate": BAD,
        "n": 200,
        "mean": 0.02,
        "z": 3.0,
        "lower": 0.01,
        "upper": 0.03,
        "threshold": 1.64,
        "alpha": 0.025,
        "slices": {BAD: -0.5},
        "why": BAD,
    }
    return VerdictGiven.model_validate(fields | changes)


SHOWN = [
    pytest.param(card, id="card"),
    pytest.param(lambda: Policy(name=BAD[:64]), id="policy"),
    pytest.param(verdict, id="verdict"),
    pytest.param(lambda: Panel(title=BAD, lead=BAD, rows=[(BAD, BAD)], more=(BAD, BAD)), id="panel"),
]


def html_of(thing: Any) -> str:
    return str(thing.html() if isinstance(thing, Panel) else thing._repr_html_())


@pytest.mark.parametrize("make", SHOWN)
def test_html_escapes_whatever_people_and_data_sets_put_into_names(make: Any) -> None:
    text = html_of(make())
    assert set(re.findall(r"<([a-z]+)", text)) <= {
        "div",
        "strong",
        "p",
        "table",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "pre",
    }
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    assert not re.search(r"\s(on\w+|src|href)=", re.sub(r">[^<]*<", "><", text))


@pytest.mark.parametrize("make", SHOWN)
def test_rich_shows_it_and_reads_no_name_as_markup(make: Any) -> None:
    out = io.StringIO()
    console = pytest.importorskip("rich.console").Console(width=200, color_system=None, file=out)
    thing = make()
    console.print(thing.rich() if isinstance(thing, Panel) else thing)
    text = out.getvalue()
    assert "[bold red]loud[/]" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("make", SHOWN)
def test_without_rich_it_is_plain_text(make: Any) -> None:
    thing = make()
    text = thing.text() if isinstance(thing, Panel) else str(thing)
    assert "<script>" in text
    assert "\x1b" not in text


def test_nothing_of_the_planner_loads_rich() -> None:
    code = """
import sys
from automode import PlanCard, Policy
str(Policy()); Policy()._repr_html_()
print("rich" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"


def test_a_card_says_what_it_would_do() -> None:
    made = from_yaml(preset_text("cards/loss_plateau"))
    assert str(made).startswith("card c7e1cbc5, revision 1: fork for loss_plateau at step 2400")
    assert "2 drawn by tpe over lr_mul" in made._repr_html_()


def test_a_policy_shows_how_it_differs_from_the_default() -> None:
    text = str(
        Policy.model_validate({"name": "mine", "pacing": {"variants": 5}, "reasons": ["loss_plateau"]})
    )
    assert text.startswith("policy mine\n")
    assert re.search(r"pacing.variants +3 -> 5", text)
    assert "trend" not in text
    assert "in nothing from the default policy" in str(Policy())
    assert "<details>" in Policy()._repr_html_()


def test_a_verdict_shows_the_evidence_that_it_rests_on() -> None:
    text = str(verdict(card="c0ffee00", candidate="t1:fast", why="It is better.", slices={"rare": -0.5}))
    assert text.splitlines()[:2] == ["card c0ffee00: accepted", "  It is better."]
    assert "+0.02000 (from +0.01000 to +0.03000) on 200 held-out samples" in text
    assert "z 3.00" in text.replace("z           3.00", "z 3.00")
    assert "slice rare  z -0.50" in text
    nothing = str(verdict(n=0, candidate=None, slices={}, why="no candidate"))
    assert len(nothing.splitlines()) == 2
