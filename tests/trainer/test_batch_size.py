"""Samples a step, by which compute is priced, are known of every loader that says how it draws its batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from automode import Trainer

pytestmark = pytest.mark.torch

DATA = TensorDataset(torch.randn(96, 4), torch.zeros(96, dtype=torch.long))


class Own:
    """A batch sampler that does not say how large its batches are: of 32 and 16 samples, turn about."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        yield from (
            list(range(32)),
            list(range(32, 48)),
            list(range(48, 80)),
            list(range(80, 96)),
        )


@pytest.mark.parametrize(
    ("loader", "size"),
    [
        (DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 16, drop_last=True)), 16.0),
        (DataLoader(DATA, batch_sampler=Own()), 24.0),
        (DataLoader(DATA, batch_size=32), 32.0),
        ([DATA[:48], DATA[48:]], 48.0),
    ],
)
def test_steps_are_priced_by_the_samples_that_they_take(loader: Any, size: float, tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    result = Trainer(
        max_epochs=1, automode="observe", session_dir=tmp_path, progress=False, console=False
    ).fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=loader,
    )
    (began,) = result.session.events(kind="session_started")
    assert began.body["run"]["batch"] == size
    assert result.compute["trunk"] == 3 * 96
