"""Embeddings are what the last layer with parameters is given, one row a sample, with the hook gone afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automode.errors import NotExecutableError
from automode.trainer.embedding import embeddings

pytestmark = pytest.mark.torch

N = 20


def step(model: nn.Module, batch: Any) -> tuple[Tensor, Any, Any]:
    x, y = batch
    outputs = model(x)
    return outputs.float().mean(), outputs, y


def batches(x: Tensor, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part))) for part in x.split(size)]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_rows_are_the_input_of_the_last_layer_with_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3), nn.Softmax(dim=1))
    x = torch.randn(N, 6)
    found, outputs, targets = embeddings(model, step, batches(x), seed=1)
    np.testing.assert_allclose(found, model[1](model[0](x)).detach(), rtol=1e-5)
    assert sum(len(part) for part in outputs) == sum(len(part) for part in targets) == N
    assert hooks(model) == 0


def test_wide_features_are_projected_by_the_seed_and_keep_their_distances() -> None:
    """Distances of a Gaussian projection to 64 dimensions stray by about 9 % (1/sqrt(2 * 64)).

    The seeds are fixed; over random seeds a median beyond 20 % would occur less than once in a million.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(500, 2))
    x = torch.randn(N, 500)
    first, _, _ = embeddings(model, step, batches(x), seed=1)
    again, _, _ = embeddings(model, step, batches(x, 3), seed=1)
    other, _, _ = embeddings(model, step, batches(x), seed=2)
    assert first.shape == (N, 64)
    np.testing.assert_allclose(first, again)
    assert not np.allclose(first, other)
    true = torch.pdist(x.double()).numpy()
    assert np.median(np.abs(torch.pdist(torch.from_numpy(first)).numpy() / true - 1)) < 0.2


def test_channels_are_features_and_positions_are_averaged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    x = torch.randn(N, 1, 6, 6)
    found, _, _ = embeddings(model, step, batches(x), seed=0)
    np.testing.assert_allclose(found, F.relu(model[0](x)).mean((2, 3)).detach(), rtol=1e-4, atol=1e-6)


class Flattening(nn.Module):
    """Gives its last layer one row a token, as some language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        return self.head(hidden.reshape(-1, 4)).reshape(*tokens.shape, 9)


def test_tokens_flattened_into_rows_are_brought_back_to_their_samples() -> None:
    torch.manual_seed(0)
    model, x = Flattening(), torch.randint(0, 9, (N, 7))
    found, _, _ = embeddings(model, step, batches(x), seed=0)
    np.testing.assert_allclose(found, model.table(x).mean(1).detach(), rtol=1e-5, atol=1e-6)


class Pooled(nn.Module):
    """Mixes samples, so that no row is one sample's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:3]).mean().expand(len(x), 2)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 2)
        self.never = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


@pytest.mark.parametrize(("model", "said"), [(Pooled(), "one sample's"), (Unused(), "takes no part")])
def test_a_network_without_such_rows_is_refused(model: nn.Module, said: str) -> None:
    with pytest.raises(NotExecutableError, match=said):
        embeddings(model, step, batches(torch.randn(N, 6)), seed=0)
    assert hooks(model) == 0


def test_a_failing_forward_leaves_no_hook_no_flag_and_no_random_number() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)).train()
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        embeddings(model, step, [*batches(torch.randn(4, 6)), *batches(torch.ones(4, 5))], seed=0)
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert not torch.equal(before, torch.get_rng_state())  # the test's own randn moved it
    moved = torch.get_rng_state()
    embeddings(model, step, batches(torch.ones(4, 6)), seed=0)
    assert torch.equal(moved, torch.get_rng_state())
