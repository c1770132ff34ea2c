"""Rewritten graphs compute what the traced ones computed, with fewer and faster operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from automode.backends import graph_passes
from automode.backends.graph_passes import is_random, simplify

F = torch.nn.functional


def traced(function: Callable[..., object], *inputs: Tensor) -> GraphModule:
    return make_fx(functionalize(function, remove="mutations"))(*inputs)


def operations(module: GraphModule) -> list[str]:
    return [
        getattr(node.target, "__name__", str(node.target))
        for node in module.graph.nodes
        if node.op == "call_function"
    ]


def rewritten(function: Callable[..., object], *inputs: Tensor) -> tuple[list[str], list[str]]:
    """Check that a function's graph means the same after rewriting; returns its operations before and after."""
    module = traced(function, *inputs)
    before, expected = operations(module), module(*inputs)
    assert simplify(module, list(inputs))
    after = module(*inputs)
    with torch.inference_mode():
        again = module(*inputs)
    for tensors in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, after, again)), strict=True):
        first, second, third = tensors
        assert torch.allclose(first, second, rtol=1e-12, atol=1e-14)
        assert torch.equal(second, third)
    return before, operations(module)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_views_of_the_same_shape_and_transposes_of_transposes_vanish() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.view(4, 6).expand(4, 6).transpose(0, 1).transpose(1, 0).permute(0, 1)
        return torch.ops.aten.mul.Scalar(y, 1).exp()

    _, after = rewritten(function, double(4, 6))
    assert after == ["exp"]


def test_a_transpose_of_another_transpose_stays() -> None:
    _, after = rewritten(lambda x: x.transpose(0, 1).transpose(1, 2).exp(), double(2, 3, 4))
    assert after == ["transpose", "transpose", "exp"]


def test_a_factor_of_one_that_changes_the_dtype_stays() -> None:
    function = lambda x: torch.ops.aten.mul.Scalar(x, 1.0)  # noqa: E731
    module = traced(function, torch.arange(3))
    simplify(module, [torch.arange(3)])
    assert module(torch.arange(3)).dtype == torch.float32


def test_what_is_asked_for_twice_is_computed_once() -> None:
    _, after = rewritten(lambda x: (x.exp() + 1) * (x.exp() + 1), double(5))
    assert after.count("exp") == 1


def test_random_numbers_asked_for_twice_are_drawn_twice() -> None:
    module = traced(lambda x: torch.bernoulli(x) - torch.bernoulli(x), torch.full((1000,), 0.5))
    assert is_random(module)
    simplify(module, [torch.full((1000,), 0.5)])
    # Two equal draws of 1000 coins: 2**-1000.
    assert module(torch.full((1000,), 0.5)).abs().max() == 1


def test_constants_are_made_once_and_in_the_right_place() -> None:
    before, after = rewritten(lambda x: x * torch.ones_like(x) + torch.zeros(3, dtype=x.dtype), double(2, 3))
    assert sum("ones" in name or "zeros" in name for name in before) == 2
    assert sum("ones" in name or "zeros" in name for name in after) == 0


def test_a_bias_joins_its_product() -> None:
    _, after = rewritten(
        lambda b, x, y: b.unsqueeze(1) + torch.bmm(x, y), double(3, 5), double(3, 4, 2), double(3, 2, 5)
    )
    assert after == ["unsqueeze", "baddbmm"]


def test_a_product_that_is_needed_for_itself_or_grows_does_not_join() -> None:
    _, after = rewritten(
        lambda b, x, y: (b + torch.bmm(x, y), torch.bmm(x, y).exp()),
        double(3, 1, 5),
        double(3, 4, 2),
        double(3, 2, 5),
    )
    assert "baddbmm" not in after
    _, after = rewritten(
        lambda b, x, y: b + torch.bmm(x, y), double(3, 4, 5), double(1, 4, 2), double(1, 2, 5)
    )
    assert "baddbmm" not in after


@pytest.mark.parametrize("classes", [2, 10, 15, 16, 100])
def test_softmaxes_over_few_classes_run_over_rows(classes: int) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        def score(v: Tensor) -> Tensor:
            return (F.log_softmax(v, -1)[..., 0] * F.softmax(v, dim=-1)[..., 1]).sum()

        gradient, value = torch.func.grad_and_value(score)(x)
        return value, gradient

    module_input = double(3, 20, classes)
    module = traced(function, module_input)
    simplify(module, [module_input])
    dimensions = [
        node.args[2 if "backward" in str(node.target) else 1]
        for node in module.graph.nodes
        if "softmax" in str(node.target)
    ]
    assert len(dimensions) == 4
    assert set(dimensions) == ({1} if classes < graph_passes.FEW_CLASSES else {-1})
    rewritten(function, module_input)


@pytest.mark.parametrize("size", [4, 32])
def test_large_max_pools_run_channels_last(size: int) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        def pooled(v: Tensor) -> Tensor:
            return F.max_pool2d(v.relu(), 2).flatten(1).pow(3).sum()

        gradient, value = torch.func.grad_and_value(pooled)(x)
        return value, gradient

    before, after = rewritten(function, double(2, 8, size, size))
    copies = after.count("clone") - before.count("clone.default")
    assert copies == (3 if 2 * 8 * size * size >= graph_passes.MANY_VALUES else 0)


def test_a_graph_with_operations_in_place_is_left_alone() -> None:
    module = make_fx(lambda x: x.clone().add_(1).view(2, 2).view(2, 2))(torch.ones(2, 2))
    before = operations(module)
    assert not simplify(module, [torch.ones(2, 2)])
    assert operations(module) == before
