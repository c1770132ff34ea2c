"""Which networks foretell symbols of their own inputs' alphabet, and what a scan says of wrong labels there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.planner.policy import Policy
from automode.trainer.symbols import foretells_symbols

pytestmark = pytest.mark.torch

SYMBOLS, LENGTH = 7, 6


def text(n: int) -> tuple[Tensor, Tensor]:
    """Windows of a source whose next symbol depends on the one before, by chance, none of them twice; and the symbol that follows each."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.full(SYMBOLS, 0.5), size=SYMBOLS)
    stream = [0]
    for _ in range(4 * n + LENGTH):
        stream.append(int(rng.choice(SYMBOLS, p=table[stream[-1]])))
    windows = np.lib.stride_tricks.sliding_window_view(np.array(stream), LENGTH + 1)
    once = np.unique(windows[:, :-1], axis=0, return_index=True)[1]
    windows = windows[rng.permutation(once)[:n]]
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, -1].copy())


def scores(n: int, classes: int = SYMBOLS) -> Tensor:
    return torch.zeros(n, classes)


def test_windows_of_a_text_and_the_symbol_that_follows() -> None:
    x, y = text(256)
    assert foretells_symbols([x, y], scores(256), y)
    assert foretells_symbols({"ids": x.int(), "next": y}, scores(256), y)


def test_padding_and_markers_outside_the_alphabet_change_nothing() -> None:
    x, y = text(256)
    x, y = x + 1, y + 1
    padded = torch.cat([torch.zeros(256, 6, dtype=torch.int64), x], dim=1)
    assert foretells_symbols([padded, y], scores(256, SYMBOLS + 1), y)
    x[:3, 0] += 1000
    assert foretells_symbols([x, y], scores(256, SYMBOLS + 1), y)


def test_a_text_that_is_sorted_into_topics_is_another_thing() -> None:
    rng = torch.Generator().manual_seed(1)
    words = torch.randint(0, 5000, (256, 20), generator=rng)
    topics = torch.randint(0, 8, (256,), generator=rng)
    assert not foretells_symbols([words, topics], scores(256, 8), topics)


def test_codes_whose_classes_come_otherwise_often_are_no_symbols() -> None:
    rng = torch.Generator().manual_seed(1)
    board = torch.randint(0, 3, (256, 9), generator=rng)
    move = torch.randint(0, 9, (256,), generator=rng)
    assert not foretells_symbols([board, move], scores(256, 9), move)


def test_measured_inputs_single_numbers_and_two_classes_have_no_alphabet() -> None:
    x, y = text(256)
    assert not foretells_symbols([x.float(), y], scores(256), y)
    assert not foretells_symbols([x[:, :1], y], scores(256), y)
    two = y % 2
    assert not foretells_symbols([x % 2, two], scores(256, 2), two)
    assert not foretells_symbols([x, y.float()], scores(256, 1), y.float())


class Reader(nn.Module):
    """Sees the symbols of a window through an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Embedding(SYMBOLS, 8)
        self.said = nn.Linear(8 * LENGTH, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.said(self.seen(x).flatten(1))
        return out


def test_a_run_on_text_has_no_card_about_wrong_labels_and_says_why(tmp_path: Path) -> None:
    x, y = text(1000)
    assert len(y) == 1000
    train, held_out = TensorDataset(x[:600], y[:600]), TensorDataset(x[600:], y[600:])
    torch.manual_seed(0)
    model = Reader()
    policy = Policy.model_validate({"reasons": ["label_noise"], "scan": {"share": None, "cost": 1.0}})
    result = Trainer(
        project="text",
        max_epochs=16,
        automode=True,
        policy=policy,
        session_dir=tmp_path,
        seed=0,
        progress=False,
        console=False,
        checkpoint_every=None,
    ).fit(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(train, batch_size=32, shuffle=True),
        val_loader=DataLoader(held_out, batch_size=200),
    )
    with result.session as session:
        scans: list[dict[str, Any]] = [record.body for record in session.events(kind="scanned")]
        assert scans, [r.body for r in session.events(kind="command_failed")]
        assert all(scan["noise"] is None and scan["suspects"] == 0 for scan in scans)
        assert "symbols" in scans[-1]["why"]
        assert session.cards() == []
