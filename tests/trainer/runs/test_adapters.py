"""Cards whose specialists train low-rank adapters: run, fused, adopted, run again, and refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from automode.session import Session
from automode.testing.bench import identical
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

STEPS = 120
VARIANTS = """
    - {name: all, lr_mul: 60, adapter: {rank: 3, alpha: 3}}
    - {name: head, lr_mul: 90, adapter: {rank: 2, alpha: 2, targets: ["4"]}}"""


def card(merge: str = "null", variants: str = VARIANTS) -> str:
    return f"""
action: fork
because: The trunk hardly moves.
training_recipe:
  variants: {variants}
budget_steps: 12
asha: {{reduction_factor: 2, max_steps: 24}}
merge_recipe: {merge}
"""


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(rate=0.003)


FUSED = card("{kind: adapter_fuse, weights: [0.3, 1.0]}").replace("budget_steps: 12", "budget_steps: 24")


@pytest.fixture(scope="module")
def played(handed_in: Any, run_once: Any, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run in which two adapters are fused."""
    return run_once(
        tmp_path_factory.mktemp("adapters") / "run",
        script=script,
        policy={"budget": "on_top", "averages": {"enabled": False}},
        actions=handed_in(FUSED),
        steps=STEPS,
    )


def test_the_fused_state_is_the_fork_with_the_sum_of_the_deltas(played: Any) -> None:
    (made,) = played.bodies("merged")
    base, _ = played.checkpoint(played.bodies("snapshotted")[0]["checkpoint"])
    members = [played.checkpoint(r["checkpoint"])[0] for r in played.bodies("trial_reported")]
    state, _ = played.checkpoint(made["weights"]["checkpoint"])
    deltas = {name: sum(m[name] - base[name] for m in members) for name in ("0.weight", "4.weight")}
    fits = [
        all(torch.allclose(state[n], base[n] + w * deltas[n], atol=1e-5) for n in deltas) for w in (0.3, 1.0)
    ]
    assert sum(fits) == 1
    assert made["why"] == f"each of 2 deltas times {(0.3, 1.0)[fits.index(True)]:g}"
    for name in ("0.bias", "1.weight", "4.bias"):  # what no adapter touches is the fork's
        assert torch.equal(state[name], base[name])
    assert not torch.equal(state["1.running_mean"], base["1.running_mean"])  # recomputed for the sum
    # Two weights are tried, each with norm statistics of its own; those of the chosen one once more.
    assert made["passes"] == 2 * (80 + 150) + 150
    (started,) = played.bodies("card_started")
    assert started["control_at"] == started["step"] + 2 * 24


def test_the_same_card_gives_the_same_fusion_again(played: Any, script: Any) -> None:
    wanted = played.bodies("card_proposed")[0]["card"]["id"]
    settings = Settings(
        automode="propose",
        max_steps=STEPS,
        seed=3,
        session_dir=played.folder,
        console=False,
        policy={"averages": {"enabled": False}},
    )
    done = execute(Order(session=played.path, card=wanted), settings, FitRequest(**script.build()), None)
    assert done.same, done.text()
    assert "merge by adapter_fuse" in {row.what for row in done.rows}


def test_an_adopted_adapter_brings_its_merged_weights_and_leaves_rates_and_moments_alone(
    handed_in: Any, play_run: Any, script: Any
) -> None:
    variants = "[{name: low, lr_mul: 200, adapter: {rank: 3, alpha: 3}}]"
    run = play_run(
        script=type(script)(rate=0.003, norm=False, dropout=0.0),
        policy={"budget": "on_top"},
        actions=handed_in(card(variants=variants), at=2),
        steps=160,
    )
    (adopted,), (report, *_) = run.bodies("adopted"), run.bodies("trial_reported")[::-1]
    assert run.states()[-1] == "adopted"
    if report["choice"] == "raw":
        assert identical(run.at[adopted["step"]], run.checkpoint(report["checkpoint"])[0])
    before, after = (run.checkpoint(adopted[name])[1] for name in ("before", "checkpoint"))
    assert identical(before["optimizer"], after["optimizer"])
    assert len(run.after) == 160  # and the run went on from there
    assert not identical(run.after[-1], run.at[adopted["step"]])


def test_layers_that_the_model_lacks_fail_the_card_before_anything_is_trained(
    handed_in: Any, play_run: Any, script: Any
) -> None:
    variants = '[{name: low, adapter: {rank: 2, targets: ["decoder.*"]}}]'
    run = play_run(
        script=script, policy={"budget": "on_top"}, actions=handed_in(card(variants=variants)), steps=STEPS
    )
    assert run.states() == ["approved", "running", "failed"]
    assert "'decoder.*' names no linear layer of the model; it has 0, 4" in run.why()
    assert not run.bodies("trial_reported")
    assert run.bodies("budget_released")[0]["spent"] == 0


def test_a_backend_that_stacks_trains_adapters_alone_and_alike(
    handed_in: Any, played: Any, run_once: Any, script: Any, tmp_path: Any
) -> None:
    away = run_once(
        tmp_path / "away",
        script=script,
        policy={"budget": "on_top", "averages": {"enabled": False}},
        actions=handed_in(FUSED),
        steps=STEPS,
        backend="stacked",
    )
    theirs, mine = ({r["trial"]: r for r in run.bodies("trial_reported")} for run in (away, played))
    for trial, report in mine.items():
        assert theirs[trial]["value"] == report["value"]
        assert identical(
            away.checkpoint(theirs[trial]["checkpoint"])[0], played.checkpoint(report["checkpoint"])[0]
        )
    assert any("it trains adapters" in note["why"] for note in away.bodies("trials_noted"))


def test_a_run_that_is_killed_between_two_rungs_of_its_adapters_comes_to_the_same_end(
    handed_in: Any, script: Any, run_once: Any, take_up: Any, tmp_path: Path
) -> None:
    def leave(person: Any) -> None:  # what is on disk as the second rung is trained is what a kill leaves
        fork, there = person.driver.state.fork, (tmp_path / "left").exists()
        if fork is not None and fork.reports and not there and "promoted" in decisions(person):
            shutil.copytree(tmp_path / "run", tmp_path / "left")

    def decisions(person: Any) -> list[str]:
        with Session.open(person.path) as session:
            return [e.body["decision"] for e in session.events("trial_decided")]

    run = run_once(
        tmp_path / "run",
        script=script,
        policy={"budget": "on_top"},
        actions=handed_in(card()),
        each=leave,
        steps=STEPS,
        checkpoint_every="3 steps",
    )
    path = tmp_path / "left" / run.path.relative_to(tmp_path / "run")
    with Session.open(path) as session:
        assert 2 <= len(list(session.events("trial_reported"))) < len(run.bodies("trial_reported"))
    take_up(path, run, script, steps=STEPS).session.close()
    with Session.open(path) as session:
        again = {(e.body["trial"], e.body["resource"]): e.body for e in session.events("trial_reported")}
        assert [e.body for e in session.events("verdict_given")] == run.bodies("verdict_given")
    for report in run.bodies("trial_reported"):
        mine = again[report["trial"], report["resource"]]
        for name in ("value", "choice", "checkpoint", "passes"):
            assert mine[name] == report[name]
