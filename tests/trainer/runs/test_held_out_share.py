"""Whole runs without a validation loader, whose policy names a share of the training data to hold out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode import replay
from automode.testing.bench import identical
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

STEPS = 150
POLICY = {
    "budget": "on_top",
    "evidence": {"holdout_share": 0.4, "min_samples": 20},
    "approval": {"auto_share": 0.0},
}
CARD = """
action: fork
because: To see what happens.
training_recipe: {variants: [{name: fast, lr_mul: 20}], exclude: {kind: indices, ids: [0, 1, 2, 3, 4, 5]}}
budget_steps: 10
asha: {reduction_factor: 2, max_steps: 20}
"""

pytestmark = pytest.mark.filterwarnings("ignore:.*training samples are held out")


@pytest.fixture(scope="module")
def script(scripts: Any) -> Any:
    return scripts(rate=0.003, norm=False, dropout=0.0, train=300)


def without(script: Any) -> dict[str, Any]:
    return script.build() | {"val_loader": None}


@pytest.fixture(scope="module")
def played(handed_in: Any, run_once: Any, script: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An acting run with a card, with the ids that its batches held, and what a kill at step 40 leaves."""
    seen: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("share")

    def look(person: Any) -> None:
        ledger = person.performer.scanner.ledger()
        seen["visits"] = ledger.column("count", np.arange(300, dtype=np.int64)).copy()
        if person.cards and person.performer.runner.cards:
            data = person.data()
            seen["drawn"] = np.union1d(data.selected, data.others)
        seen["held"] = person.performer.trunk.held.ids

    run = run_once(
        folder / "run",
        automode="act",
        script=script,
        fit={"val_loader": None},
        policy=POLICY,
        actions=handed_in(CARD) | {40: lambda _: shutil.copytree(folder / "run", folder / "left")},
        each=look,
        steps=STEPS,
        val_every_n_epochs=1,
        checkpoint_every="10 steps",
    )
    run.seen, run.left = seen, folder / "left"
    return run


def test_a_card_comes_to_its_verdict_on_what_was_held_out(played: Any) -> None:
    (started,) = played.bodies("session_started")
    assert (started["run"]["val_a"], started["run"]["val_b"]) == (60, 60)
    assert started["run"]["train_samples"] == 180
    assert started["run"]["batch"] == pytest.approx(0.6 * 30)
    (look,) = played.bodies("evaluated")
    assert look["overall"]["n"] == 60
    assert played.states()[-1] == "adopted"
    assert len(played.result.history["val_metric"]) > 0


def test_no_held_out_sample_is_ever_trained_on_by_trunk_or_trial(played: Any) -> None:
    held, visits = played.seen["held"], played.seen["visits"]
    assert held.size == 120
    assert not visits[held].any()
    assert (np.delete(visits, np.union1d(held, np.arange(6))) > 0).all()
    assert not np.isin(played.seen["drawn"], np.union1d(held, np.arange(6))).any()


def test_a_run_that_was_killed_holds_out_the_same_and_ends_with_the_same_bits(
    take_up: Any, played: Any, script: Any
) -> None:
    path = played.left / played.path.relative_to(played.folder)
    fit = without(script)
    take_up(path, played, script, steps=STEPS, fit=fit, automode="act", val_every_n_epochs=1).session.close()
    assert replay(path).differences == 0
    assert identical(fit["model"].state_dict(), played.made["model"].state_dict())


def test_the_same_card_comes_out_the_same_again(played: Any, script: Any) -> None:
    wanted = played.bodies("card_proposed")[0]["card"]["id"]
    settings = Settings(
        automode="act",
        max_steps=STEPS,
        seed=3,
        session_dir=played.folder,
        console=False,
        val_every_n_epochs=1,
    )
    done = execute(Order(session=played.path, card=wanted), settings, FitRequest(**without(script)), None)
    assert done.same, done.text()


def test_a_proposing_run_splits_nothing_and_refuses_the_card(
    play_run: Any, script: Any, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="holds nothing out in propose mode"):
        run = play_run(
            script=script,
            fit={"val_loader": None},
            policy=POLICY,
            actions={3: lambda person: person.submit(CARD)},
            steps=20,
        )
    assert run.bodies("session_started")[0]["run"]["train_samples"] == 300
    assert not run.bodies("card_proposed")
    assert "there is no validation loader" in run.bodies("request_refused")[0]["why"]
