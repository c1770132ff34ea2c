"""A run in which cards are made, trained, judged and adopted is the same run whoever has paused, checked or stopped it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Policy, Trainer, replay

pytestmark = pytest.mark.torch

POLICY = Policy.model_validate(
    {
        "reasons": ["learning_rate_probe", "loss_plateau", "merge_cadence", "high_loss_tail"],
        "budget": "on_top",
        "approval": {"ask": []},
        "trend": {"budget": 40, "gain": 0.95},
        "scan": {"every": 9, "probe": 32, "share": None, "tail_ratio": 1.01},
        "averages": {"finish_at": 0.7},
        "diagnostics": {"enabled": False},
        "pacing": {
            "min_rung": 2,
            "warmup_steps": 0,
            "cooldown_steps": 5,
            "max_cards": 4,
            "exploration_share": 1.0,
            "total_share": 1.0,
        },
        "evidence": {"min_samples": 10, "z": 0.0, "alpha": 0.45},
    }
)
GIVEN: dict[str, Any] = {
    "max_epochs": None,
    "max_steps": 72,
    "automode": "act",
    "policy": POLICY,
    "checkpoint_every": "1000 steps",
}


def data(n: int, seed: int) -> TensorDataset:
    inputs = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs[:, :3].abs().argmax(1))


def made() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(6)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0005, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(data(150, 1), batch_size=32, shuffle=True, generator=generator),
        "val_loader": DataLoader(data(64, 2), batch_size=32),
        "test_loader": DataLoader(data(32, 4), batch_size=32),
    }


def told(result: Any) -> list[Any]:
    """What was decided, without what names records or the session."""
    return [
        (
            r.kind,
            r.body["card"] if isinstance(r.body.get("card"), str) else None,
            r.body.get("step"),
            r.body.get("after"),
        )
        for r in result.session.events(role="fact")
    ]


def same(plain: Any, other: Any) -> None:
    left, right = (run.model.state_dict().values() for run in (plain, other))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert plain.frame("loss").tolist() == other.frame("loss").tolist()
    assert [kind for kind, *_ in told(plain)] == [kind for kind, *_ in told(other)]
    assert [entry[2:] for entry in told(plain)] == [entry[2:] for entry in told(other)]
    for kind in ("scanned", "clustered"):
        assert [r.body for r in plain.session.events(kind)] == [r.body for r in other.session.events(kind)]
    assert replay(other.session).differences == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = {
        "seed": 3,
        "progress": False,
        "console": False,
        "session_dir": tmp_path_factory.mktemp("plain"),
    }
    result = Trainer(**settings, **GIVEN).fit(**made())
    assert {"running", "adopted"} & {r.body["after"] for r in result.session.events("card_moved")}
    return result


def test_pauses_tests_and_checks_while_cards_run_change_nothing(plain: Any, desk: Any) -> None:
    run = desk.run(made(), **GIVEN)
    for steps in (3, 10, 1, 7, 20):
        run.train(steps)
        run.trainer.test(timeout=desk.patience)
        run.trainer.check("determinism", timeout=desk.patience)
        run.trainer.scan(timeout=desk.patience)
    same(plain, run.finish())


def test_a_pause_moves_no_scan_that_waits_for_its_boundary(desk: Any) -> None:
    given = {**GIVEN, "automode": "observe"}
    quiet = desk.fit(made(), **given)
    assert [r.body["step"] for r in quiet.session.events("scanned")][:1] == [10]  # due at step 9
    run = desk.run(made(), **given)
    for steps in (9, 9, 9, 9):
        run.train(steps)
        run.trainer.scan(timeout=desk.patience)
    same(quiet, run.finish())


@pytest.mark.parametrize("step", [5, 61])
def test_a_stopped_run_goes_on_with_its_cards(step: int, plain: Any, desk: Any) -> None:
    run = desk.run(made(), **GIVEN)
    run.train(step)
    run.trainer.stop(timeout=desk.patience)
    stopped = run.ended()
    same(plain, desk.fit(made(), folder=run.folder, resume=stopped.path, **GIVEN))


def test_a_run_goes_back_to_before_its_cards(plain: Any, desk: Any) -> None:
    run = desk.run(made(), **GIVEN)
    run.train(14)
    kept = run.trainer.checkpoint(timeout=desk.patience).result["checkpoint"]
    run.train(30)
    run.trainer.load(kept, timeout=desk.patience)
    run.trainer.wait_until_paused(desk.patience)
    same(plain, run.finish())
