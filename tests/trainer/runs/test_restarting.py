"""Cards whose trials start from the run's first weights: on every backend, over a kill, a second time, adopted and rolled back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from automode.session import Session
from automode.testing.bench import identical
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

pytestmark = pytest.mark.torch

STEPS = 110
CARD = """
action: fork
because: The rate has ruined the network.
training_recipe:
  judged: tail
  variants: [{name: plain}, {name: anew, lr_mul: 30, restart: true}, {name: tenth, lr_mul: 3, restart: true}]
budget_steps: 9
asha: {reduction_factor: 3, max_steps: 27}
"""
ADJUSTMENT = """
action: adjust
because: To see what another card's end does.
adjustment: {clip_norm: 100.0}
"""
POLICY = {
    "reasons": ["learning_rate_probe", "merge_cadence"],
    "budget": "on_top",
    "probe": {"from": 0.5, "until": 0.6},  # the first weights are kept until then, and no rule asks for them
    "evidence": {"min_samples": 20, "z": 0.0, "alpha": 0.45},
    "averages": {"finish_at": 0.9},
}
Play = Callable[..., Any]


def restarted(play: Play, folder: Path, script: Any, **more: Any) -> Any:
    """A run in which a person hands a restarting card in."""
    actions = {12: lambda person: person.submit(CARD), 13: lambda person: person.approve()}
    given = {"actions": actions | more.pop("actions", {}), "policy": POLICY, "steps": STEPS} | more
    return play(folder, script=script, **given)


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(rate=0.003, norm=False, dropout=0.0)


@pytest.fixture(scope="module")
def left(run_once: Play, script: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run in which such a card was adopted, and what a kill between its two rungs would have left on disk."""
    folder = tmp_path_factory.mktemp("restarted")

    def leave(person: Any) -> None:
        fork = person.driver.state.fork
        if fork is not None and len(fork.reports) == 3 and not (folder / "left").exists():
            shutil.copytree(folder / "run", folder / "left")

    run = restarted(
        run_once, folder / "run", script, each=leave, checkpoint_every="3 steps", val_every_n_epochs=1
    )
    return run, folder / "left" / run.path.relative_to(folder / "run")


def reports(run: Any) -> dict[tuple[int, int], dict[str, Any]]:
    return {(r["trial"], r["resource"]): r for r in run.bodies("trial_reported")}


def test_a_restarted_trial_is_adopted_with_averages_that_begin_there_and_nothing_is_kept_after_the_end(
    left: tuple[Any, Path],
) -> None:
    run, _ = left
    (adopted, *_), (verdict, *_) = run.bodies("adopted"), run.bodies("verdict_given")
    assert verdict["candidate"] in ("t1:anew", "t2:tenth")
    weights, rest = run.checkpoint(adopted["checkpoint"])
    assert identical(run.at[adopted["step"]], weights)
    assert (rest["averages"]["updates"], rest["averages"]["every"]) == (0, 32)
    performer = run.driver.performer
    assert performer.trunk.first is None
    assert performer.best.step is None
    assert not performer.best.state()["weights"]
    assert performer.good.steps == ()


def test_the_first_weights_are_freed_when_the_window_closes(
    run_once: Play, script: Any, tmp_path: Path
) -> None:
    kept: dict[int, bool] = {}

    def look(person: Any) -> None:
        kept[person.step] = person.performer.trunk.first is not None

    run_once(tmp_path / "run", script=script, policy=POLICY, steps=60, each=look)
    assert [step for step, held in kept.items() if held] == list(range(1, 38))  # 36 is .6 of the run


def test_a_run_that_is_killed_between_the_rungs_of_a_restart_comes_to_the_same_end(
    left: tuple[Any, Path], script: Any, take_up: Callable[..., Any]
) -> None:
    run, path = left
    with Session.open(path) as session:
        assert len(list(session.events("trial_reported"))) < len(run.bodies("trial_reported"))
    result = take_up(path, run, script, steps=STEPS, val_every_n_epochs=1)
    assert identical(dict(result.model.state_dict()), run.final)
    with result.session as session:
        again = {(e.body["trial"], e.body["resource"]): e.body for e in session.events("trial_reported")}
        assert [e.body for e in session.events("verdict_given")] == run.bodies("verdict_given")
    for key, report in reports(run).items():
        for name in ("value", "choice", "checkpoint", "passes"):
            assert again[key][name] == report[name]


