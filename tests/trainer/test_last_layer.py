"""Gradient norms of single samples in closed form are those that a backward pass for each sample gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from automode.errors import NotExecutableError
from automode.trainer.last_layer import gradient_norms
from automode.trainer.per_sample import PerSampleLoss, per_sample_twin

pytestmark = pytest.mark.torch

N = 11


def step_for(loss_fn: Any) -> Any:
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Any, Any]:
        inputs, targets = batch
        outputs = model(inputs)
        return loss_fn(outputs, targets), outputs, targets

    return step


def settled(model: nn.Module, loss_fn: Any, inputs: Tensor, targets: Tensor) -> PerSampleLoss:
    twin = per_sample_twin(loss_fn)
    with torch.no_grad():
        outputs = model(inputs)
        assert twin.check(outputs, targets, loss_fn(outputs, targets))
    return twin


class Positions(nn.Module):
    """A last layer that sees five positions a sample; its scores are averaged over them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.last(inputs.reshape(len(inputs), 5, 4)).mean(dim=1)
        return found


@pytest.mark.parametrize("kind", ["classes", "no bias", "values", "positions", "after it"])
def test_closed_form_norms_equal_those_of_a_backward_pass_a_sample(kind: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(N, 20)
    loss_fn: Any = nn.CrossEntropyLoss()
    targets = torch.randint(0, 3, (N,))
    model: nn.Module = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    match kind:
        case "no bias":
            model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
        case "values":
            loss_fn, targets = nn.MSELoss(), torch.randn(N, 3)
        case "positions":
            model = Positions()
        case "after it":
            model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(dim=1))
            loss_fn = nn.NLLLoss()
    model.eval()
    twin = settled(model, loss_fn, inputs, targets)
    model.train()
    state = torch.get_rng_state()
    found = gradient_norms(
        model, step_for(loss_fn), twin, [(inputs[i : i + 4], targets[i : i + 4]) for i in range(0, N, 4)]
    )
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    layer = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    for i in range(N):
        loss = loss_fn(model(inputs[i : i + 1]), targets[i : i + 1])
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        expected = float(sum(g.double().square().sum() for g in gradients)) ** 0.5
        assert found[i] == pytest.approx(expected, rel=1e-5)


def test_other_last_layers_are_refused() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(N, 1, 6, 6), torch.randint(0, 3, (N,))
    model = nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten())
    loss_fn = nn.CrossEntropyLoss()
    twin = settled(model, loss_fn, inputs, targets)
    with pytest.raises(NotExecutableError, match="this network's is a Conv2d"):
        gradient_norms(model, step_for(loss_fn), twin, [(inputs, targets)])


def test_a_layer_that_is_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 6)

        def forward(self, inputs: Tensor) -> Tensor:
            found: Tensor = self.last(self.last(inputs))
            return found

    torch.manual_seed(0)
    inputs, targets = torch.randn(N, 6), torch.randint(0, 6, (N,))
    model, loss_fn = Twice(), nn.CrossEntropyLoss()
    twin = settled(model, loss_fn, inputs, targets)
    with pytest.raises(NotExecutableError, match="called 2 times"):
        gradient_norms(model, step_for(loss_fn), twin, [(inputs, targets)])
    assert np.isfinite(float(loss_fn(model(inputs), targets).detach()))
