"""``replay --policy``: which cards another policy would have proposed, when, how they differ, and where on the loss."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode.cli.loss_plot import Mark, MarkRow, curve_of, html_page, text_plot
from automode.errors import UsageError
from automode.planner.events import Envelope, Run, SessionStarted
from automode.planner.policy import PLANNER_VERSION, Policy
from automode.session import SessionStore
from automode.session.replaying import to_record


@pytest.fixture
def flat(live: Any) -> Any:
    """A run whose loss falls and then stands still, with one step that is not finite."""
    rng = np.random.default_rng(5)
    falling = 2.0 * np.exp(-np.arange(900) / 200.0) + 0.5
    loss = np.concatenate([falling, np.full(3000, falling[-1])]) * (1.0 + 0.02 * rng.standard_normal(3900))
    loss[300] = np.nan
    for first in range(0, 3900, 100):
        live.rows(100, loss[first : first + 100])
    live.end()
    return live


def eager(tmp_path: Path) -> Path:
    file = tmp_path / "eager.yaml"
    file.write_text("name: eager\nreasons: [loss_plateau]\ntrend: {gain: 0.05}\npacing: {variants: 5}\n")
    return file


def test_another_policy_is_compared_card_by_card(cli: Any, flat: Any, tmp_path: Path) -> None:
    out = cli("replay", flat.path, "--policy", eager(tmp_path)).output
    lines = out.splitlines()
    assert lines[0].split() == ["RECORDED", "WHAT", "IF", "ACTION", "REASON", "COST", "BECAUSE", "DIFFERS"]
    (plateau,) = [line for line in lines if " loss_plateau " in line][:1]
    recorded, other, action, *_ = plateau.split()
    assert action == "fork"
    assert int(other) < int(recorded)
    assert re.search(r"\d+ steps sooner; .*training_recipe.search.draws 2 -> 4", plateau)
    assert re.search(r"\d+ cards recorded, \d+ under .*eager.yaml", out)
    assert "counterfactual" not in out


def test_the_same_policy_differs_in_nothing(cli: Any, flat: Any) -> None:
    out = cli("replay", flat.path, "--policy", "default").output
    lines = [line for line in out.splitlines() if " loss_plateau " in line]
    assert lines
    for line in lines:
        recorded, other, *_ = line.split()
        assert recorded == other
        # In propose mode a card has to leave time for an answer; in a what-if nothing waits.
        assert set(re.findall(r"; (\S+) ", f"; {line.rpartition('  ')[2]}")) <= {
            "budget_steps",
            "asha.max_steps",
        }
    assert "a card there had to leave time for an answer, and nothing waits in a what-if" in out


@pytest.mark.parametrize("arguments", [[], ["--policy", "default"]])
def test_a_policy_of_another_version_is_named_and_no_traceback(
    cli: Any, tmp_path: Path, arguments: list[str]
) -> None:
    policy = Policy().dump()
    policy["pacing"]["max_running"] = 2
    started = SessionStarted(
        session="old",
        seed=1,
        mode="observe",
        asked_mode="observe",
        policy=policy,
        policy_digest=Policy().digest,
        planner_version=1,
        run=Run(total_steps=10, batch=1, val_a=1, val_b=1, task="classification"),
    )
    with SessionStore.create(tmp_path / "old", header={}) as store:
        store.write([to_record(Envelope(seq=1, role="input", body=started))], durable=True)
    out = cli("replay", tmp_path / "old", *arguments, code=1).output
    assert "`pacing.max_running`: Extra inputs are not permitted" in out
    assert "replay it with the automode that recorded it" in out


def test_the_loss_is_drawn_with_both_sets_of_cards(cli: Any, flat: Any, tmp_path: Path) -> None:
    out = cli("replay", flat.path, "--policy", eager(tmp_path)).output
    curve = [line for line in out.splitlines() if "|" in line]
    assert sum("*" in line for line in curve) > 5
    rows = {
        name: line
        for line in out.splitlines()
        for name in ("recorded", "what if")
        if line.strip().startswith(name)
    }
    assert all("^" in line for line in rows.values())
    assert rows["what if"].rindex("^") < rows["recorded"].rindex("^")
    assert "not finite |" in out


@pytest.mark.parametrize("ending", ["html", "svg"])
def test_the_plot_is_a_file_that_needs_nothing_else(cli: Any, flat: Any, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"loss.{ending}"
    out = cli("replay", flat.path, "--policy", eager(tmp_path), "--plot", file).output
    assert f"drawn to {file}" in out
    text = file.read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|<script|<link|@import|src=", text)
    picture = ET.fromstring(re.search(r"<svg.*</svg>", text, re.DOTALL).group())  # type: ignore[union-attr]
    told = [t.text for t in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert any(t.startswith("step ") and "loss_plateau" in t for t in told if t)
    assert {"recorded", "what if"} <= {t.text for t in picture.iter("{http://www.w3.org/2000/svg}text")}


def test_a_png_needs_matplotlib_and_says_so(cli: Any, flat: Any, tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    if importlib.util.find_spec("matplotlib") is None:
        out = cli("replay", flat.path, "--policy", "default", "--plot", file, code=1).output
        assert "pictures as .png need matplotlib (pip install matplotlib); .html and .svg need nothing" in out
        assert not file.exists()
    else:
        cli("replay", flat.path, "--policy", "default", "--plot", file)
        assert file.read_bytes().startswith(b"\x89PNG")


def test_what_plot_cannot_do_is_refused(cli: Any, flat: Any, tmp_path: Path) -> None:
    out = cli("replay", flat.path, "--plot", tmp_path / "loss.html", code=1).output
    assert "give --policy too" in out
    out = cli("replay", flat.path, "--policy", "default", "--plot", tmp_path / "loss.gif", code=1).output
    assert "--plot writes .html, .svg or .png (with matplotlib), and not '.gif'" in out
    out = cli("replay", flat.path, "--policy", "default", "--plot", tmp_path / "no" / "a.html", code=1).output
    assert "cannot be written" in out
    assert "did you mean default?" in cli("replay", flat.path, "--policy", "defautl", code=1).output


def test_cards_that_rest_on_scans_of_the_recorded_policy_are_told(
    cli: Any, flat: Any, tmp_path: Path
) -> None:
    out = cli("replay", flat.path, "--policy", "aggressive").output
    assert "* the session holds no scan, so that nothing can be said of high_loss_tail, label_noise" in out
    assert "\n* " not in cli("replay", flat.path, "--policy", eager(tmp_path)).output


def test_a_session_that_another_version_decided_is_told_to_be_a_what_if(
    cli: Any, live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.end()
    assert "what-if" not in cli("replay", live.path).output
    monkeypatch.setattr("automode.session.replaying.PLANNER_VERSION", PLANNER_VERSION + 1)
    out = cli("replay", live.path).output
    assert f"this is a what-if: version {PLANNER_VERSION} of the planner decided then, and version" in out


# ------------------------------------------------------------------------------------------------------------- the plot


def test_a_curve_is_sorted_into_buckets_of_steps() -> None:
    steps = np.arange(1.0, 101.0)
    curve = curve_of(steps, np.where(steps <= 50, 4.0, 1.0), 10)
    assert curve.middle.tolist() == [4.0] * 5 + [1.0] * 5
    assert (curve.place(1), curve.place(100), curve.place(1e9)) == (0.0, 1.0, 1.0)
    assert not curve.logarithmic
    assert curve_of(steps, 10.0 ** -(steps / 20), 10).logarithmic


def test_steps_that_fall_back_and_losses_that_are_not_finite_are_drawn_too() -> None:
    steps = np.concatenate([np.arange(1.0, 51.0), np.arange(20.0, 61.0)])
    losses = np.full(steps.size, np.nan)
    losses[60:] = 2.0
    curve = curve_of(steps, losses, 10)
    assert int(curve.broken.sum()) == 60
    assert np.isnan(curve.middle[0])
    assert curve.middle[-1] == 2.0
    assert "not finite |" in text_plot(steps, losses, [])
    assert "no finite loss" in text_plot(steps, np.full(steps.size, np.inf), [])


def test_one_step_is_a_plot_and_none_is_an_error() -> None:
    assert "*" in text_plot(np.array([1.0]), np.array([0.3]), [])
    with pytest.raises(UsageError, match="nothing to draw"):
        text_plot(np.empty(0), np.empty(0), [])


def test_what_people_typed_is_escaped_everywhere() -> None:
    bad = "<script>alert(1)</script>\x1b[31m"
    rows = [MarkRow(name=bad, marks=[Mark(step=5, label=bad, about=bad)])]
    steps = np.arange(1.0, 11.0)
    page = html_page(bad, steps, steps, rows, bad)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 5
    assert "\x1b" not in text_plot(steps, steps, rows)
