"""An overfitted run that ends by itself: its finish finds the best validated state again, and nothing but the finish knows of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from automode import Callback, TensorLoader, Trainer, replay
from automode.engine.story import story
from automode.session import Session
from automode.session.replaying import to_envelope
from automode.testing.bench import identical
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

pytestmark = pytest.mark.torch

STEPS = 240
Play = Callable[..., Any]


class FewSamples:
    """Few samples, clean labels and a high rate without a schedule: surer and surer, and no more often right."""

    def __init__(self, script: Any, *, wrong: bool = False) -> None:
        self._script = script
        self._wrong = wrong

    def build(self) -> dict[str, Any]:
        """The arguments of ``fit``."""
        made: dict[str, Any] = self._script.build()
        made["train_loader"] = TensorLoader.of(made["train_loader"])  # the same batches, in half the time
        if self._wrong:
            _, labels = made["val_loader"].dataset.tensors
            labels[::3] = (labels[::3] + 1) % 3
        return made


@pytest.fixture(scope="session")
def few(scripts: Any) -> Any:
    return scripts(rate=0.03, optimizer="adam", train=64, held_out=400, norm=False, dropout=0.0)


def terms(**averages: Any) -> dict[str, Any]:
    return {"reasons": ["merge_cadence"], "budget": "on_top", "averages": {"clean_below": 0.3} | averages}


@pytest.fixture(scope="module")
def finished(run_once: Play, few: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run whose best state is long past at its end."""
    return run_once(
        tmp_path_factory.mktemp("finished") / "run",
        automode="act",
        script=FewSamples(few),
        policy=terms(),
        steps=STEPS,
        val_every_n_epochs=1,
        checkpoint_every=None,
    )


def test_the_run_ends_with_the_best_state_that_it_was_in(finished: Any) -> None:
    (merged,) = finished.bodies("merged")
    (seen,) = finished.bodies("evaluated")
    (adopted,) = finished.bodies("adopted")
    assert {"raw", "ema3", "ema10", "tail", "best:raw"} <= set(merged["members"])
    assert merged["weights"]["checkpoint"] == merged["best"] != merged["control"]["checkpoint"]
    assert merged["best_step"] < STEPS // 2 < merged["step"] == adopted["step"] == STEPS
    assert seen["candidate_metrics"]["loss"] < 0.7 * seen["control_metrics"]["loss"]
    assert identical(finished.final, finished.checkpoint(adopted["checkpoint"])[0])
    weights, _ = finished.checkpoint(merged["best"])
    assert identical(weights, finished.after[merged["best_step"] - 1])
    if merged["weights"]["choice"] == "raw":
        assert identical(finished.final, weights)


class StopsAt(Callback):
    """Ends the run as an early stopping does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step >= self._step


def test_a_run_that_a_callback_ends_has_its_finish_there(run_once: Play, few: Any, tmp_path: Path) -> None:
    stopped = run_once(
        tmp_path / "run",
        automode="act",
        script=FewSamples(few),
        policy=terms(),
        steps=2 * STEPS,
        callbacks=[StopsAt(STEPS)],
        val_every_n_epochs=1,
        checkpoint_every=None,
    )
    with Session.open(stopped.path) as session:
        (card,) = session.cards()
    (merged,), (adopted,) = stopped.bodies("merged"), stopped.bodies("adopted")
    assert (card.reason, card.state) == ("merge_cadence", "adopted")
    assert merged["step"] == adopted["step"] == stopped.result.steps == STEPS
    assert identical(stopped.final, stopped.checkpoint(adopted["checkpoint"])[0])


def test_the_card_says_by_which_metric_and_why(finished: Any) -> None:
    (merged,), (seen,) = finished.bodies("merged"), finished.bodies("evaluated")
    (verdict,) = finished.bodies("verdict_given")
    assert merged["metric"] == seen["metric"] == verdict["metric"] == "log_score"
    assert seen["guard"]["n"] == seen["overall"]["n"] == verdict["n"] == 200  # val-B, and nothing else
    with Session.open(finished.path) as session:
        told = story(merged["card"], [to_envelope(record) for record in session.events()])
    assert "compared by the log score, since at most" in told
    assert f"of the best validated state, of step {merged['best_step']}" in told


def test_the_trunk_is_bit_for_bit_what_it_is_without(
    run_once: Play, few: Any, finished: Any, tmp_path: Path
) -> None:
    without = run_once(
        tmp_path / "run",
        automode="act",
        script=FewSamples(few),
        policy=terms(best_state=False),
        steps=STEPS,
        val_every_n_epochs=1,
        checkpoint_every=None,
    )
    assert len(finished.after) == len(without.after) == STEPS
    assert identical(finished.after[-1], without.after[-1])
    (merged,) = without.bodies("merged")
    assert merged["best"] is None
    assert not any(name.startswith("best:") for name in merged["members"])


@pytest.fixture(scope="module")
def doubtful(run_once: Play, few: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run a third of whose held-out labels are wrong."""
    return run_once(
        tmp_path_factory.mktemp("doubtful") / "run",
        automode="act",
        script=FewSamples(few, wrong=True),
        policy=terms(),
        steps=100,
        val_every_n_epochs=1,
    )


def test_where_held_out_labels_may_be_wrong_accuracy_decides(doubtful: Any) -> None:
    (merged,) = doubtful.bodies("merged")
    assert merged["metric"] == "utility"
    assert merged["noise_at_most"] > 0.33


def test_a_run_that_is_made_longer_still_knows_its_best_state(
    doubtful: Any, few: Any, tmp_path: Path
) -> None:
    (before,) = doubtful.bodies("merged")
    assert before["best_step"] < 100
    copied = tmp_path / "longer" / doubtful.path.relative_to(doubtful.folder)
    shutil.copytree(doubtful.path, copied)
    result = Trainer(
        automode="act",
        policy=doubtful.driver.state.policy,
        max_steps=120,
        seed=3,
        progress=False,
        console=False,
        session_dir=tmp_path / "longer",
        val_every_n_epochs=1,
        resume=copied,
    ).fit(**FewSamples(few, wrong=True).build())
    with result.session as session:
        (merged,) = (record.body for record in session.events("merged"))
        replay(session).check()
    assert (merged["step"], merged["best_step"]) == (120, before["best_step"])


def test_the_card_is_run_again_with_the_same_outcome(finished: Any, few: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = Settings(
        automode="act",
        max_steps=STEPS,
        seed=3,
        session_dir=tmp_path,
        console=False,
        progress=False,
        val_every_n_epochs=1,
        policy=finished.driver.state.policy,
    )
    order = Order(session=finished.path, card=finished.bodies("merged")[0]["card"])
    done = execute(order, settings, FitRequest(**FewSamples(few).build()), None)
    assert done.same, done.text()
