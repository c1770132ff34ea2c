"""A card whose trial takes several steps on each batch: adopted, the trunk does too, over a kill, a second card, and back again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from automode import Policy, Trainer
from automode.session import Session
from automode.testing.bench import identical
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

pytestmark = pytest.mark.torch

STEPS, ROWS = 110, 8
CARD = """
action: fork
because: There are few steps.
training_recipe:
  judged: tail
  variants: [{name: often, updates: 4, lr_mul: 2}]
budget_steps: 8
asha: {reduction_factor: 3, max_steps: 8}
"""
POLICY = {
    "budget": "on_top",
    "evidence": {"min_samples": 20, "z": 0.0, "alpha": 0.45},
    "diagnostics": {"enabled": False},
}
Play = Callable[..., Any]


class Grouped(BatchSampler):
    """Makes batches of its own kind."""


def handed(play: Play, folder: Path, script: Any, **more: Any) -> Any:
    actions = {12: lambda person: person.submit(CARD), 13: lambda person: person.approve()}
    given = {"actions": actions, "policy": POLICY, "steps": STEPS, "checkpoint_every": "10 steps"} | more
    return play(folder, script=script, **given)


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(
        rate=0.003, norm=False, dropout=0.0, optimizer="adam", scheduler=lambda o: CosineAnnealingLR(o, STEPS)
    )


@pytest.fixture(scope="module")
def left(run_once: Play, script: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run in which such a card was adopted, and what a kill some steps later would have left on disk."""
    folder = tmp_path_factory.mktemp("divided")

    def leave(person: Any) -> None:
        if person.driver.performer.trunk.step == 60 and not (folder / "left").exists():
            shutil.copytree(folder / "run", folder / "left")

    run = handed(run_once, folder / "run", script, each=leave)
    return run, folder / "left" / run.path.relative_to(folder / "run")


