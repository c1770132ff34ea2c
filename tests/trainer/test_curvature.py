"""Diagnostics against oracles: per-sample gradients, the exact Hessian, closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from automode.errors import NotExecutableError
from automode.trainer.curvature import edge_of, sharpest, spread_of, update_sizes


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data(n: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def per_sample(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[list[torch.Tensor]]:
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(model, p, (a[None],)), b[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return [[found[k][i] for k in parameters] for i in range(len(x))]


def test_the_spread_of_single_samples_is_the_covariance_of_their_gradients() -> None:
    model = network()
    x, y = data(40)
    gradients = per_sample(model, x, y)
    flat = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in gradients]).double()
    trace = float(flat.var(0, unbiased=True).sum())
    square = float(flat.mean(0).square().sum()) - trace / 40
    found = spread_of(gradients, 1)
    assert found.variance == pytest.approx(trace, rel=1e-5)
    assert found.square == pytest.approx(square, rel=1e-4, abs=1e-6)
    assert found.examples == 40


def test_parts_of_any_size_estimate_the_same_noise() -> None:
    # 400 random partitions; the mean of an unbiased estimator lies within 4 standard errors (false failure: 1e-4).
    gradients = np.random.default_rng(0).standard_normal((64, 5)) * 2.0 + 0.5
    tensors = torch.from_numpy(gradients)
    trace, square = float(tensors.var(0).sum()), None
    order = np.random.default_rng(1)
    variances, squares = [], []
    for _ in range(400):
        mixed = tensors[order.permutation(64)].reshape(16, 4, 5).mean(1)
        found = spread_of([[part] for part in mixed], 4)
        variances.append(found.variance)
        squares.append(found.square)
    error = np.std(variances) / math.sqrt(400)
    assert abs(np.mean(variances) - trace) < 4 * error
    square = float(tensors.mean(0).square().sum()) - trace / 64
    assert abs(np.mean(squares) - square) < 4 * np.std(squares) / math.sqrt(400)


@settings(max_examples=30)
@given(st.floats(0.01, 100.0), st.integers(2, 12), st.integers(1, 7))
def test_the_noise_scale_does_not_depend_on_the_scale_of_the_loss(
    scale: float, parts: int, size: int
) -> None:
    rng = np.random.default_rng(parts * 10 + size)
    gradients = [[torch.from_numpy(rng.standard_normal(6))] for _ in range(parts)]
    plain = spread_of(gradients, size)
    scaled = spread_of([[g * scale for g in gs] for gs in gradients], size)
    assert scaled.variance == pytest.approx(plain.variance * scale**2, rel=1e-9)
    assert scaled.square == pytest.approx(plain.square * scale**2, rel=1e-6, abs=1e-9 * scale**2)


def test_equal_gradients_have_no_noise_and_one_part_tells_nothing() -> None:
    found = spread_of([[torch.ones(3)]] * 4, 8)
    assert (found.variance, found.square) == (0.0, pytest.approx(3.0))
    with pytest.raises(NotExecutableError, match="1 part"):
        spread_of([[torch.ones(3)]], 8)
    with pytest.raises(NotExecutableError, match="not finite"):
        spread_of([[torch.ones(3)], [torch.full((3,), math.nan)]], 8)


def quadratic(matrix: torch.Tensor):  # type: ignore[no-untyped-def]
    return lambda weights: [matrix @ weights[0]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=3, max_size=6), st.integers(0, 100))
def test_the_largest_eigenvalue_of_a_quadratic_is_found(values: list[float], seed: int) -> None:
    top = max(values) * 2.0 + 1.0  # a gap, so that 60 iterations suffice
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(len(values) + 1, len(values) + 1, generator=generator, dtype=torch.float64)
    )[0]
    matrix = basis @ torch.diag(torch.tensor([*values, top], dtype=torch.float64)) @ basis.T
    start = [torch.randn(len(values) + 1, generator=generator, dtype=torch.float64)]
    found = sharpest(quadratic(matrix), [torch.zeros(len(values) + 1, dtype=torch.float64)], start, 60)
    assert found.value == pytest.approx(top, rel=1e-4)
    assert found.residual < 1e-2
    assert float(found.direction[0].norm()) == pytest.approx(1.0)


def test_a_negative_eigenvalue_of_larger_magnitude_does_not_pass_for_the_largest() -> None:
    matrix = torch.diag(torch.tensor([-9.0, 2.0, 0.5], dtype=torch.float64))
    found = sharpest(
        quadratic(matrix), [torch.zeros(3, dtype=torch.float64)], [torch.ones(3, dtype=torch.float64)], 60
    )
    assert found.value == pytest.approx(2.0, rel=1e-3)
    assert found.products == 120


@pytest.mark.parametrize("seed", range(4))
def test_in_float32_the_sharpness_is_that_of_the_exact_hessian(seed: int) -> None:
    model = network(seed)
    x, y = data(64, seed)
    names = [k for k, _ in model.named_parameters()]
    weights = [p.detach() for p in model.parameters()]
    sizes, shapes = [w.numel() for w in weights], [w.shape for w in weights]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        return nn.functional.cross_entropy(
            functional_call(model, dict(zip(names, parts, strict=True)), (x.to(flat),)), y
        )

    def gradient(at: list[torch.Tensor]) -> list[torch.Tensor]:
        flat = torch.cat([w.flatten() for w in at])
        parts = grad(loss)(flat).split(sizes)
        return [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]

    flat = torch.cat([w.flatten() for w in weights]).double()
    exact = float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1])
    torch.manual_seed(seed)
    found = sharpest(gradient, weights, [torch.randn(s) for s in shapes], 60)
    assert found.value == pytest.approx(exact, rel=0.02)


def test_a_flat_loss_and_one_that_is_not_finite_have_no_sharpness() -> None:
    one = [torch.ones(3)]
    with pytest.raises(NotExecutableError, match="flat"):
        sharpest(lambda w: [torch.full((3,), 2.0)], one, one, 5)
    with pytest.raises(NotExecutableError, match="not finite"):
        sharpest(lambda w: [w[0] * math.nan], one, one, 5)
    with pytest.raises(NotExecutableError, match="flat"):
        sharpest(lambda w: [w[0]], one, [torch.zeros(3)], 5)


def test_the_size_of_adams_updates_is_that_of_the_steps_it_takes() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "lr": 1e-3}]
    optimizer = torch.optim.Adam(groups)
    x, y = data(64)
    for _ in range(7):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        optimizer.step()
    sizes, why = update_sizes(optimizer)
    assert why == ""
    for size, group, old in zip(sizes, optimizer.param_groups, before, strict=True):
        moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(group["params"], old, strict=True)])
        now = torch.cat([p.detach().flatten() for p in group["params"]])
        assert size is not None
        assert size.rms == pytest.approx(float(moved.square().mean().sqrt()) / group["lr"], rel=1e-3)
        assert size.ratio == pytest.approx(float(moved.norm() / now.norm()), rel=1e-3)
        assert size.surprise is not None
        assert 0.0 < size.surprise < 10.0


def test_other_optimizers_say_why_there_is_no_such_number() -> None:
    sizes, why = update_sizes(torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9))
    assert sizes == ()
    assert why == "SGD keeps no first and second moments to read an update from"


def test_the_edge_of_stability_is_that_of_gradient_descent_with_momentum() -> None:
    parameters = list(network().parameters())
    assert edge_of(torch.optim.SGD(parameters, lr=0.1)) == pytest.approx(20.0)
    assert edge_of(torch.optim.SGD(parameters, lr=0.1, momentum=0.9)) == pytest.approx(38.0)
    assert edge_of(torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)) is None
    assert edge_of(torch.optim.Adam(parameters)) is None
    assert (
        edge_of(torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:]}], lr=0.1))
        is None
    )
