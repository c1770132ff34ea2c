"""The quick step of SGD leaves torch's bits behind, and stands aside wherever it might not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from automode import TensorLoader, Trainer
from automode.trainer import quick_sgd, stretches
from automode.trainer.quick_sgd import sgd_update_of

SGD = torch.optim.SGD
SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.02},
    {"maximize": True, "weight_decay": 0.02},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
]


def network(*, dtype: torch.dtype = torch.float32, wide: int = 9) -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Linear(5, wide), nn.Tanh(), nn.Linear(wide, 7), nn.ReLU(), nn.Linear(7, 2)
    return nn.Sequential(*layers).to(dtype)


def graded(model: nn.Module, turn: int) -> None:
    """Make the gradients of a step; the same ones for equal weights."""
    dtype = next(model.parameters()).dtype
    inputs = torch.linspace(-1, 1 + turn, 40, dtype=dtype).reshape(8, 5).sin()
    model.zero_grad()
    model(inputs).square().mean().backward()


def all_bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    kept = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor is not None]
    return [tensor.detach().numpy().tobytes() for tensor in (*model.parameters(), *kept)]


def trained(
    *, quick: bool, dtype: torch.dtype = torch.float32, wide: int = 9, **given: Any
) -> tuple[list[bytes], int]:
    """Train, with a rate that changes; the bits at the end, and how many steps were quick."""
    model = network(dtype=dtype, wide=wide)
    optimizer = SGD(model.parameters(), lr=1e-2, **given)
    quick_steps = 0
    for turn in range(20):
        graded(model, turn)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + turn)
        update = sgd_update_of(optimizer) if quick else optimizer.step
        quick_steps += update != optimizer.step
        update()
    return all_bits(model, optimizer), quick_steps


@pytest.mark.parametrize("given", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [9, 9000])  # of the second not all parameters step together
def test_weights_and_momenta_are_torchs_bit_by_bit(
    given: dict[str, Any], dtype: torch.dtype, wide: int
) -> None:
    quick, steps = trained(quick=True, dtype=dtype, wide=wide, **given)
    torchs, none = trained(quick=False, dtype=dtype, wide=wide, **given)
    assert quick == torchs
    # Torch makes the momenta in the first step.
    assert (steps, none) == (19 if "momentum" in given else 20, 0)


def test_a_torch_that_comes_to_other_bits_keeps_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told = torch._foreach_add_

    def other(tensors: list[Tensor], given: list[Tensor], alpha: float = 1.0) -> None:
        told(tensors, given, alpha=alpha * (1 + 1e-6))

    monkeypatch.setattr(torch, "_foreach_add_", other)
    quick_sgd._agrees.cache_clear()
    try:
        assert trained(quick=True)[1] == 0
    finally:
        quick_sgd._agrees.cache_clear()


def stepped(**given: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = SGD(model.parameters(), lr=1e-2, **given)
    graded(model, 0)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("given", [{"foreach": True}, {"fused": True}, {"differentiable": True}], ids=str)
def test_settings_of_other_ways_keep_torchs_step(given: dict[str, Any]) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=1e-2, **given)
    assert sgd_update_of(optimizer) == optimizer.step


def test_other_classes_several_groups_and_rates_in_tensors_are_left_to_torch() -> None:
    class Own(SGD):
        pass

    model = network()
    assert sgd_update_of(own := Own(model.parameters())) == own.step
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    assert sgd_update_of(several := SGD(groups)) == several.step
    optimizer = SGD(model.parameters(), lr=torch.tensor(0.01))
    twin = network()
    other = SGD(twin.parameters(), lr=torch.tensor(0.01))
    graded(model, 1)
    graded(twin, 1)
    sgd_update_of(optimizer)()
    other.step()
    assert all_bits(model, optimizer) == all_bits(twin, other)


@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_a_gradient_that_stays_away_or_comes_back_is_torchs_matter(given: dict[str, Any]) -> None:
    def run(quick: bool) -> list[bytes]:
        model, optimizer = stepped(**given)
        update = sgd_update_of(optimizer) if quick else optimizer.step
        for turn in range(1, 6):
            graded(model, turn)
            if turn in (2, 3):
                next(model.parameters()).grad = None
            update()
        return all_bits(model, optimizer)

    assert run(quick=True) == run(quick=False)


def test_momentum_may_be_switched_on_and_off_and_a_state_loaded() -> None:
    def run(quick: bool) -> list[bytes]:
        model, optimizer = stepped(momentum=0.9)
        kept = optimizer.state_dict()
        kept["state"] = {k: {n: t.clone() for n, t in s.items()} for k, s in kept["state"].items()}
        update = sgd_update_of(optimizer) if quick else optimizer.step
        for turn in range(1, 9):
            graded(model, turn)
            optimizer.param_groups[0]["momentum"] = 0.0 if turn in (3, 4) else 0.5 + turn / 20
            if turn == 6:
                optimizer.load_state_dict(kept)
            if quick and turn in (5, 7):
                update = sgd_update_of(optimizer)
            update()
        return all_bits(model, optimizer)

    assert run(quick=True) == run(quick=False)


def test_hooks_that_come_later_are_called_and_schedules_know_of_steps(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model, optimizer = stepped()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    update = sgd_update_of(optimizer)
    assert update != optimizer.step
    graded(model, 1)
    update()
    schedule.step()  # warns where it believes that it steps first
    assert not recwarn.list
    heard: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    update()
    assert heard == ["before"]


def test_sparse_gradients_and_shared_memory_come_to_torchs_bits() -> None:
    def run(quick: bool) -> list[bytes]:
        torch.manual_seed(1)
        table = nn.Embedding(20, 3, sparse=True)
        optimizer = SGD(table.parameters(), lr=0.1)
        for turn in range(4):
            optimizer.zero_grad()
            table(torch.tensor([1, 2, 2, turn + 3])).square().sum().backward()
            (sgd_update_of(optimizer) if quick else optimizer.step)()
        return all_bits(table, optimizer)

    assert run(quick=True) == run(quick=False)
    memory = torch.linspace(-1, 1, 8)
    optimizer = SGD([nn.Parameter(memory[:6]), nn.Parameter(memory[2:])], lr=0.1)
    assert sgd_update_of(optimizer) == optimizer.step


def test_autograd_is_left_on_and_an_old_graph_is_refused() -> None:
    model, optimizer = stepped()
    update = sgd_update_of(optimizer)
    loss = model(torch.ones(2, 5)).square().sum()
    loss.backward(retain_graph=True)
    update()
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("given", [{}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_the_trainers_plain_step_is_the_quick_one_and_equals_a_loop_by_hand(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    found: list[bool] = []

    def noted(optimizer: torch.optim.Optimizer) -> Any:
        update = sgd_update_of(optimizer)
        found.append(update != optimizer.step)
        return update

    monkeypatch.setattr(stretches, "sgd_update_of", noted)
    inputs = torch.linspace(-2, 2, 400).sin().reshape(80, 5)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())

    def parts() -> dict[str, Any]:
        model = network()
        return {
            "model": model,
            "optimizer": SGD(model.parameters(), lr=0.1, **given),
            "loss_fn": nn.CrossEntropyLoss(),
            "train_loader": TensorLoader(data, batch_size=8),
        }

    watched, bare = parts(), parts()
    Trainer(max_epochs=4, automode="off", session_dir=tmp_path, progress=False, console=False).fit(**watched)
    for _ in range(4):
        for batch, targets in bare["train_loader"]:
            bare["optimizer"].zero_grad()
            bare["loss_fn"](bare["model"](batch), targets).backward()
            bare["optimizer"].step()
    assert all(found[1:])
    assert len(found) >= 3
    assert all_bits(watched["model"], watched["optimizer"]) == all_bits(bare["model"], bare["optimizer"])