def test_once_adopted_every_batch_is_taken_in_as_many_steps_and_the_runs_clock_goes_by_batches(
    left: tuple[Any, Path],
) -> None:
    run, _ = left
    assert run.states()[-1] == "adopted"
    assert run.why().endswith("; each batch is trained on with 4 steps from here on")
    (adopted,) = run.bodies("adopted")
    assert run.driver.performer.trunk.part_rows == ROWS
    assert run.result.steps == STEPS
    rows = run.column("step")
    assert rows == [float(k + 1) for k in range(STEPS)]
    # The last of an epoch's batches has 22 rows: three parts.
    batches = [22 if k % 5 == 4 else 32 for k in range(STEPS)]
    taken = sum(1 if k < adopted["step"] else round(n / ROWS) for k, n in enumerate(batches))
    assert len(run.after) == taken
    of_trial = run.checkpoint(run.bodies("trial_reported")[-1]["checkpoint"])[1]["optimizer"]["state"][0][
        "step"
    ]
    final = run.made["optimizer"].state_dict()["state"][0]["step"]
    assert float(final) == float(of_trial) + sum(round(n / ROWS) for n in batches[adopted["step"] :])
    # Twice the rate, on the schedule of the steps that the user asked for.
    cosine = [0.003 * (1 + math.cos(math.pi * (k // 5) / STEPS)) / 2 for k in range(STEPS)]
    rates = run.column("lr_0")
    assert rates[: adopted["step"]] == pytest.approx(cosine[: adopted["step"]], rel=1e-4)
    assert rates[adopted["step"] :] == pytest.approx(
        [2 * r for r in cosine[adopted["step"] :]], rel=1e-3, abs=1e-8
    )


def test_the_ledger_still_sees_every_sample_of_a_divided_batch(left: tuple[Any, Path]) -> None:
    run, _ = left
    counts = run.driver.performer.scanner.ledger().column("count", torch.arange(150).numpy())
    assert counts.min() >= STEPS // 5 - 1


def test_a_run_that_is_killed_after_the_adoption_comes_to_the_same_end(
    left: tuple[Any, Path], script: Any, take_up: Callable[..., Any]
) -> None:
    run, path = left
    result = take_up(path, run, script, steps=STEPS)
    assert identical(dict(result.model.state_dict()), run.final)
    with result.session as session:
        assert session.frame("loss").tolist() == run.column("loss")


def test_such_a_card_is_run_again_with_the_same_outcome(
    left: tuple[Any, Path], script: Any, tmp_path: Path
) -> None:
    run, _ = left
    settings = Settings(automode="propose", max_steps=STEPS, seed=3, session_dir=tmp_path, console=False)
    order = Order(session=run.path, card=run.bodies("card_proposed")[0]["card"]["id"])
    done = execute(order, settings, FitRequest(**script.build()), None)
    assert done.same, done.text()


def test_rolled_back_batches_are_whole_again_and_a_second_card_divides_the_parts(
    play_run: Any, script: Any
) -> None:
    seen: dict[str, int | None] = {}

    def each(person: Any) -> None:
        trunk = person.performer.trunk
        if not person.cards:
            return
        if len(person.cards) == 1 and person.state() == "adopted" and "first" not in seen:
            seen["first"] = trunk.part_rows
            person.submit(CARD.replace("updates: 4", "updates: 2"))
        elif len(person.cards) == 2 and person.state() == "proposed" and "asked" not in seen:
            seen["asked"] = None
            person.approve()
        elif len(person.cards) == 2 and person.state() == "adopted" and "second" not in seen:
            seen["second"] = trunk.part_rows
            person.ask("rollback", person.cards[-1].id)
        elif len(person.cards) == 2 and person.state() == "rolled_back":
            seen["back"] = trunk.part_rows

    run = play_run(
        script=script,
        policy=POLICY,
        steps=160,
        actions={12: lambda person: person.submit(CARD), 13: lambda person: person.approve()},
        each=each,
    )
    assert seen == {"first": ROWS, "asked": None, "second": ROWS // 2, "back": ROWS}
    assert run.states(run.bodies("card_proposed")[1]["card"]["id"])[-1] == "rolled_back"


def test_a_batch_sampler_of_ones_own_is_never_divided(play_run: Any, script: Any, training: Any) -> None:
    own = Grouped(RandomSampler(training(), generator=torch.Generator().manual_seed(6)), 30, drop_last=False)
    run = play_run(
        script=script,
        fit={"train_loader": DataLoader(training(), batch_sampler=own)},
        actions={2: lambda person: person.submit(CARD)},
        steps=20,
    )
    (refused,) = run.bodies("request_refused")
    assert (
        "updates trains on each batch in parts, and its batches are put together by a Grouped"
        in refused["why"]
    )


def test_a_short_run_on_large_batches_is_asked_whether_it_wants_more_steps(
    held_out_samples: Any, scripts: Any, tmp_path: Path
) -> None:
    """Twenty-five epochs of eight batches of 128: too few steps for a trial of the rate. Everything here is seeded."""
    made = scripts(rate=0.01, norm=False, dropout=0.0, optimizer="adam").build()
    made["train_loader"] = DataLoader(
        held_out_samples(1024, 1), batch_size=128, shuffle=True, generator=torch.Generator().manual_seed(6)
    )
    made["val_loader"] = DataLoader(held_out_samples(600, 2), batch_size=200)
    result = Trainer(
        max_epochs=25,
        automode=True,
        policy=Policy(),
        seed=3,
        progress=False,
        console=False,
        session_dir=tmp_path,
    ).fit(**made)
    with Session.open(result.session.path) as session:
        (card,) = (
            e.body["card"]
            for e in session.events("card_proposed")
            if e.body["card"]["reason"] == "learning_rate_probe"
        )
        (state,) = (str(c.state) for c in session.cards() if c.card_id == card["id"])
    assert [v["updates"] for v in card["training_recipe"]["variants"]] == [4]
    assert card["acceptance"]["metric"] == "log_score"
    assert card["budget_steps"] >= 5
    assert "a badly chosen batch size is cheap to find now" in card["because"]
    assert state == "adopted"
