"""The quick step leaves torch's bits behind, and stands aside wherever it might not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from automode import TensorLoader, Trainer
from automode.trainer import quick_adam, stretches
from automode.trainer.quick_adam import update_of
from automode.trainer.torchs_steps import clearing_of

Optimizer = torch.optim.Optimizer


def network(*, dtype: torch.dtype = torch.float32, wide: int = 9) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, wide), nn.Tanh(), nn.Linear(wide, 7), nn.ReLU(), nn.Linear(7, 2)).to(
        dtype
    )


def graded(model: nn.Module, turn: int) -> None:
    """Make the gradients of a step; the same ones for equal weights."""
    dtype = next(model.parameters()).dtype
    inputs = torch.linspace(-1, 1 + turn, 40, dtype=dtype).reshape(8, 5).sin()
    model.zero_grad()
    model(inputs).square().mean().backward()


def all_bits(model: nn.Module, optimizer: Optimizer) -> list[bytes]:
    kept = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [tensor.detach().numpy().tobytes() for tensor in (*model.parameters(), *kept)]


def trained(
    kind: Any, *, quick: bool, dtype: torch.dtype = torch.float32, wide: int = 9, **given: Any
) -> tuple[list[bytes], int]:
    """Train, with rates and betas that change; the bits at the end, and how many steps were quick."""
    model = network(dtype=dtype, wide=wide)
    optimizer = kind(model.parameters(), **given)
    quick_steps = 0
    for turn in range(25):
        graded(model, turn)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + turn)
        optimizer.param_groups[0]["betas"] = (0.9 - turn / 100, 0.999)
        update = update_of(optimizer) if quick else optimizer.step
        quick_steps += update != optimizer.step
        update()
    return all_bits(model, optimizer), quick_steps


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [9, 9000])  # of the second not all parameters step together
def test_weights_moments_and_counts_are_torchs_bit_by_bit(
    kind: Any, weight_decay: float, dtype: torch.dtype, wide: int
) -> None:
    quick, steps = trained(kind, quick=True, dtype=dtype, wide=wide, weight_decay=weight_decay)
    torchs, none = trained(kind, quick=False, dtype=dtype, wide=wide, weight_decay=weight_decay)
    assert quick == torchs
    assert (steps, none) == (24, 0)  # torch makes the moments in the first step


def test_a_torch_that_comes_to_other_bits_keeps_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told = torch._foreach_lerp_

    def other(firsts: list[Tensor], given: list[Tensor], weight: float) -> None:
        told(firsts, given, weight + 1e-7)

    monkeypatch.setattr(torch, "_foreach_lerp_", other)
    quick_adam._agrees.cache_clear()
    try:
        assert trained(torch.optim.AdamW, quick=True)[1] == 0
    finally:
        quick_adam._agrees.cache_clear()


def stepped(kind: Any = torch.optim.AdamW, **given: Any) -> tuple[nn.Module, Optimizer]:
    model = network()
    optimizer: Optimizer = kind(model.parameters(), **given)
    graded(model, 0)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    "given",
    [{"amsgrad": True}, {"maximize": True}, {"foreach": True}, {"fused": True}],
)
def test_settings_of_other_ways_keep_torchs_step(given: dict[str, Any]) -> None:
    optimizer = stepped(torch.optim.AdamW, **given)[1]
    assert update_of(optimizer) == optimizer.step


def test_other_classes_and_changed_steps_are_called_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.optim.AdamW):
        pass

    for kind in (Own, torch.optim.NAdam):
        optimizer = stepped(kind)[1]
        assert update_of(optimizer) == optimizer.step
    optimizer = stepped()[1]
    assert update_of(optimizer) != optimizer.step

    def changed(closure: Any = None) -> None:
        pass

    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "step", changed)
        assert update_of(optimizer) is changed
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", changed)
        assert update_of(optimizer) == optimizer.step
    called: list[bool] = []

    def forget(set_to_none: bool) -> None:
        called.append(set_to_none)

    monkeypatch.setattr(optimizer, "zero_grad", forget)
    clearing_of(optimizer)()
    assert called == [True]


def test_a_schedule_knows_that_the_optimizer_has_stepped(recwarn: pytest.WarningsRecorder) -> None:
    model, optimizer = stepped()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    graded(model, 1)
    update = update_of(optimizer)
    assert update != optimizer.step
    update()
    schedule.step()  # warns where it believes that it steps first
    assert not recwarn.list


def test_hooks_that_come_later_are_called() -> None:
    model, optimizer = stepped()
    update = update_of(optimizer)
    heard: list[str] = []
    hook = optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    graded(model, 1)
    update()
    hook.remove()
    graded(model, 2)
    update()
    assert heard == ["before"]
    assert float(optimizer.state[next(model.parameters())]["step"]) == 3


def test_a_gradient_that_stays_away_or_comes_back_is_torchs_matter() -> None:
    def run(quick: bool) -> list[bytes]:
        model, optimizer = stepped()
        update = update_of(optimizer) if quick else optimizer.step
        for turn in range(1, 6):
            graded(model, turn)
            if turn in (2, 3):
                next(model.parameters()).grad = None
            update()
            # Counts differ from here on, so that a quick step looked for anew is refused.
            if quick and turn == 2:
                assert update_of(optimizer) == optimizer.step
        return all_bits(model, optimizer)

    assert run(quick=True) == run(quick=False)


def test_a_loaded_state_is_not_stepped_past() -> None:
    def run(quick: bool) -> list[bytes]:
        model, optimizer = stepped()
        kept = optimizer.state_dict()
        kept = {**kept, "state": {k: {n: t.clone() for n, t in s.items()} for k, s in kept["state"].items()}}
        update = update_of(optimizer) if quick else optimizer.step
        for turn in range(1, 5):
            if turn == 3:
                optimizer.load_state_dict(kept)
            graded(model, turn)
            update()
        return all_bits(model, optimizer)

    assert run(quick=True) == run(quick=False)


def test_weights_that_share_memory_step_one_after_the_other() -> None:
    memory = torch.linspace(-1, 1, 8)
    pair = [nn.Parameter(memory[:6]), nn.Parameter(memory[2:])]
    optimizer = torch.optim.AdamW(pair)
    for parameter in pair:
        parameter.grad = torch.ones(6)
    optimizer.step()
    assert update_of(optimizer) == optimizer.step


def test_gradients_are_forgotten_and_autograd_is_left_on() -> None:
    model, optimizer = stepped()
    graded(model, 1)
    update_of(optimizer)()
    assert torch.is_grad_enabled()
    clearing_of(optimizer)()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_old_graph_is_refused_after_the_step_as_after_torchs() -> None:
    model, optimizer = stepped()
    update = update_of(optimizer)
    loss = model(torch.ones(2, 5)).square().sum()
    loss.backward(retain_graph=True)
    update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_trainers_plain_step_is_the_quick_one_and_equals_a_loop_by_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    found: list[bool] = []

    def noted(optimizer: Optimizer) -> Any:
        update = update_of(optimizer)
        found.append(update != optimizer.step)
        return update

    monkeypatch.setattr(stretches, "update_of", noted)
    inputs = torch.linspace(-2, 2, 400).sin().reshape(80, 5)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())

    def parts() -> dict[str, Any]:
        model = network()
        return {
            "model": model,
            "optimizer": torch.optim.AdamW(model.parameters()),
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
    assert found[0] is False
    assert found[1:] == [True] * (len(found) - 1)
    assert len(found) >= 3
    assert all_bits(watched["model"], watched["optimizer"]) == all_bits(bare["model"], bare["optimizer"])


class Restarting(torch.optim.lr_scheduler.ConstantLR):
    """Forgets the moments now and then, as warm restarts do."""

    def step(self, *given: Any) -> None:
        super().step(*given)
        if self.last_epoch % 13 == 12:
            self.optimizer.state.clear()


@pytest.mark.parametrize("chained", [False, True])
def test_a_scheduler_that_forgets_the_moments_is_followed_at_once(chained: bool, tmp_path: Any) -> None:
    inputs = torch.linspace(-2, 2, 400).sin().reshape(80, 5)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())

    def parts() -> dict[str, Any]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler: Any = Restarting(optimizer, factor=0.5, total_iters=9)
        if chained:
            scheduler = torch.optim.lr_scheduler.ChainedScheduler([scheduler], optimizer=optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "loss_fn": nn.CrossEntropyLoss(),
            "train_loader": TensorLoader(data, batch_size=8),
            "scheduler": scheduler,
        }

    watched, bare = parts(), parts()
    Trainer(
        max_epochs=4,
        automode="off",
        session_dir=tmp_path,
        progress=False,
        console=False,
        scheduler_interval="step",
    ).fit(**watched)
    for _ in range(4):
        for batch, targets in bare["train_loader"]:
            bare["optimizer"].zero_grad()
            bare["loss_fn"](bare["model"](batch), targets).backward()
            bare["optimizer"].step()
            bare["scheduler"].step()
    assert all_bits(watched["model"], watched["optimizer"]) == all_bits(bare["model"], bare["optimizer"])
