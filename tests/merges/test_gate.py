"""The gate learns a routing that is there, and nothing else moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from automode.errors import MergeError
from automode.merges.gate import (
    Gate,
    cross_fit,
    fit_gate,
    gaussian_log_likelihood,
    switch_load_balance,
    whiten,
)


def two_regimes(samples: int = 600, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features whose first coordinate says which expert knows the answer; the scales are far apart on purpose."""
    generator = torch.Generator().manual_seed(seed)
    regime = torch.randint(0, 2, (samples,), generator=generator)
    features = torch.randn(samples, 10, generator=generator) * torch.logspace(-2, 2, 10)
    features[:, 0] += (regime * 2 - 1) * 0.05
    log_lik = torch.full((samples, 2), math.log(0.1))
    log_lik[torch.arange(samples), regime] = math.log(0.9)
    return features, log_lik, regime


def test_a_separable_routing_is_learned_in_five_epochs_and_generalises() -> None:
    features, log_lik, _ = two_regimes()
    gate, report = fit_gate(features, log_lik, epochs=5, seed=1)
    fresh, _, regime = two_regimes(seed=99)
    routed = gate(fresh).argmax(dim=1)
    # the shift of +-5 sigma makes the regimes separable; 0.95 leaves room for a fit on 50 steps
    assert (routed == regime).float().mean().item() > 0.95
    assert report.mixture_nll < report.best_expert_nll - 0.5
    assert report.top1_nll < report.best_expert_nll - 0.5
    assert report.samples == 600


def test_the_report_adds_up() -> None:
    features, log_lik, _ = two_regimes()
    gate, report = fit_gate(features, log_lik, epochs=2)
    assert sum(report.loads) == pytest.approx(1.0, abs=1e-5)
    assert sum(report.top1_loads) == pytest.approx(1.0, abs=1e-5)
    assert 0.0 <= report.entropy <= math.log(2) + 1e-6
    weights = gate(features).exp()
    assert report.mixture_nll == pytest.approx(
        float(-(weights * log_lik.exp()).sum(1).log().mean()), abs=1e-5
    )
    assert report.parameters == sum(p.numel() for p in gate.parameters())


def test_fitting_is_deterministic_and_leaves_the_global_random_state_alone() -> None:
    features, log_lik, _ = two_regimes(100)
    state = torch.get_rng_state()
    first, _ = fit_gate(features, log_lik, epochs=2, seed=7)
    torch.randn(3)
    torch.set_rng_state(state)
    second, _ = fit_gate(features, log_lik, epochs=2, seed=7)
    other, _ = fit_gate(features, log_lik, epochs=2, seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert not torch.equal(first.inner.weight, other.inner.weight)


def test_fitting_works_where_gradients_are_switched_off_and_gives_a_frozen_gate() -> None:
    features, log_lik, _ = two_regimes(100)
    with torch.no_grad():
        gate, _ = fit_gate(features, log_lik, epochs=1)
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert not gate.training


def test_without_regimes_the_gate_takes_the_better_expert() -> None:
    features, _, _ = two_regimes()
    log_lik = torch.tensor([math.log(0.3), math.log(0.8), math.log(0.1)]).repeat(600, 1)
    _, report = fit_gate(features, log_lik, load_balance=0.0)
    assert report.best_expert == 1
    assert report.top1_loads == (0.0, 1.0, 0.0)
    assert report.mixture_nll < report.best_expert_nll + 0.05


def test_load_balance_spreads_the_load_of_experts_that_are_as_good() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 4, generator=generator)
    log_lik = torch.tensor([[-1.0, -1.02]]).repeat(400, 1)
    _, free = fit_gate(features, log_lik, load_balance=0.0, epochs=40)
    _, balanced = fit_gate(features, log_lik, load_balance=1.0, epochs=40)
    assert max(balanced.top1_loads) < 0.8 < max(free.top1_loads)


def test_the_switch_term_is_one_when_balanced_and_k_when_collapsed() -> None:
    balanced = torch.log_softmax(torch.eye(4) * 50, dim=1)
    collapsed = torch.log_softmax(torch.eye(4)[[0, 0, 0, 0]] * 50, dim=1)
    assert switch_load_balance(balanced).item() == pytest.approx(1.0)
    assert switch_load_balance(collapsed).item() == pytest.approx(4.0)


