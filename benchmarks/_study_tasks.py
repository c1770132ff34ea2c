"""Six small tasks for the signals study: scikit-learn's digits and generated data, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits, make_classification, make_friedman1
from torch import Tensor, nn

LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network and its data; ``rates`` are sensible learning rates for SGD with momentum and Adam."""

    name: str
    inputs: Tensor
    targets: Tensor
    network: Callable[[], nn.Module]
    loss: LossOf
    rates: tuple[float, float]


def _cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def _squares(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def _next_symbol(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


class Attention(nn.Module):
    """A transformer of one block, causal, with two heads."""

    def __init__(self, symbols: int, length: int, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, 2, -1)).unbind(-3)
        mixed = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        h = h + self.out(mixed.transpose(1, 2).flatten(-2))
        return self.head(h + self.down(torch.relu(self.up(self.norm2(h)))))


def _text(
    rng: np.random.Generator, symbols: int = 20, length: int = 8, rows: int = 1500
) -> tuple[Tensor, Tensor]:
    """Windows of a Markov source whose next symbol depends on the two before it."""
    table = rng.dirichlet(np.full(symbols, 0.15), size=(symbols, symbols)).cumsum(axis=-1)
    draws = rng.random(rows + length + 2)
    stream = [0, 1]
    for u in draws:
        stream.append(min(symbols - 1, int(np.searchsorted(table[stream[-2], stream[-1]], u))))
    windows = torch.tensor(np.lib.stride_tricks.sliding_window_view(stream, length + 1)[:rows].copy())
    return windows[:, :-1], windows[:, 1:]


@lru_cache(maxsize=1)
def tasks(seed: int = 0) -> dict[str, Task]:
    """Build the tasks; an eighth of the digits has a label drawn at random. The data are the same in every run, the networks' first weights and the batches are not."""
    rng = np.random.default_rng(seed)
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    wrong = rng.random(len(digits.target)) < 0.12
    labels = torch.tensor(np.where(wrong, rng.integers(0, 10, len(wrong)), digits.target))
    x, y = make_friedman1(n_samples=2000, noise=1.0, random_state=seed)
    y = (y - y.mean()) / y.std()
    rare_x, rare_y = make_classification(
        n_samples=2500, n_features=20, n_informative=8, weights=[0.92, 0.08], flip_y=0.03, random_state=seed
    )
    text = _text(rng)
    found = (
        Task(
            name="mlp",
            inputs=pixels,
            targets=labels,
            network=lambda: nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)),
            loss=_cross_entropy,
            rates=(0.05, 1e-3),
        ),
        Task(
            name="cnn",
            inputs=pixels.view(-1, 1, 8, 8),
            targets=labels,
            network=lambda: nn.Sequential(
                nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 10)
            ),
            loss=_cross_entropy,
            rates=(0.05, 2e-3),
        ),
        Task(
            name="autoencoder",
            inputs=pixels,
            targets=pixels,
            network=lambda: nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 64)),
            loss=_squares,
            rates=(0.5, 2e-3),
        ),
        Task(
            name="transformer",
            inputs=text[0],
            targets=text[1],
            network=lambda: Attention(20, 8),
            loss=_next_symbol,
            rates=(0.1, 3e-3),
        ),
        Task(
            name="regression",
            inputs=torch.tensor(x, dtype=torch.float32),
            targets=torch.tensor(y, dtype=torch.float32).unsqueeze(1),
            network=lambda: nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 1)),
            loss=_squares,
            rates=(0.03, 2e-3),
        ),
        Task(
            name="imbalanced",
            inputs=torch.tensor(rare_x, dtype=torch.float32),
            targets=torch.tensor(rare_y),
            network=lambda: nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 2)),
            loss=_cross_entropy,
            rates=(0.05, 1e-3),
        ),
    )
    return {task.name: task for task in found}
