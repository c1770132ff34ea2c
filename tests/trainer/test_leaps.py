"""Steps that a broken batch makes many times too large: what is a leap, and what a run makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer
from automode.planner.policy import Policy
from automode.trainer.leaps import Leaps

BROKEN = 37


def judged(leaps: Leaps, norms: list[float]) -> list[bool]:
    """Ask as the loop does; returns which steps were left out."""
    step, out = 0, []
    for norm in norms:
        out.append(bool(leaps.unfit(1.0, norm, step)))
        step += not out[-1]
    return out


def test_a_norm_far_above_all_before_is_left_out_and_is_no_measure_for_the_next() -> None:
    assert judged(Leaps(20.0), [1.0, 2.0, 1.0, 41.0, 1.0, 39.0, 41.0]) == [False] * 3 + [True] + [False] * 3


def test_the_first_steps_are_not_judged() -> None:
    assert judged(Leaps(20.0), [1.0, 100.0, 1.0, 1500.0, 31000.0]) == [False, False, False, False, True]


def test_after_three_in_a_row_the_run_has_changed() -> None:
    leaps = Leaps(20.0)
    assert judged(leaps, [1.0, 1.0, 1.0, *[50.0] * 3]) == [False] * 3 + [True] * 3
    assert [bool(leaps.unfit(1.0, norm, 3)) for norm in (60.0, 50.0, 1100.0)] == [False, False, False]
    assert leaps.largest == 1100.0  # it was the same step still


def test_gradients_that_were_nothing_so_far_are_no_measure() -> None:
    assert judged(Leaps(20.0), [0.0] * 5 + [1.0]) == [False] * 6


def test_without_a_multiple_only_what_is_not_finite_is_left_out() -> None:
    assert judged(Leaps(None), [1.0, 1.0, 1.0, 1e9, math.nan, math.inf]) == [False] * 4 + [True] * 2
    assert Leaps(20.0).unfit(math.nan, 1.0, 0) == "the loss is nan"


def test_what_is_known_goes_on_from_a_stored_state() -> None:
    one, other = Leaps(20.0), Leaps(20.0)
    judged(one, [1.0, 2.0, 1.0, 41.0])
    other.load(one.state())
    assert other.state() == one.state()
    assert (
        other.unfit(1.0, 41.0, 3)
        == one.unfit(1.0, 41.0, 3)
        == "the gradient norm is 41, 20 times the largest before"
    )


def data() -> tuple[Tensor, Tensor]:
    """Two classes; one sample stands a million times too far out, on the wrong side."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 4, generator=generator)
    y = (x[:, 0] > 0).long()
    x[BROKEN] *= 1e6
    y[BROKEN] = int(x[BROKEN, 0] <= 0)
    return x, y


def trained(folder: Path, mode: Any, **safeguards: Any) -> tuple[nn.Module, list[str], list[str]]:
    """Returns the model, why steps were left out, and the reasons of the cards."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    policy = Policy.model_validate({"reasons": ["instability_spike"], "safeguards": safeguards})
    result = Trainer(
        project="leaps",
        max_epochs=12,
        automode=mode,
        policy=policy,
        session_dir=folder,
        seed=0,
        progress=False,
        console=False,
        checkpoint_every=None,
    ).fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.CrossEntropyLoss(),
        train_loader=DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True),
        val_loader=DataLoader(TensorDataset(*(t[64:] for t in unlike(data()))), batch_size=96),
    )
    with result.session as session:
        why = [row.body["why"] for row in session.events(kind="safeguarded") if row.body["what"] == "skipped"]
        return model, why, [card.reason for card in session.cards()]


def unlike(given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Held-out samples: none of those trained on."""
    x = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(4))
    return x, (x[:, 0] > 0).long()


def right(model: nn.Module) -> float:
    x, y = unlike(data())
    return float((model(x).argmax(dim=1) == y).float().mean())


@pytest.mark.torch
def test_a_run_in_act_mode_leaves_the_broken_batch_out_and_makes_no_card_of_it(tmp_path: Path) -> None:
    model, why, cards = trained(tmp_path / "act", "act")
    assert 10 <= len(why) <= 12  # once an epoch; some of the last steps pay for what was looked at
    assert all("times the largest before" in each for each in why)
    assert cards == []
    assert right(model) > 0.9
    ruined, why, _ = trained(tmp_path / "null", "act", leap=None, rewind=False, clip=False)
    assert why == []
    assert right(ruined) < 0.9


@pytest.mark.torch
def test_observing_leaves_nothing_out(tmp_path: Path) -> None:
    assert trained(tmp_path, "observe")[1] == []