def test_cross_fitting_judges_each_sample_by_a_gate_that_did_not_see_it() -> None:
    features, log_lik, regime = two_regimes()
    honest = cross_fit(features, log_lik, epochs=5)
    torch.testing.assert_close(honest.exp().sum(1), torch.ones(600))
    assert (honest.argmax(dim=1) == regime).float().mean().item() > 0.95
    # with experts that are right at random there is nothing to learn,
    # but a gate judged on its own samples looks far better
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(600, 40, generator=generator)
    right = torch.randint(0, 2, (600,), generator=generator)
    noise = torch.full((600, 2), math.log(0.1))
    noise[torch.arange(600), right] = math.log(0.9)
    fooled, _ = fit_gate(features, noise, epochs=40)
    assert (fooled(features).argmax(dim=1) == right).float().mean().item() > 0.8
    # 600 judged samples: standard error 0.02, so 0.6 is beyond five of them
    assert (cross_fit(features, noise, epochs=40).argmax(dim=1) == right).float().mean().item() < 0.6
    with pytest.raises(MergeError, match="cross-fitted in 2 folds"):
        cross_fit(features[:3], noise[:3])


def test_temperature_softens_the_weights() -> None:
    features, log_lik, _ = two_regimes(100)
    gate, _ = fit_gate(features, log_lik, epochs=3)
    hot = Gate(**{**gate.config(), "temperature": 10.0})
    hot.load_state_dict(gate.state_dict())
    assert hot(features).exp().amax(1).mean() < gate(features).exp().amax(1).mean()


def test_a_gate_as_built_is_the_uniform_mixture() -> None:
    gate = Gate(5, 3, 4)
    torch.testing.assert_close(gate(torch.randn(2, 7, 5)).exp(), torch.full((2, 7, 4), 0.25))


def test_whitened_features_are_uncorrelated_with_unit_variance() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(500, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 5
    mean, matrix = whiten(features)
    white = (features - mean) @ matrix
    torch.testing.assert_close(torch.cov(white.T), torch.eye(white.shape[1]), rtol=1e-3, atol=1e-3)


def test_constant_and_duplicated_features_whiten_to_what_varies() -> None:
    features = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 3)
    features[:, 2] = 7.0
    assert whiten(features)[1].shape == (3, 1)
    _, flat = whiten(torch.ones(10, 4))
    assert torch.equal(flat, torch.zeros(4, 1))
    assert whiten(torch.randn(300, 100, generator=torch.Generator().manual_seed(0)), 64)[1].shape == (100, 64)


def test_gaussian_log_likelihoods_are_those_of_the_shared_variance() -> None:
    errors = torch.tensor([[1.0, 4.0], [3.0, 0.5]])
    variance = 2.0
    normal = torch.distributions.Normal(0.0, math.sqrt(variance))
    torch.testing.assert_close(gaussian_log_likelihood(errors), normal.log_prob(errors.sqrt()))
    with pytest.raises(MergeError, match="not negative"):
        gaussian_log_likelihood(-errors)


def test_what_cannot_be_fitted_is_refused() -> None:
    features, log_lik, _ = two_regimes(20)
    for wrong, what in (
        ((features[:5], log_lik), r"\[n, d\]"),
        ((features[:1], log_lik[:1]), "at least 2 samples"),
        ((features, log_lik[:, :1]), "2 experts"),
        ((features * float("nan"), log_lik), "features are not all finite"),
        ((features, log_lik * float("inf")), "log-likelihoods are not all finite"),
    ):
        with pytest.raises(MergeError, match=what):
            fit_gate(*wrong)
    with pytest.raises(MergeError, match="temperature"):
        fit_gate(features, log_lik, temperature=0.0)
    with pytest.raises(MergeError, match="epochs 0"):
        fit_gate(features, log_lik, epochs=0)
    with pytest.raises(MergeError, match="at least 2 experts"):
        Gate(5, 3, 1)
