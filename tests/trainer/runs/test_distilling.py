"""Cards that distil: the student, what it costs, what it leaves alone, and what becomes of one that was cut off."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from automode import story
from automode.planner.events import Adopt, Weights
from automode.session import Session
from automode.session.checkpoints import CheckpointStore
from automode.testing.bench import identical
from automode.trainer import distilling
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

STEPS = 190
ROWS, VAL_A, REFRESH = 30, 80, 150
"""Rows of a batch, samples of val-A, and training samples that recompute norm statistics, of the script."""

ENSEMBLE = "{kind: distill, steps: 40, lr_mul: 30, temperature: 1.0}"


def card(merge: str, more: str = "") -> str:
    """A person's card as YAML: two specialists of one rung, and one network that they teach."""
    return f"""
action: fork
because: The trunk hardly moves.
training_recipe:
  variants: [{{name: fast, lr_mul: 30}}, {{name: faster, lr_mul: 60}}]
budget_steps: 12
asha: {{reduction_factor: 3, max_steps: 12}}
merge_recipe: {merge}
{more}
"""


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(rate=0.003)


@pytest.fixture(scope="module")
def played(handed_in: Any, run_once: Any, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run in which control and specialists teach as an ensemble."""
    return run_once(
        tmp_path_factory.mktemp("distilled") / "run",
        script=script,
        policy={"budget": "on_top"},
        actions=handed_in(card(ENSEMBLE)),
        steps=STEPS,
        checkpoint_every="40 steps",
    )


def test_the_student_and_its_teachers_are_paid_to_the_last_sample(played: Any) -> None:
    (made,) = played.bodies("merged")
    assert made["members"] == ["control", "expert 1", "expert 2"]
    # A step trains on its rows and asks three teachers about them; raw weights and three averages are judged.
    assert made["passes"] == 40 * ROWS * (3 + 3) + 4 * VAL_A + 3 * REFRESH
    (started,) = played.bodies("card_started")
    # The control has what both specialists, the student and its teachers have had together.
    assert started["control_at"] == started["step"] + 2 * 12 + 40 * (3 + 3) // 3
    (name,) = [name for name in played.result.compute if name.strip().endswith(": merge")]
    assert played.result.compute[name] == made["passes"]


def test_the_student_comes_closer_to_its_teachers_and_is_judged_like_every_candidate(played: Any) -> None:
    (made,) = played.bodies("merged")
    first, last = (float(word) for word in made["why"].split() if word[0].isdigit())
    assert last < 0.7 * first
    assert made["why"] in story(played.path, made["card"])
    (_, control) = played.bodies("snapshotted")
    best = max([made["value"], *(r["value"] for r in played.bodies("trial_reported"))])
    looked = [command["candidate"] for command in played.bodies("evaluate")]
    assert len(looked) == (best > control["value"])
    assert ("merge:distill" in looked) == (made["value"] == best > control["value"])


def test_the_trunk_does_not_notice(played: Any, run_once: Any, script: Any, tmp_path: Path) -> None:
    watched = run_once(tmp_path / "watched", automode="observe", script=script, steps=STEPS)
    assert played.states()[-1] in ("inconclusive", "rejected"), "an adopted card changes the trunk"
    assert all(identical(mine, theirs) for mine, theirs in zip(played.after, watched.after, strict=True))
    assert played.losses == watched.losses


def test_an_adopted_student_is_the_trunk_as_it_was_judged(played: Any) -> None:
    (made,) = played.bodies("merged")
    weights = Weights.model_validate(made["weights"])
    performer = played.driver.performer
    judged, _, _ = performer.states.model(weights)
    plan = next(iter(played.driver.state.cards.values())).card
    before = {name: value.clone() for name, value in performer.trunk.model.state_dict().items()}
    assert not identical(before, dict(judged.state_dict()))
    order = Adopt(card=plan.id, candidate="merge:distill", weights=weights, into="trunk")
    try:
        performer.adopt(plan, order, STEPS)
        assert identical(dict(performer.trunk.model.state_dict()), dict(judged.state_dict()))
        assert performer.trunk.averages.updates == 0  # another trajectory begins
    finally:
        performer.trunk.model.load_state_dict(before)


def test_the_same_card_gives_the_same_student_again(played: Any, script: Any) -> None:
    wanted = played.bodies("card_proposed")[0]["card"]["id"]
    settings = Settings(automode="propose", max_steps=STEPS, seed=3, session_dir=played.folder, console=False)
    done = execute(Order(session=played.path, card=wanted), settings, FitRequest(**script.build()), None)
    assert done.same, done.text()
    assert {"merge by distill", "merge by distill, weights chosen"} <= {row.what for row in done.rows}


def test_a_mixture_teaches_once_its_router_is_fitted(handed_in: Any, play_run: Any, script: Any) -> None:
    text = card(
        "{kind: distill, steps: 10, teacher: mixture, student: specialist}",
        "gate_recipe: {kind: switch_softmax, epochs: 2}",
    )
    run = play_run(script=script, policy={"budget": "on_top"}, actions=handed_in(text), steps=STEPS)
    (fitted,), (made,) = run.bodies("gate_fitted"), run.bodies("merged")
    with Session.open(run.path) as session:
        (asked,) = [e.body for e in session.events("merge") if e.role == "command"]
    assert asked["gate"] == fitted["checkpoint"]
    assert math.isfinite(made["value"])
    weights, _ = run.checkpoint(made["weights"]["checkpoint"])
    best = max(run.bodies("trial_reported"), key=lambda r: r["value"])
    start, _ = run.checkpoint(best["checkpoint"])
    (_, control) = run.bodies("snapshotted")
    other, _ = run.checkpoint(control["checkpoint"])

    def far(state: Any) -> float:
        return max(
            float((weights[k].double() - state[k].double()).abs().max()) for k in ("0.weight", "4.weight")
        )

    assert 0.0 < far(start) < 0.3 * far(other)


def test_a_student_that_diverges_is_paid_for_and_left_out(handed_in: Any, play_run: Any, script: Any) -> None:
    text = card("{kind: distill, steps: 12, lr_mul: 10000}")
    values = {"norm": False, "dropout": 0.0, "rate": 3.0}
    run = play_run(
        script=type(script)(**values),
        policy={"budget": "on_top", "safeguards": {"skip_nonfinite": False}},
        actions=handed_in(text.replace("lr_mul: 30", "lr_mul: 0.001").replace("lr_mul: 60", "lr_mul: 0.002")),
        steps=120,
    )
    (made,) = run.bodies("merged")
    assert made["value"] is None or math.isnan(float(made["value"]))
    assert "lower" in made["why"]
    assert made["passes"] == 12 * ROWS * (3 + 3)
    assert run.states()[-1] != "failed"
    assert all(command["candidate"] != "merge:distill" for command in run.bodies("evaluate"))


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_student_that_was_cut_off_is_trained_again_and_comes_out_the_same(
    handed_in: Any,
    played: Any,
    script: Any,
    tmp_path: Path,
    run_once: Callable[..., Any],
    take_up: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = 0
    train = distilling.Distiller._train

    def cut(self: Any, student: Any, teacher: Any, *rest: Any) -> Any:
        def teach(batch: Any) -> torch.Tensor:
            nonlocal steps
            steps += 1
            if steps == 20:  # what is on disk now is what a kill leaves
                shutil.copytree(tmp_path / "cut", tmp_path / "left")
                raise Killed
            answer: torch.Tensor = teacher(batch)
            return answer

        teach.passes = teacher.passes  # type: ignore[attr-defined]
        return train(self, student, teach, *rest)  # type: ignore[arg-type]

    kept: list[Any] = []
    monkeypatch.setattr(distilling.Distiller, "_train", cut)
    terms = {"script": script, "policy": {"budget": "on_top"}, "actions": handed_in(card(ENSEMBLE))}
    with pytest.raises(Killed):
        run_once(tmp_path / "cut", steps=STEPS, checkpoint_every="40 steps", keep=kept, **terms)
    monkeypatch.undo()
    path = tmp_path / "left" / kept[0].path.relative_to(tmp_path / "cut")
    with Session.open(path) as session:
        assert not list(session.events("merged"))
    take_up(path, played, script, steps=STEPS, checkpoint_every="40 steps").session.close()
    with Session.open(path) as session:
        (again,) = [event.body for event in session.events("merged")]
    (first,) = played.bodies("merged")
    names = ("members", "value", "why", "step", "passes")
    assert [again[name] for name in names] == [first[name] for name in names]
    assert again["weights"]["choice"] == first["weights"]["choice"]
    mine, _, _ = CheckpointStore(path / "checkpoints").load(again["weights"]["checkpoint"])
    assert identical(mine, played.checkpoint(first["weights"]["checkpoint"])[0])