def test_such_a_card_is_run_again_with_the_same_outcome(
    left: tuple[Any, Path], script: Any, tmp_path: Path
) -> None:
    run, _ = left
    settings = Settings(
        automode="propose", max_steps=STEPS, seed=3, session_dir=tmp_path, console=False, val_every_n_epochs=1
    )
    order = Order(session=run.path, card=run.bodies("card_proposed")[0]["card"]["id"])
    done = execute(order, settings, FitRequest(**script.build()), None)
    assert done.same, done.text()
    told = {row.what for row in done.rows}
    assert {"trial 1 (anew) at 9, checkpoint", "control", "val-B, mean"} <= told


def test_restarts_train_together_with_what_goes_on_from_the_trunk(
    left: tuple[Any, Path], run_once: Play, script: Any, tmp_path: Path, group_sizes: list[int]
) -> None:
    run, _ = left
    together = restarted(run_once, tmp_path / "run", script, backend="stacked", val_every_n_epochs=1)
    assert 3 in group_sizes
    mine, theirs = reports(together), reports(run)
    assert mine.keys() == theirs.keys()
    for key, report in mine.items():
        assert report["value"] == pytest.approx(theirs[key]["value"], abs=1e-4)
    assert together.bodies("verdict_given")[0]["candidate"] == run.bodies("verdict_given")[0]["candidate"]


class Tied(nn.Module):
    """Two layers that share one weight, and running statistics between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two, self.head = (
            nn.Linear(6, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )
        self.two.weight = self.one.weight

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.two(torch.relu(self.norm(self.one(x))))))


def test_tied_weights_running_statistics_half_precision_and_adagrad_start_anew_too(
    run_once: Play, scripts: Any, tmp_path: Path
) -> None:
    """Adagrad holds sums from its making on, which a restart has to begin with."""
    script = scripts(rate=0.003, model=Tied)
    model = script.build()["model"]
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.001, initial_accumulator_value=0.1)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    run = restarted(
        run_once,
        tmp_path / "run",
        script,
        fit={"model": model, "optimizer": optimizer},
        precision="bf16",
    )
    assert not run.bodies("trial_failed")
    assert {(0, 9), (1, 9), (2, 9)} <= reports(run).keys()
    (base, *_) = (body for body in run.bodies("snapshotted") if body["purpose"] == "base")
    _, rest = run.checkpoint(base["checkpoint"])
    assert identical(rest["first"], first)
    assert all(torch.all(state["sum"] == 0.1) for state in rest["first_moments"].values())


def test_another_cards_end_does_not_slow_the_averages_that_a_card_is_judged_by(
    run_once: Play, script: Any, tmp_path: Path
) -> None:
    seen: dict[int, int] = {}

    def look(person: Any) -> None:
        seen[person.step] = person.performer.trunk.averages.every

    actions = {16: lambda person: person.submit(ADJUSTMENT), 17: lambda person: person.approve()}
    run = restarted(run_once, tmp_path / "run", script, each=look, actions=actions)
    assert "applied" in [move["after"] for move in run.bodies("card_moved")]
    controls = [body["step"] for body in run.bodies("snapshotted") if body["purpose"] == "control"]
    assert {seen[step] for step in range(20, controls[0])} == {2}
    assert seen[STEPS] == 32


def test_what_was_best_between_an_adoption_and_its_rollback_does_not_come_back(
    run_once: Play, script: Any, tmp_path: Path
) -> None:
    best: dict[int, int | None] = {}
    adopted: list[int] = []

    def each(person: Any) -> None:
        best[person.step] = person.performer.best.step
        if not adopted and person.cards and person.state(person.cards[0].id) == "adopted":
            adopted.append(person.adopted_at)
        if adopted and person.step == adopted[0] + 14:
            person.ask("rollback", person.cards[0].id)

    run = restarted(run_once, tmp_path / "run", script, each=each, val_every_n_epochs=1)
    (rolled,) = run.bodies("rolled_back")
    assert (best[rolled["step"]] or 0) > adopted[0]  # the adopted trunk had been the best until then
    after = {kept for step, kept in best.items() if step > rolled["step"]}
    assert all(kept is None or kept > rolled["step"] for kept in after), after
    assert best[STEPS] is not None  # and from then on the best is looked for anew
