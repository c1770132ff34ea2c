"""Cards whose specialists anneal: they are judged against a control that anneals alike, and against the trunk besides."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode import replay
from automode.planner.variants import ANNEALED_CONTROL, Variant
from automode.session import Session
from automode.testing.bench import identical
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings
from automode.trainer.specialists import SpecialistSegment

STEPS = 200
CARD = """
action: fork
because: The end of a plateau.
training_recipe:
  variants: [{name: low, lr_mul: 0.01, schedule: anneal}, {name: fast, lr_mul: 30, schedule: anneal}]
  exclude: {kind: indices, ids: [0, 1, 2, 3, 4]}
  early_stopping: {patience: 1, min_delta: 100.0}
budget_steps: 12
asha: {reduction_factor: 2, max_steps: 24}
"""


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(rate=0.003)


@pytest.fixture(scope="module")
def played(handed_in: Any, run_once: Any, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of such a card, without early stopping."""
    return run_once(
        tmp_path_factory.mktemp("annealed") / "run",
        script=script,
        policy={"budget": "on_top"},
        actions=handed_in(CARD.replace("  early_stopping: {patience: 1, min_delta: 100.0}\n", "")),
        steps=STEPS,
    )


def reports(run: Any) -> dict[tuple[int, int], Any]:
    return {(r["trial"], r["resource"]): r for r in run.bodies("trial_reported")}


