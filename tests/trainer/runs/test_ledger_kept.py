"""Runs leave their sample ledger in the session: at scans, at the end, and inside stored states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from automode import Trainer
from automode.errors import SessionError
from automode.planner.policy import Policy
from automode.session import Session
from automode.session.ledger_file import LEDGER_NAME
from automode.trainer import sample_keeper

pytestmark = pytest.mark.torch

N, OFFSET = 300, 100
Slices = dict[str, Any]
SLICES: Slices = {"zero": lambda _, labels: labels == 0, "listed": [0, 1, 2]}


def run(folder: Path, *, rate: float = 3e-3, **settings: Any) -> Any:
    """Digits of positions 100 to 399 under a Subset."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    policy = Policy.model_validate(
        {"scan": {"details": ["gradient_norm", "embedding"], "cost": 0.5, "every": 15}}
    )
    return Trainer(
        **{
            "project": "p",
            "max_epochs": 4,
            "automode": "observe",
            "policy": policy,
            "session_dir": str(folder),
            "seed": 0,
            "progress": False,
            "console": False,
            **settings,
        }
    ).fit(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=rate),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(
            Subset(TensorDataset(inputs, targets), range(OFFSET, OFFSET + N)), batch_size=20, shuffle=True
        ),
        val_loader=DataLoader(TensorDataset(inputs[500:700], targets[500:700]), batch_size=200),
        slices=SLICES,
    )


def test_a_run_that_has_ended_tells_of_every_training_sample(tmp_path: Path) -> None:
    with run(tmp_path).session as session:
        found = session.ledger()
        clustered = [record.body for record in session.events(kind="clustered")]
    assert clustered
    assert all(body["likelihoods"][str(body["k"])] < float("inf") for body in clustered)
    labels = load_digits(return_X_y=True)[1][OFFSET : OFFSET + N]
    assert (found.moment, found.step, len(found)) == ("end", 60, N)
    assert found.ids.tolist() == list(range(OFFSET, OFFSET + N))
    assert set(found.column("visits")) == {4.0}
    assert found.in_slice("zero").ids.tolist() == (OFFSET + np.flatnonzero(labels == 0)).tolist()
    assert "list of held-out samples" in found.why_no_slice["listed"]


def test_details_stand_beside_the_samples_that_they_are_of(tmp_path: Path) -> None:
    result = run(tmp_path, rate=0.0)  # so that the network of the scan is that of the end
    with result.session as session:
        found = session.ledger()
    known = found.where("gradient_norm >= 0")
    assert 128 <= len(known) < N
    inputs, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    hidden = result.model[1](result.model[0]((inputs[known.ids] / 16.0).float())).detach()
    for i in range(16):
        np.testing.assert_allclose(known.column(f"embedding_{i}"), hidden[:, i], rtol=1e-4, atol=1e-5)
    assert "embedding_16" not in found.columns
    wrong = result.model[2](hidden).softmax(dim=1) - nn.functional.one_hot(labels[known.ids], 10)
    expected = wrong.norm(dim=1) * (hidden.norm(dim=1) ** 2 + 1).sqrt()
    np.testing.assert_allclose(known.column("gradient_norm"), expected.detach(), rtol=1e-4)


def test_reading_the_ledger_changes_no_bit_of_the_run(tmp_path: Path) -> None:
    bare = run(tmp_path / "a", policy=Policy.model_validate({"reasons": []})).model.state_dict()
    kept = run(tmp_path / "b").model.state_dict()
    assert all(torch.equal(bare[name], kept[name]) for name in bare)


def test_a_stored_state_that_is_later_than_the_last_scan_is_read_instead(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping:
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 40:
                raise Stop

    with pytest.raises(Stop):
        run(tmp_path, callbacks=[Stopping()], checkpoint_every="20 steps")
    folder = next(tmp_path.glob("*/*"))
    with Session.open(folder) as session:
        found = session.ledger()
        assert found.moment == "checkpoint"
        assert found.step >= 39
        assert f"stored state of step {found.step}" in found.told
        assert found.column("visits").sum() + 20 * found.pending == 20 * found.step
        assert len(found.in_slice("zero"))
        last = next(iter(session.checkpoints()[-1:]))
        (folder / LEDGER_NAME).unlink()
        alone = session.ledger()
        assert (alone.moment, alone.step) == ("checkpoint", last.step)
        assert not alone.slices


def test_slices_whose_samples_take_long_to_read_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_keeper, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(sample_keeper, "FAIR_SECONDS", 0.0)
    with run(tmp_path).session as session:
        assert "no more than 0 are taken" in session.ledger().why_no_slice["zero"]


def test_a_slice_that_raises_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(_: Any, labels: Any) -> Any:
        if len(labels) > 200:  # of training alone
            raise ValueError("too many")
        return labels == 0

    monkeypatch.setitem(SLICES, "zero", strange)
    with run(tmp_path).session as session:
        assert session.ledger().why_no_slice["zero"] == "ValueError: too many"


def test_a_disk_that_refuses_the_ledger_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise SessionError("the disk is full")

    monkeypatch.setattr(sample_keeper, "write_file", refuse)
    with pytest.warns(RuntimeWarning, match="could not be stored in the session: the disk is full"):
        result = run(tmp_path)
    assert result.steps == 60
