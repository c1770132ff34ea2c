"""Models under torch.compile: trained, validated, stored and taken up like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.result import FitResult

pytestmark = pytest.mark.torch


def fit(folder: Path, backend: str | None, **given: Any) -> FitResult:
    torch.manual_seed(1)
    torch._dynamo.reset()
    inputs = torch.randn(120, 5)
    targets = (inputs[:, 0] > 0).long()
    model: Any = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    if backend is not None:
        model = torch.compile(model, backend=backend)
    trainer = Trainer(
        max_epochs=3,
        val_every_n_epochs=1,
        accumulate_grad_batches=2,
        session_dir=folder,
        progress=False,
        console=False,
        seed=3,
        **given,
    )
    return trainer.fit(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(TensorDataset(inputs[:80], targets[:80]), 16, shuffle=True),
        val_loader=DataLoader(TensorDataset(inputs[80:], targets[80:]), 20),
    )


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_trains_as_it_does_without_and_a_cut_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend `eager` runs the traced graph with torch's own kernels, so that results are equal bit by bit."""

    class Cut(Exception):
        pass

    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == 8:
            assert keeper.save("periodic") is not None
            raise Cut

    plain = fit(tmp_path / "plain", None, automode="observe")
    compiled = fit(tmp_path / "compiled", "eager", automode="observe")
    assert compiled.frame("loss").tolist() == plain.frame("loss").tolist()
    assert compiled.history == plain.history
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(tmp_path, "eager", automode="observe")
    resumed = fit(tmp_path, "eager", automode="observe", resume="auto")
    assert resumed.frame("loss").tolist() == plain.frame("loss").tolist()
    (record,) = resumed.session.events("resumed")
    assert record.body["exact"]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_inductors_code_trains_to_the_same_within_rounding(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", None, automode=True)
    compiled = fit(tmp_path / "compiled", "inductor", automode=True)
    assert compiled.frame("loss").tolist() == pytest.approx(plain.frame("loss").tolist(), rel=1e-3)
