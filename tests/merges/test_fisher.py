"""The true diagonal Fisher, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.fisher import (
    Bernoulli,
    Categorical,
    FisherEstimate,
    Gaussian,
    Likelihood,
    diagonal_fisher,
)


class LoopOnly(nn.Module):
    """The same linear map, with control flow on values that no vectorisation can follow."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        if float(inputs.sum()) > 1e9:
            raise AssertionError
        outputs: Tensor = self.inner(inputs)
        return outputs


def inputs(samples: int, features: int = 3) -> Tensor:
    return torch.randn(samples, features, generator=torch.Generator().manual_seed(1))


def linear(outputs: int, features: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(features, outputs)


def test_a_logistic_regression_has_the_fisher_of_the_textbook() -> None:
    model, x = linear(3), inputs(200)
    repeats = 60
    estimate = diagonal_fisher(model, [x] * repeats, likelihood=Categorical(), seed=3)
    p = model(x).softmax(dim=1).detach()
    expected = (p * (1 - p)).T @ x.square() / len(x)
    # 12000 drawn labels: relative error about 1 %; 10 % is beyond five standard errors of each of 9 entries
    torch.testing.assert_close(estimate.diagonal["weight"], expected, rtol=0.10, atol=0.0)
    assert estimate.samples == repeats * 200
    assert estimate.passes == 4 * estimate.samples
    assert estimate.method == "vectorised"


def test_a_gaussian_regression_has_a_fisher_that_scales_with_one_over_the_variance() -> None:
    model, x = linear(1), inputs(500)
    estimate = diagonal_fisher(model, [x] * 40, likelihood=Gaussian(sigma=0.5), seed=3)
    # 20000 squared normals: relative error about 1.5 % with x**2 weights; 10 % is beyond six standard errors
    torch.testing.assert_close(estimate.diagonal["weight"][0], x.square().mean(0) / 0.25, rtol=0.10, atol=0.0)
    torch.testing.assert_close(estimate.diagonal["bias"], torch.tensor([4.0]), rtol=0.10, atol=0.0)


def test_independent_yes_or_no_labels_have_the_bernoulli_variance() -> None:
    model, x = linear(2), inputs(500)
    estimate = diagonal_fisher(model, [x] * 40, likelihood=Bernoulli(), seed=3)
    p = model(x).sigmoid().detach()
    torch.testing.assert_close(estimate.diagonal["bias"], (p * (1 - p)).mean(0), rtol=0.10, atol=0.0)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_both_ways_of_taking_gradients_give_the_same_numbers(likelihood: Likelihood) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4))
    batches = [(inputs(20), torch.zeros(20)), (inputs(7) + 1, torch.zeros(7))]
    whole = diagonal_fisher(model, batches, likelihood=likelihood, seed=5)
    single = diagonal_fisher(LoopOnly(model), batches, likelihood=likelihood, seed=5)
    assert (whole.method, single.method) == ("vectorised", "loop")
    for name, value in whole.diagonal.items():
        torch.testing.assert_close(single.diagonal[f"inner.{name}"], value, rtol=1e-4, atol=1e-7)


def test_sequence_outputs_sum_the_information_of_their_positions() -> None:
    model = nn.Linear(3, 4)
    estimate = diagonal_fisher(model, [torch.randn(6, 5, 3)], likelihood=Categorical())
    assert estimate.diagonal["weight"].shape == (4, 3)
    assert estimate.samples == 6


def test_it_is_not_the_empirical_fisher() -> None:
    # with every label wrong and the model sure, the empirical Fisher is large and the true one almost nothing
    model = linear(2)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([20.0, -20.0]))
        model.weight.zero_()
    wrong = torch.ones(50, dtype=torch.long)
    estimate = diagonal_fisher(model, [(inputs(50), wrong)], likelihood=Categorical())
    assert estimate.diagonal["weight"].max().item() < 1e-6


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = diagonal_fisher(model, [inputs(9)], likelihood=Categorical(), seed=4)
    torch.rand(3)
    torch.set_rng_state(state)
    again = diagonal_fisher(model, [inputs(9)], likelihood=Categorical(), seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, again.diagonal[name]) for name, value in first.diagonal.items())


def test_max_samples_stops_in_the_middle_of_a_batch() -> None:
    def count(limit: int | None) -> FisherEstimate:
        return diagonal_fisher(linear(2), [inputs(8)] * 3, likelihood=Categorical(), max_samples=limit)

    assert [count(limit).samples for limit in (5, 8, 11, None)] == [5, 8, 11, 24]


def test_frozen_parameters_have_no_fisher_and_unused_ones_have_zero() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.used, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.used(self.frozen(x))
            return outputs

    for model in (Partial(), LoopOnly(Partial())):
        prefix = "inner." if isinstance(model, LoopOnly) else ""
        diagonal = diagonal_fisher(model, [inputs(5)], likelihood=Categorical()).diagonal
        assert set(diagonal) == {
            f"{prefix}{layer}.{kind}" for layer in ("used", "unused") for kind in ("weight", "bias")
        }
        assert diagonal[f"{prefix}used.weight"].min().item() > 0
        assert diagonal[f"{prefix}unused.weight"].max().item() == 0


def test_what_gives_no_information_is_refused() -> None:
    with pytest.raises(MergeError, match="no input came"):
        diagonal_fisher(linear(2), [], likelihood=Categorical())
    with pytest.raises(MergeError, match="requires a gradient"):
        diagonal_fisher(linear(2).requires_grad_(False), [inputs(3)], likelihood=Categorical())
    with pytest.raises(MergeError, match="max_samples is 0"):
        diagonal_fisher(linear(2), [inputs(3)], likelihood=Categorical(), max_samples=0)
    with pytest.raises(MergeError, match="first dimension must be the samples"):
        diagonal_fisher(nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), [inputs(3)], likelihood=Gaussian())
    broken = linear(1)
    with torch.no_grad():
        broken.weight.fill_(float("inf"))
    with pytest.raises(MergeError, match="not all finite"):
        diagonal_fisher(broken, [inputs(3)], likelihood=Gaussian())
