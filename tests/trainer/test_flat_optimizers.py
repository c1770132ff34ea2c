"""Flat Adam and AdamW: torch's results within the stated tolerance, torch's state, and everything that may happen to parameters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from automode import FlatAdam, FlatAdamW, Trainer, flatten
from automode.errors import UsageError
from automode.trainer.checkpointing import CheckpointKeeper

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {"progress": False, "console": False}
KINDS = [(FlatAdam, torch.optim.Adam), (FlatAdamW, torch.optim.AdamW)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: int = 100, *, first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 5, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).backward()
        optimizer.step()


def close(mine: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    return all(float((a - b).detach().abs().max()) <= TOLERANCE[a.dtype] for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("flat", "plain"), KINDS)
def test_a_hundred_steps_come_to_what_torch_comes_to(flat: Any, plain: Any, dtype: torch.dtype) -> None:
    given = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.05}
    mine, theirs = model_of(dtype), model_of(dtype)
    first, second = flat(mine.parameters(), **given), plain(theirs.parameters(), **given)
    train(mine, first)
    train(theirs, second)
    assert close(mine, theirs)
    buffers = {p.untyped_storage().data_ptr() for p in mine.parameters()}
    assert len(buffers) == 1


@pytest.mark.parametrize(("flat", "plain"), KINDS)
def test_states_go_both_ways(flat: Any, plain: Any) -> None:
    for source, target in ((flat, plain), (plain, flat)):
        mine, whole = model_of(), model_of()
        first = source(mine.parameters(), lr=2e-3)
        train(mine, first, 30)
        other = copy.deepcopy(mine)
        second = target(other.parameters())
        second.load_state_dict(first.state_dict())
        assert set(second.state_dict()["state"]) == set(first.state_dict()["state"])
        train(other, second, 30, first=30)
        train(whole, plain(whole.parameters(), lr=2e-3), 60)
        assert close(other, whole)
        assert {float(s["step"]) for s in second.state_dict()["state"].values()} == {60.0}


def test_groups_keep_their_own_rates_and_a_schedule_drives_them() -> None:
    made = []
    for kind in (FlatAdamW, torch.optim.AdamW):
        model = model_of()
        optimizer = kind(
            [
                {"params": model[0].parameters(), "lr": 1e-2},
                {"params": model[2].parameters(), "weight_decay": 0.5},
            ]
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        for step in range(12):
            train(model, optimizer, 1, first=step)
            schedule.step()
        made.append(model)
    assert close(*made)


def test_a_parameter_without_a_gradient_is_left_alone_as_torch_leaves_it() -> None:
    made = []
    for kind in (FlatAdamW, torch.optim.AdamW):
        model = model_of()
        model.register_parameter("never", nn.Parameter(torch.ones(3)))
        optimizer = kind(model.parameters(), lr=1e-2)
        for step in range(20):
            model[0].requires_grad_(step % 5 != 3)
            train(model, optimizer, 1, first=step)
        assert torch.equal(model.never, torch.ones(3))
        made.append((model, [float(s["step"]) for s in optimizer.state_dict()["state"].values()]))
    assert close(made[0][0], made[1][0])
    assert made[0][1] == made[1][1] == [16.0, 16.0, 20.0, 20.0]


def test_a_copy_and_a_moved_model_train_on_by_themselves() -> None:
    model = model_of()
    optimizer = FlatAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 10)
    other, copied = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    train(other, copied, 10, first=10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    for parameter in model.parameters():  # as a model that is moved to a device and back has it
        parameter.data = parameter.data.clone()
    train(model, optimizer, 10, first=10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("which", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_parameter_whose_data_are_replaced_is_trained_on_as_torch_trains_it(which: str) -> None:
    ends = []
    for kind in (FlatAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        optimizer = kind(model.parameters(), lr=0.05)
        for step in range(4):
            if step == 2:
                model.get_parameter(which).data = model.get_parameter(which).data * 0.5
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()
        ends.append(model.get_parameter(which).detach())
    assert torch.allclose(*ends, atol=1e-6)


def test_an_empty_parameter_does_no_harm() -> None:
    empty, other = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(2))
    optimizer = FlatAdamW([empty, other], lr=0.1)
    (other.sum() + empty.sum()).backward()
    optimizer.step()
    assert (other < 1).all()


def test_flatten_goes_on_from_where_an_optimizer_stands() -> None:
    mine, whole = model_of(), model_of()
    optimizer: Any = torch.optim.AdamW(mine.parameters(), lr=5e-3, fused=True)
    train(mine, optimizer, 20)
    made = flatten(optimizer)
    assert type(made) is FlatAdamW
    train(mine, made, 20, first=20)
    train(whole, torch.optim.AdamW(whole.parameters(), lr=5e-3), 40)
    assert close(mine, whole)
    assert type(flatten(torch.optim.Adam(model_of().parameters()))) is FlatAdam


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "got SGD"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "cannot do amsgrad=True"),
        (lambda p: torch.optim.Adam(p, maximize=True), "cannot do maximize=True"),
        (FlatAdamW, "got FlatAdamW"),
    ],
)
def test_what_cannot_be_flat_is_refused(make: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        flatten(make(model_of().parameters()))


def test_a_state_that_asks_for_more_and_a_sparse_gradient_are_refused() -> None:
    model = model_of()
    optimizer = FlatAdam(model.parameters())
    train(model, optimizer, 1)
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(UsageError, match=r"cannot do amsgrad=True; use torch.optim.Adam"):
        train(model, optimizer, 1)
    with pytest.raises(UsageError, match=r"complex64 came; use torch\.optim\.AdamW"):
        FlatAdamW([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = FlatAdam(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UsageError, match="flat buffers hold dense ones"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_named_twice_is_refused() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    with pytest.raises(UsageError, match=r"a group of 2 parameters names one of them twice"):
        FlatAdamW([parameter, parameter])


def test_hooks_and_closures_are_called() -> None:
    model = model_of()
    optimizer = FlatAdamW(model.parameters())
    heard: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    optimizer.register_step_post_hook(lambda *_: heard.append("after"))
    before = model[0].weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) != 0.0
    assert heard == ["before", "after"]
    assert not torch.equal(model[0].weight, before)
    optimizer.zero_grad(set_to_none=False)
    assert float(model[0].weight.grad.abs().sum()) == 0.0


def test_the_norm_of_the_gradients_is_that_of_all_of_them_together(tmp_path: Path) -> None:
    model = model_of()
    optimizer = FlatAdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    assert optimizer.gradient_norm() == 0.0
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 5)).square().sum().backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert float(optimizer.gradient_norm()) == pytest.approx(float(norm), rel=1e-6)
        optimizer.step()
    frames = []
    for kind in (FlatAdamW, torch.optim.AdamW):
        model = model_of()
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(64, 5, generator=generator)
        result = Trainer(max_epochs=2, session_dir=tmp_path, **COMMON).fit(
            model=model,
            optimizer=kind(model.parameters()),
            loss_fn=nn.CrossEntropyLoss(),
            train_loader=DataLoader(TensorDataset(inputs, (inputs[:, 0] > 0).long()), 16),
        )
        frames.append(result.frame("grad_norm"))
    assert frames[0] == pytest.approx(frames[1], rel=1e-4)


def test_a_graph_of_the_old_weights_cannot_be_run_backward() -> None:
    model = model_of()
    optimizer = FlatAdamW(model.parameters())
    loss = model(torch.ones(2, 5)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_in_one_buffer_are_stored_and_read_as_any_others(tmp_path: Path) -> None:
    model = model_of()
    train(model, FlatAdamW(model.parameters()), 3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


class Cut(Exception):
    """Ends a run as if it had been killed."""


@pytest.mark.parametrize("mode", ["observe", True])
def test_a_cut_does_not_show(mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(folder: Path, **given: Any) -> Any:
        torch.manual_seed(1)
        inputs = torch.randn(120, 5)
        targets = (inputs[:, 0] > 0).long()
        model = model_of()
        trainer = Trainer(
            max_epochs=3,
            automode=mode,
            val_every_n_epochs=1,
            clip_norm=0.5,
            session_dir=folder,
            seed=5,
            **given,
            **COMMON,
        )
        return trainer.fit(
            model=model,
            optimizer=FlatAdamW(model.parameters(), lr=1e-2),
            loss_fn=nn.CrossEntropyLoss(),
            train_loader=DataLoader(TensorDataset(inputs[:80], targets[:80]), 8, shuffle=True),
            val_loader=DataLoader(TensorDataset(inputs[80:], targets[80:]), 20),
        )

    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == 13:
            assert keeper.save("periodic") is not None
            raise Cut

    whole = fit(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(tmp_path)
    resumed = fit(tmp_path, resume="auto")
    assert resumed.frame("loss").tolist() == whole.frame("loss").tolist()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)
