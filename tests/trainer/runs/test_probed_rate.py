"""A learning rate that is wrong by an order of magnitude is found early in the run, and one that is about right is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Policy, TensorLoader, Trainer, replay
from automode.session import Session
from automode.session.checkpoints import CheckpointStore
from automode.trainer.result import FitResult

pytestmark = pytest.mark.torch

STEPS, RATE, RUINOUS = 900, 0.01, 0.3
POLICY = Policy.model_validate(
    {
        "reasons": ["learning_rate_probe"],
        "probe": {"share": 0.15, "restart_share": 0.3},  # a run of so few steps pays dearly
        "pacing": {"exploration_share": 0.4, "total_share": 0.6},
    }
)


def trained(folder: Path, rate: float, automode: bool, policy: Policy = POLICY) -> FitResult:
    """The same data, first weights and order every time."""
    data = load_digits()
    order = np.random.default_rng(3).permutation(len(data.target))
    x = torch.tensor(data.data[order] / 16.0, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    return Trainer(
        max_steps=STEPS,
        automode=automode,
        policy=policy,
        session_dir=folder,
        val_every_n_epochs=4,
        seed=4,
        progress=False,
        console=False,
        checkpoint_every=None,
    ).fit(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=rate),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=TensorLoader(
            x[:1000], y[:1000], batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(4)
        ),
        val_loader=DataLoader(TensorDataset(x[1000:], y[1000:]), batch_size=512),
    )


def probes(result: FitResult) -> list[tuple[int, str, str]]:
    """Of every probe, in order: its step, how its card ended, and what was judged last."""
    with result.session as session:
        made: dict[str, Any] = {
            r.body["card"]["id"]: r.body["card"] for r in session.events(kind="card_proposed")
        }
        judged = {r.body["card"]: r.body["candidate"] for r in session.events(kind="verdict_given")}
        replay(session).check()
        return [
            (made[card.card_id]["step"], str(card.state), judged.get(card.card_id, ""))
            for card in session.cards()
        ]


def test_a_rate_that_is_far_too_low_is_found_early(tmp_path: Path) -> None:
    low = trained(tmp_path / "low", RATE / 20, automode=False)
    probed = trained(tmp_path / "probed", RATE / 20, automode=True)
    (step, state, what), *_ = probes(probed)
    assert 0.05 * STEPS <= step <= 0.15 * STEPS
    assert (state, what) == ("adopted", "t0:x10")
    assert probed.history["learning_rate"][-1] == pytest.approx(RATE / 2)
    assert probed.history["val_loss"][-1] < 0.8 * low.history["val_loss"][-1]


def test_where_three_trials_do_not_fit_one_does_and_the_log_speaks_of_that_one(tmp_path: Path) -> None:
    poor = POLICY.model_copy(update={"probe": POLICY.probe.model_copy(update={"restart_share": 0.14})})
    probed = trained(tmp_path, RATE / 20, True, poor)
    with probed.session as session:
        (card,) = (record.body["card"] for record in session.events(kind="card_proposed"))
        (fired,) = (r.body for r in session.events(kind="rule_evaluated") if r.body["outcome"] == "fired")
        ended = str(session.cards()[-1].state)
    assert [variant["name"] for variant in card["training_recipe"]["variants"]] == ["x10"]
    assert fired["why"] == card["because"]
    assert "at its rate times: 10." in fired["why"]
    assert ended == "adopted"


def test_a_rate_that_is_about_right_is_left_alone(tmp_path: Path) -> None:
    probed = trained(tmp_path / "right", RATE, automode=True)
    assert {state for _, state, _ in probes(probed)} <= {"inconclusive", "rejected"}
    assert probed.history["learning_rate"][-1] == pytest.approx(RATE)


def test_a_network_that_its_rate_has_ruined_starts_anew_at_a_tenth(tmp_path: Path) -> None:
    ruined = trained(tmp_path / "ruined", RUINOUS, automode=False)
    assert ruined.history["val_loss"][-1] > 1.5
    probed = trained(tmp_path / "probed", RUINOUS, automode=True)
    (_, state, what), *_ = probes(probed)
    assert state == "adopted"
    assert "restart" in what
    assert probed.history["val_loss"][-1] < 0.5
    assert probed.history["learning_rate"][-1] < RUINOUS / 2
    with Session.open(probed.session.path) as session:
        base = next(r.body for r in session.events(kind="snapshotted") if r.body["purpose"] == "base")
        _, rest, _ = CheckpointStore(session.path / "checkpoints").load(base["checkpoint"])
    torch.manual_seed(4)
    first = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).state_dict()
    assert all(torch.equal(rest["first"][name], first[name]) for name in first)
