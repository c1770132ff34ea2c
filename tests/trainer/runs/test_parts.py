"""Whole runs in which each slice, or each cluster, has a specialist of its own, and a router over them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode import replay
from automode.session import Session
from automode.session.artifacts import ArtifactStore
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

STEPS = 200
CARD = """
action: fork
because: Each to its own.
selection: {kind: slices, slices: [low, high]}
training_recipe: {variants: [{name: plain}], per_part: by_size, replay: 0.25}
gate_recipe: {kind: switch_softmax, epochs: 2}
merge_recipe: {kind: uniform}
budget_steps: 16
asha: {reduction_factor: 2, max_steps: 16}
"""
SLICES = {"low": lambda x, y: x[:, 0] < 0.5, "high": lambda x, y: x[:, 0] >= 0.5}


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(rate=0.01)


def sliced(script: Any) -> dict[str, Any]:
    return script.build() | {"slices": SLICES}


@pytest.fixture(scope="module")
def played(handed_in: Any, run_once: Any, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with a specialist for each of two slices, which hold about a third and two thirds of the samples."""
    drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def look(person: Any) -> None:
        data = person.data()
        drawn.update({trial: data.pools(data.recipe.variants[0], trial) for trial in (0, 1)})

    run = run_once(
        tmp_path_factory.mktemp("parts") / "run",
        script=script,
        fit={"slices": SLICES},
        policy={"budget": "on_top"},
        actions=handed_in(CARD) | {11: look},
        steps=STEPS,
    )
    run.drawn = drawn
    return run


def reports(run: Any) -> dict[int, Any]:
    return {r["trial"]: r for r in run.bodies("trial_reported")}


def test_each_slice_has_a_specialist_that_replays_the_others(played: Any, training: Any) -> None:
    low = np.flatnonzero(training().tensors[0][:, 0].numpy() < 0.5)
    high = np.setdiff1d(np.arange(150), low)
    (resolved,) = played.bodies("resolved")
    assert [(part["name"], part["n"]) for part in resolved["parts"]] == [
        ("low", low.size),
        ("high", high.size),
    ]
    store = ArtifactStore(played.path / "artifacts")
    assert store.get_ids(resolved["parts"][0]["artifact"]).tolist() == low.tolist()
    assert [pool.tolist() for pool in played.drawn[0]] == [low.tolist(), high.tolist()]
    assert [pool.tolist() for pool in played.drawn[1]] == [high.tolist(), low.tolist()]


def test_their_steps_go_by_size_and_the_control_goes_on_for_the_sum(played: Any) -> None:
    (resolved,) = played.bodies("resolved")
    found, sizes = reports(played), [part["n"] for part in resolved["parts"]]
    ways = [found[trial]["resource"] for trial in (0, 1)]
    assert sum(ways) == 32
    for way, size in zip(ways, sizes, strict=True):
        assert way == pytest.approx(32 * (0.15 + 0.7 * size / sum(sizes)), abs=1.5)
        assert way != 16
    for trial, way in enumerate(ways):  # its steps, and the judging of raw weights and three averages
        assert found[trial]["passes"] == way * 30 * 3 + 4 * 80 + 3 * 150
    (started,) = played.bodies("card_started")
    assert started["control_at"] - started["step"] >= 32


def test_only_what_they_make_together_is_a_candidate(played: Any) -> None:
    (verdict,) = played.bodies("verdict_given")
    assert verdict["candidate"] in ("mixture", "merge:uniform")
    (gate,) = played.bodies("gate_fitted")
    assert sorted(gate["experts"]) == ["control", "high", "low"]
    assert len(gate["loads"]) == 3


def test_the_same_card_trains_the_same_specialists_again(played: Any, script: Any) -> None:
    wanted = played.bodies("card_proposed")[0]["card"]["id"]
    settings = Settings(automode="propose", max_steps=STEPS, seed=3, session_dir=played.folder, console=False)
    done = execute(Order(session=played.path, card=wanted), settings, FitRequest(**sliced(script)), None)
    assert done.same, done.text()
    assert {"router", "merge by uniform"} <= {row.what for row in done.rows}


def test_a_backend_that_stacks_trains_the_same(
    handed_in: Any, played: Any, play_run: Any, script: Any
) -> None:
    away = play_run(
        script=script,
        fit={"slices": SLICES},
        policy={"budget": "on_top"},
        actions=handed_in(CARD),
        steps=STEPS,
        backend="stacked",
    )
    theirs, mine = reports(away), reports(played)
    for trial, report in mine.items():
        for name in ("resource", "choice", "passes"):
            assert theirs[trial][name] == report[name]
        assert theirs[trial]["value"] == pytest.approx(report["value"], abs=1e-4)


def test_parts_of_one_size_walk_their_own_samples_when_they_are_stacked(
    handed_in: Any, play_run: Any, script: Any, group_sizes: list[int]
) -> None:
    text = CARD.replace("by_size", "equal").replace("16", "24")
    plain = type(script)(rate=0.01, norm=False, dropout=0.0)
    common = {"script": plain, "fit": {"slices": SLICES}, "policy": {"budget": "on_top"}, "steps": STEPS}
    together = play_run(actions=handed_in(text), backend="stacked", **common)
    assert max(group_sizes) == 2
    alone = play_run(actions=handed_in(text), **common)
    for trial, report in reports(alone).items():
        assert reports(together)[trial]["value"] == pytest.approx(report["value"], abs=1e-4)
    assert reports(alone)[0]["value"] != reports(alone)[1]["value"]


def test_clusters_of_the_loss_have_specialists_too_and_a_killed_run_comes_to_the_same_end(
    handed_in: Any, script: Any, run_once: Any, take_up: Any, tmp_path: Path
) -> None:
    text = CARD.replace(
        "{kind: slices, slices: [low, high]}", "{kind: kmeans, feature: loss, k: 3, clusters: [0, 2]}"
    )
    left: list[int] = []

    def leave(person: Any) -> None:  # what is on disk now is what a kill leaves
        shutil.copytree(tmp_path / "run", tmp_path / "left")
        left.append(len(person.driver.state.fork.reports))

    run = run_once(
        tmp_path / "run",
        script=script,
        policy={"budget": "on_top"},
        actions=handed_in(text) | {14: leave},
        steps=STEPS,
        checkpoint_every="6 steps",
    )
    assert left[0] < 2
    path = tmp_path / "left" / run.path.relative_to(tmp_path / "run")
    take_up(path, run, script, steps=STEPS).session.close()
    with Session.open(path) as session:
        verdicts = [e.body for e in session.events("verdict_given")]
        again = {e.body["trial"]: e.body for e in session.events("trial_reported")}
    assert replay(path).differences == 0
    assert verdicts == run.bodies("verdict_given")
    assert [part["name"] for part in run.bodies("resolved")[0]["parts"]] == ["cluster 0", "cluster 2"]
    for trial, report in reports(run).items():
        assert again[trial]["checkpoint"] == report["checkpoint"]


def test_a_part_without_training_samples_fails_the_card_before_anything_is_trained(
    handed_in: Any, play_run: Any, script: Any
) -> None:
    text = CARD.replace("replay: 0.25", "exclude: {kind: slices, slices: [low]}")
    run = play_run(
        script=script,
        fit={"slices": SLICES},
        policy={"budget": "on_top"},
        actions=handed_in(text),
        steps=STEPS,
    )
    assert run.states()[-1] == "failed"
    assert "low holds no training sample" in run.why()
    assert not run.bodies("start_trial")
