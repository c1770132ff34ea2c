"""Rows of a matrix move as torch's own optimizers would move each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from automode.backends import stacked_optimizers
from automode.backends.stacked_optimizers import StackedAdam, stacked_optimizer
from automode.backends.stacked_parameters import ALIGNMENT, Layout, StackedParameters

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

KINDS: dict[str, Make] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, weight_decay=0.02),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.8, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.02, betas=(0.8, 0.95), eps=1e-6),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3),
}


def networks(n: int) -> list[nn.Module]:
    torch.manual_seed(n)
    return [nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).double() for _ in range(n)]


def optimizer_of(model: nn.Module, kind: str, row: int) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    made = KINDS[kind]([{"params": weights}, {"params": biases, "lr": 0.03}])
    for group in made.param_groups:
        group["lr"] *= 1.0 + row
        group["weight_decay"] *= row
    return made


@pytest.mark.parametrize("block", [1, 1 << 30])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_move_as_their_members_would(
    kind: str, clips: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked_optimizers, "BLOCK_ELEMENTS", block)
    alone, together = networks(3), networks(3)
    own = [optimizer_of(model, kind, row) for row, model in enumerate(alone)]
    theirs = [optimizer_of(model, kind, row) for row, model in enumerate(together)]
    limits = [None, 0.5, 100.0] if clips else [None] * 3
    layout = Layout.of(together[0], theirs[0], frozenset())
    stack: Any = None
    for step in range(30):
        if step == 4:  # taken over with moments in flight
            parameters = StackedParameters(layout, together, rows=4)
            stack = stacked_optimizer(parameters, theirs)
            parameters.bind()
        for optimizer in (*own, *theirs):
            for group in optimizer.param_groups:
                group["lr"] *= 0.97
                if "betas" in group:
                    group["betas"] = (group["betas"][0] * 0.999, group["betas"][1])
        generator = torch.Generator().manual_seed(step)
        gradients = [
            [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
            for model in alone
        ]
        for model, optimizer, limit, given in zip(alone, own, limits, gradients, strict=True):
            single(model, optimizer, limit, given)
        if stack is None:
            for model, optimizer, limit, given in zip(together, theirs, limits, gradients, strict=True):
                single(model, optimizer, limit, given)
            continue
        by_name = [
            dict(zip((n for n, _ in m.named_parameters()), g, strict=True))
            for m, g in zip(alone, gradients, strict=True)
        ]
        parameters.keep_gradients(
            [
                torch.stack(
                    [*(given[name] for given in by_name), torch.full_like(by_name[0][name], torch.nan)]
                )
                for name in parameters.views
            ]
        )
        parameters.clip([*limits, None])
        stack.step([*(optimizer.param_groups for optimizer in theirs), None])
    for row, (model, optimizer) in enumerate(zip(together, theirs, strict=True)):
        parameters.release(row)
        stack.store(row, optimizer)
        assert_close(model.state_dict(), alone[row].state_dict())
        assert_close(optimizer.state_dict()["state"], own[row].state_dict()["state"])


def single(
    model: nn.Module, optimizer: torch.optim.Optimizer, limit: float | None, gradients: list[torch.Tensor]
) -> None:
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient.clone()
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()


def assert_close(mine: Any, theirs: Any) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        if isinstance(value, dict):
            assert_close(value, theirs[key])
        elif value is None:
            assert theirs[key] is None
        else:
            assert value.dtype == theirs[key].dtype
            assert torch.allclose(value, theirs[key], rtol=1e-12, atol=1e-14)


def test_released_tensors_share_nothing_with_the_rows() -> None:
    models = networks(2)
    optimizers = [optimizer_of(model, "adam", 0) for model in models]
    parameters = StackedParameters(Layout.of(models[0], optimizers[0], frozenset()), models, rows=2)
    parameters.bind()
    assert models[0][0].weight.data_ptr() == parameters.views["0.weight"][0].data_ptr()
    parameters.release(0)
    before = models[0][0].weight.detach().clone()
    parameters.matrix.zero_()
    assert torch.equal(models[0][0].weight, before)
    assert models[0][0].weight.untyped_storage().nbytes() == before.untyped_storage().nbytes()
    assert not models[1][0].weight.any()


def test_every_parameter_begins_at_an_aligned_column() -> None:
    (model,) = networks(1)
    layout = Layout.of(model, optimizer_of(model, "adam", 0), frozenset({"0.bias"}))
    assert [column.name for column in layout.columns] == ["0.weight", "1.weight", "1.bias"]
    assert all(column.start % ALIGNMENT == 0 for column in layout.columns)
    assert layout.groups[1].stop == layout.width


def test_members_updated_unequally_often_are_refused() -> None:
    models = networks(2)
    optimizers = [optimizer_of(model, "adam", 0) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    models[1][0].weight.grad = None
    optimizers[1].step()
    layout = Layout.of(models[0], optimizers[0], frozenset())
    with pytest.raises(ValueError, match=r"unequally often: \[1, 2\] steps"):
        StackedAdam(StackedParameters(layout, models, rows=2), optimizers)