def test_the_control_is_one_trial_more_from_the_fork_to_the_top_with_the_anneal_alone(played: Any) -> None:
    with Session.open(played.path) as session:
        asked = [e.body for e in session.events("start_trial") if e.body["trial"] == 2]
    (control,) = asked
    assert control["variant"] == Variant(name="control annealed", schedule="anneal").model_dump(mode="json")
    assert (control["from_resource"], control["to_resource"]) == (0, 24)
    base = played.bodies("snapshotted")[0]["checkpoint"]
    assert control["checkpoint"] == base
    told = [d["decision"] for d in played.bodies("trial_decided") if d["trial"] == 2]
    assert told == ["started", "finished"]
    rest = played.checkpoint(reports(played)[2, 24]["checkpoint"])[1]
    assert rest["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.003 / 24)  # the last step's
    (started,) = played.bodies("card_started")
    assert started["control_at"] == started["step"] + 24


def test_it_is_paid_like_an_arm(played: Any) -> None:
    mine = reports(played)[2, 24]
    # Its steps, and the judging of raw weights and three averages with norm statistics of their own.
    assert mine["passes"] == 24 * 30 * 3 + 4 * 80 + 3 * 150
    (name,) = [name for name in played.result.compute if name.strip().endswith("trial 2")]
    assert played.result.compute[name] == mine["passes"]


def test_the_candidate_is_judged_against_it_where_it_is_above_both_controls(played: Any) -> None:
    found = reports(played)
    (_, trunk) = played.bodies("snapshotted")
    best = max(found[key]["value"] for key in found if key[0] < 2 and key[1] == 24)
    looked = played.bodies("evaluate")
    assert len(looked) == 1 == (best > max(found[2, 24]["value"], trunk["value"]))
    assert looked[0]["control"]["checkpoint"] == found[2, 24]["checkpoint"]
    if played.states()[-1] == "adopted":
        assert played.why().endswith("which warms the annealed weights up again")


def test_it_trains_on_what_the_trunk_trains_on(
    handed_in: Any, play_run: Any, script: Any, played: Any
) -> None:
    """What the card leaves out, the trunk does not; nor does a control stop early."""
    drawn: dict[int, set[int]] = {}

    def look(person: Any) -> None:
        runner = person.performer.runner
        for data in runner.cards.values():
            for trial, variant in ((2, None), (0, data.recipe.variants[0])):
                pools = data.pools(variant or ANNEALED_CONTROL)
                drawn[trial] = set(np.concatenate(pools).tolist())

    run = play_run(
        script=script, policy={"budget": "on_top"}, actions=handed_in(CARD) | {11: look}, steps=STEPS
    )
    assert drawn[2] == set(range(150))
    assert drawn[0] == set(range(5, 150))
    found = reports(run)
    assert found[0, 12]["stopped_early"]
    assert not found[2, 24]["stopped_early"]
    assert found[2, 24]["value"] == reports(played)[2, 24]["value"]


def test_the_same_card_gives_the_same_control_again(played: Any, script: Any) -> None:
    wanted = played.bodies("card_proposed")[0]["card"]["id"]
    settings = Settings(automode="propose", max_steps=STEPS, seed=3, session_dir=played.folder, console=False)
    done = execute(Order(session=played.path, card=wanted), settings, FitRequest(**script.build()), None)
    assert done.same, done.text()
    assert "trial 2 (control annealed) at 24" in {row.what for row in done.rows}


@pytest.mark.parametrize("times", [1, 2])
def test_a_control_that_fails_is_tried_once_more_and_then_the_card_ends(
    handed_in: Any, times: int, play_run: Any, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = times
    train = SpecialistSegment._step

    def step(self: Any) -> None:
        nonlocal left
        if left and self._job.variant.name == "control annealed":
            left -= 1
            raise OSError("the disk is away")
        train(self)

    monkeypatch.setattr(SpecialistSegment, "_step", step)
    run = play_run(script=script, policy={"budget": "on_top"}, actions=handed_in(CARD), steps=STEPS)
    told = [d["decision"] for d in run.bodies("trial_decided") if d["trial"] == 2]
    if times == 1:
        assert told == ["started", "requeued", "finished"]
        assert run.states()[-1] in ("inconclusive", "rejected", "adopted")
    else:
        assert told == ["started", "requeued", "lost"]
        assert run.states()[-1] == "failed"
        assert "the annealed control could not be trained: OSError: the disk is away" in run.why()
    assert run.result.steps == STEPS


def test_an_anneal_alone_is_no_gain(handed_in: Any, play_run: Any, script: Any) -> None:
    """A variant that is its own control: equal bit by bit, so that it is never looked at."""
    text = CARD.replace(
        "{name: low, lr_mul: 0.01, schedule: anneal}, {name: fast, lr_mul: 30, schedule: anneal}",
        "{name: same, schedule: anneal}",
    )
    text = text.replace("  exclude: {kind: indices, ids: [0, 1, 2, 3, 4]}\n", "").replace(
        "  early_stopping: {patience: 1, min_delta: 100.0}\n", ""
    )
    run = play_run(
        script=type(script)(rate=0.1), policy={"budget": "on_top"}, actions=handed_in(text), steps=STEPS
    )
    found = reports(run)
    assert found[0, 24]["value"] == found[1, 24]["value"]
    mine, control = (run.checkpoint(found[trial, 24]["checkpoint"])[0] for trial in (0, 1))
    assert identical(mine, control)
    assert run.states()[-1] == "inconclusive"
    assert not run.bodies("evaluate")


def test_a_run_that_is_killed_while_its_control_anneals_comes_to_the_same_end(
    handed_in: Any, script: Any, run_once: Any, take_up: Any, tmp_path: Path
) -> None:
    left: list[int] = []

    def leave(person: Any) -> None:  # what is on disk now is what a kill leaves
        shutil.copytree(tmp_path / "run", tmp_path / "left")
        left.append(person.driver.state.fork.control_attempt)
        assert person.driver.state.fork.annealed is None

    run = run_once(
        tmp_path / "run",
        script=script,
        policy={"budget": "on_top"},
        actions=handed_in(CARD) | {14: leave},
        steps=STEPS,
        checkpoint_every="3 steps",
    )
    assert left == [1]
    path = tmp_path / "left" / run.path.relative_to(tmp_path / "run")
    take_up(path, run, script, steps=STEPS).session.close()
    with Session.open(path) as session:
        verdicts = [e.body for e in session.events("verdict_given")]
        again = {(e.body["trial"], e.body["resource"]): e.body for e in session.events("trial_reported")}
    assert replay(path).differences == 0
    assert verdicts == run.bodies("verdict_given")
    for key, report in reports(run).items():
        for name in ("value", "choice", "checkpoint", "passes"):
            assert again[key][name] == report[name]
