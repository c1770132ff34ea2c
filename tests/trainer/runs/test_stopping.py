"""A card that ends a run: it stops at the next step, and what the model holds in the end is the best that was seen of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from automode.testing.bench import identical
from automode.trainer.driver import Driver
from automode.trainer.executing import Order, execute
from automode.trainer.fit_request import FitRequest
from automode.trainer.settings import Settings

pytestmark = pytest.mark.torch

STOP = "{action: stop, because: It only memorises by now.}"
STEPS, AT = 400, 150
FREE = {"budget": "on_top"}
EACH = {"val_every_n_epochs": 1}

Play = Callable[..., Any]


class Overfitting:
    """Few samples, every third label wrong, and a high rate: what is learnt first is right, and what is learnt last is not."""

    def __init__(self, script: Any) -> None:
        self._script = script

    def build(self) -> dict[str, Any]:
        """The arguments of ``fit``."""
        made: dict[str, Any] = self._script.build()
        _, labels = made["train_loader"].dataset.tensors
        labels[::3] = (labels[::3] + 1) % 3
        return made


@pytest.fixture(scope="session")
def overfitting(scripts: Any) -> Any:
    return Overfitting(scripts(rate=0.02, optimizer="adam", train=96, norm=False, dropout=0.0))


def actions(**more: Any) -> dict[int, Any]:
    return {AT: lambda person: person.submit(STOP), AT + 1: lambda person: person.approve()} | {
        int(name[1:]): act for name, act in more.items()
    }


@pytest.fixture(scope="module")
def stopped(run_once: Play, overfitting: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that was stopped by a card."""
    return run_once(
        tmp_path_factory.mktemp("stopped") / "run",
        script=overfitting,
        policy=FREE,
        actions=actions(),
        steps=STEPS,
        **EACH,
    )


def test_the_run_ends_at_the_next_step_and_says_by_which_card(stopped: Any) -> None:
    (card,) = [body["card"]["id"] for body in stopped.bodies("card_proposed")]
    assert stopped.result.steps == AT + 1
    assert stopped.result.reason == f"card {card} (manual)"
    assert stopped.bodies("run_ended")[0]["why"] == f"card {card} (manual)"
    assert stopped.states() == ["approved", "running", "accepted", "adopted"]


def test_the_best_validated_state_is_in_the_model_at_the_end(stopped: Any) -> None:
    (merged,) = stopped.bodies("merged")
    best = [body for body in stopped.bodies("checkpointed") if body["why"] == "best"][-1]
    assert merged["method"] == "keep_best"
    assert {"raw", "ema3", "best:raw", "best:ema3"} <= set(merged["members"])
    assert merged["weights"]["checkpoint"] == best["checkpoint"]
    assert merged["value"] > merged["control_value"]
    assert best["step"] < AT
    metrics = stopped.result.history["val_metric"]
    (seen,) = stopped.bodies("evaluated")
    assert seen["candidate_metrics"]["utility"] >= seen["control_metrics"]["utility"]
    assert len(metrics) == AT // 3 + 1
    weights, _ = stopped.checkpoint(best["checkpoint"])
    if merged["weights"]["choice"] == "raw":
        assert identical(stopped.final, weights)
    (verdict,) = stopped.bodies("verdict_given")
    assert verdict["verdict"] == "accepted"
    assert verdict["candidate"] == f"best:{merged['weights']['choice']}"
    assert verdict["n"] == 160  # all that is held out
    assert verdict["mean"] == pytest.approx(merged["value"] - merged["control_value"])
    assert verdict["look"] is None  # nothing of the session's alpha is spent


def test_the_card_is_run_again_with_the_same_outcome(stopped: Any, overfitting: Any, tmp_path: Path) -> None:
    settings = Settings(
        automode="propose",
        max_steps=STEPS,
        seed=3,
        session_dir=tmp_path,
        console=False,
        progress=False,
        **EACH,
    )
    wanted = stopped.bodies("card_proposed")[0]["card"]["id"]
    order = Order(session=stopped.path, card=wanted)
    done = execute(order, settings, FitRequest(**overfitting.build()), None)
    assert done.same, done.text()
    assert any("merge by keep_best" in row.what for row in done.rows)


def test_where_the_last_weights_are_the_best_they_stay(run_once: Play, scripts: Any, tmp_path: Path) -> None:
    run = run_once(
        tmp_path / "sound",
        script=scripts(rate=0.003),
        policy=FREE,
        actions=actions(),
        steps=STEPS,
        checkpoint_every=None,
    )
    (merged,) = run.bodies("merged")
    assert merged["why"] == "no validated state of before is stored"
    assert not any(name.startswith("best") for name in merged["members"])
    assert run.result.steps == AT + 1


def test_a_run_that_dies_at_its_end_stops_again_when_it_is_taken_up(
    stopped: Any, run_once: Play, overfitting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    finish = Driver.finish

    def dies(self: Driver, step: int, why: str, *, early: bool = False) -> None:
        raise RuntimeError("the machine went down")

    monkeypatch.setattr(Driver, "finish", dies)
    arguments = {"script": overfitting, "policy": FREE, "steps": STEPS, "check": False} | EACH
    with pytest.raises(RuntimeError, match="went down"):
        run_once(tmp_path / "cut", actions=actions(), keep=kept, **arguments)
    monkeypatch.setattr(Driver, "finish", finish)
    run = run_once(tmp_path / "cut", resume=kept[0].path, **arguments)
    assert run.result.steps == AT + 1
    assert run.states() == stopped.states()
    assert identical(run.final, stopped.final)


def test_a_stopped_run_can_be_made_longer_and_then_goes_on(
    run_once: Play, overfitting: Any, tmp_path: Path
) -> None:
    arguments = {"script": overfitting, "policy": FREE, "check": False} | EACH
    first = run_once(tmp_path / "longer", actions=actions(), steps=STEPS, **arguments)
    run = run_once(tmp_path / "longer", resume=first.path, steps=STEPS + 20, **arguments)
    assert run.result.steps == STEPS + 20
    assert run.states()[-1] == "inconclusive"
    assert f"taken up to go on to step {STEPS + 20}" in run.why()


PARTING = {
    "budget": "on_top",
    "reasons": ["generalization_gap"],
    "gap": {"stop_after": 6, "rise": 0.02},
    "pacing": {"cooldown_steps": 1, "variants": 2, "cooldown_grow": 1.0},
}


@pytest.mark.parametrize(("risk", "stops"), [("medium", False), ("high", True)])
def test_act_mode_ends_a_run_unasked_only_where_the_policy_allows_high_risk(
    risk: str, stops: bool, run_once: Play, overfitting: Any, tmp_path: Path
) -> None:
    run = run_once(
        tmp_path / risk,
        automode="act",
        script=overfitting,
        policy=PARTING | {"approval": {"auto_risk": risk}},
        steps=STEPS,
        val_every_n_epochs=5,
    )
    cards = [body["card"] for body in run.bodies("card_proposed")]
    assert cards[0]["action"] == "fork"
    stop = next(card for card in cards if card["action"] == "stop")
    assert stop["risk"] == "high"
    assert "Regularising was proposed before" in stop["because"]
    assert (run.result.steps < STEPS) == stops
    first = run.states(stop["id"])[0]
    assert first == ("approved" if stops else "expired")
    assert torch.isfinite(next(iter(run.final.values()))).all()
