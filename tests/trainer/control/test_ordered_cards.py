"""Forks and merges that a person orders: cards like any other, approved by whoever ordered them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from automode import replay
from automode.errors import ConflictError, UsageError

pytestmark = pytest.mark.torch


@pytest.fixture
def acting(desk: Any) -> Any:
    """A run that may run cards, with held-out data to judge them by, after 40 of its 1,600 steps."""
    made = desk.script(rows=320, batch_size=8)
    inputs = torch.randn(120, 5)
    made["val_loader"] = DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), batch_size=40)
    run = desk.run(made, max_epochs=40, automode="propose", policy="aggressive")
    run.train(40)
    return run


def stopped(run: Any, desk: Any) -> Any:
    run.trainer.stop(timeout=desk.patience)
    return run.ended()


def test_a_fork_is_a_card_of_the_persons_that_runs_once_training_goes_on(acting: Any, desk: Any) -> None:
    reply = acting.trainer.fork(lr_mul=0.5, budget_steps=5, max_steps=10, actor="ann", timeout=desk.patience)
    card = reply.result["card"]
    assert reply.result["state"] == "running"
    acting.train(60)
    result = stopped(acting, desk)
    moves = [r.body for r in result.session.events("card_moved") if r.body["card"] == card]
    assert [move["after"] for move in moves][:2] == ["approved", "running"]
    assert moves[0]["actor"] == "ann"
    assert moves[-1]["after"] in ("adopted", "rejected", "inconclusive")
    assert replay(result.session).differences == 0


def test_a_merge_is_judged_at_once(acting: Any, desk: Any) -> None:
    card = acting.trainer.merge(timeout=desk.patience).result["card"]
    result = stopped(acting, desk)
    verdicts = [r.body["card"] for r in result.session.events("verdict_given")]
    assert card in verdicts
    assert replay(result.session).differences == 0


def test_a_whole_card_says_everything_and_must_be_of_the_kind_ordered(acting: Any, desk: Any) -> None:
    body = {
        "action": "fork",
        "training_recipe": {"variants": [{"name": "own", "lr_mul": 0.7}]},
        "budget_steps": 4,
        "asha": {"max_steps": 8},
    }
    with pytest.raises(UsageError, match="no number beside it"):
        acting.trainer.fork(body, lr_mul=0.5, timeout=desk.patience)
    with pytest.raises(UsageError, match="whose action is merge"):
        acting.trainer.merge(body, timeout=desk.patience)
    assert acting.trainer.fork(body, timeout=desk.patience).result["state"] == "running"
    with pytest.raises(UsageError, match="belongs to automode"):
        acting.trainer.fork(actor="planner", timeout=desk.patience)


def test_a_held_run_has_no_steps_for_a_fork_and_says_what_to_do(acting: Any, desk: Any) -> None:
    made = {**acting.made, **desk.script(), "val_loader": acting.made["val_loader"]}
    stopped(acting, desk)
    run = desk.run(made, automode="propose", policy="aggressive", hold=True)
    run.trainer.resume(timeout=desk.patience)
    run.trainer.wait_until_paused(desk.patience)
    with pytest.raises(ConflictError, match="make it longer first"):
        run.trainer.fork(timeout=desk.patience)
    run.trainer.release(timeout=desk.patience)


def test_a_fork_that_does_not_fit_is_refused_with_the_reason(acting: Any, desk: Any) -> None:
    with pytest.raises(ConflictError, match="cannot run"):
        acting.trainer.fork(budget_steps=50_000, max_steps=150_000, timeout=desk.patience)
    assert acting.trainer.waits == "paused"
