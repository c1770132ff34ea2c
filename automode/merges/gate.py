r"""The gate: a switch-softmax router over frozen experts, on the parent's own features.

``p(y | x) = sum_e g_e(x) p_e(y | x)`` with ``g = softmax(MLP(whitened features) / temperature)``. The experts are frozen
and their per-sample log-likelihoods are computed once, so that fitting costs next to nothing beside one training step
of the experts; the gate sees features that the parent computes anyway, and nothing that the parent does not see: a gate
with more information than the model wins by the information and not by the experts.

The loss is the mixture's negative log-likelihood plus ``load_balance`` times the Switch auxiliary term
``k * sum_e f_e P_e`` (``f``: share of samples whose first choice is ``e``; ``P``: mean probability), which is 1 for a
balanced gate and ``k`` for one that always takes the same expert.

References:
    Jacobs et al. 1991, Adaptive mixtures of local experts; Fedus et al. 2022, Switch transformers, arXiv:2101.03961,
    equation 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.whitening import MAX_DIMENSIONS, whiten

HIDDEN_UNITS = 32


def most_parameters(features: int | None, experts: int) -> int:
    """Count the trained parameters of a gate, at the most.

    Args:
        features: of a row; None where that is not known.
        experts: ``k``, the control among them.
    """
    kept = MAX_DIMENSIONS if features is None else min(features, MAX_DIMENSIONS)
    return HIDDEN_UNITS * (kept + 1) + experts * (HIDDEN_UNITS + 1)


class Gate(nn.Module):
    """Whitening, one hidden layer of 32 units, and a softmax over the experts.

    Args:
        in_features: ``d``, length of a raw feature vector.
        dimensions: ``m``, principal directions kept, at most ``d``.
        experts: ``k``, at least 2.
        hidden: hidden units.
        temperature: divides the scores; above 0. Small values route harder.

    As built, every weight is 0: the uniform mixture. :func:`fit_gate` or a saved state fills it.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(
        self,
        in_features: int,
        dimensions: int,
        experts: int,
        *,
        hidden: int = HIDDEN_UNITS,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if min(in_features, dimensions, hidden) < 1 or experts < 2:
            raise MergeError(
                f"a gate over {experts} experts on {in_features} features ({dimensions} kept, {hidden} hidden units) "
                f"was asked for; at least 2 experts and 1 of everything else are needed"
            )
        _check_temperature(temperature)
        self.temperature = float(temperature)
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("whitening", torch.zeros(in_features, dimensions))
        self.inner = _zero_linear(dimensions, hidden)
        self.outer = _zero_linear(hidden, experts)

    @property
    def experts(self) -> int:
        """How many experts the gate routes to."""
        return int(self.outer.out_features)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, as JSON can hold them."""
        return {
            "in_features": int(self.mean.shape[0]),
            "dimensions": int(self.whitening.shape[1]),
            "experts": self.experts,
            "hidden": int(self.inner.out_features),
            "temperature": self.temperature,
        }

    def forward(self, features: Tensor) -> Tensor:
        """Return log-weights ``[..., k]`` (they exponentiate to weights that sum to 1) for features ``[..., d]``."""
        return torch.log_softmax(
            self.scores((features.to(self.mean.dtype) - self.mean) @ self.whitening), dim=-1
        )

    def scores(self, whitened: Tensor) -> Tensor:
        """Return unnormalised log-weights ``[..., k]`` for whitened features ``[..., m]``."""
        hidden = torch.relu(self.inner(whitened))
        scores: Tensor = self.outer(hidden)
        return scores / self.temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """How a fitted gate behaves on the data that it was fitted on (judge it on other data).

    Attributes:
        loads: mean weight of each expert; sums to 1.
        top1_loads: share of samples whose first choice is each expert; sums to 1.
        entropy: mean entropy of the weights, in nats: 0 is hard routing, ``log k`` ignores the sample.
        mixture_nll: mean negative log-likelihood of the soft mixture, nats a sample.
        top1_nll: the same when only the first choice answers.
        best_expert: index of the best single expert.
        best_expert_nll: its mean negative log-likelihood.
        samples: samples fitted on.
        epochs: passes over the cached values.
        parameters: the gate's trained parameters, for charging ``3 * samples * epochs`` passes of so small a network.
        temperature: as given.
        load_balance: as given.
        seed: as given.
    """

    loads: tuple[float, ...]
    top1_loads: tuple[float, ...]
    entropy: float
    mixture_nll: float
    top1_nll: float
    best_expert: int
    best_expert_nll: float
    samples: int
    epochs: int
    parameters: int
    temperature: float
    load_balance: float
    seed: int


def fit_gate(
    features: Tensor,
    expert_log_lik: Tensor,
    *,
    temperature: float = 1.0,
    load_balance: float = 0.01,
    epochs: int = 20,
    seed: int = 0,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-2,
    batch_size: int = 64,
    hidden: int = HIDDEN_UNITS,
    max_dimensions: int = MAX_DIMENSIONS,
) -> tuple[Gate, GateReport]:
    """Fit a gate by AdamW on cached features and log-likelihoods; deterministic, global random state untouched.

    Args:
        features: ``[n, d]``, the parent's features of held-out samples that trained no expert.
        expert_log_lik: ``[n, k]``, each frozen expert's log-likelihood of each sample's label in nats (minus the
            cross-entropy; for regression :func:`gaussian_log_likelihood`).
        temperature: divides the scores; above 0.
        load_balance: weight of the Switch auxiliary term, 0 or more.
        epochs: passes over the samples, at least 1.
        seed: initial weights and minibatch order derive from it.
        learning_rate: initial rate, decays linearly to 0.
        weight_decay: decoupled, on the weight matrices.
        batch_size: samples a step.
        hidden: hidden units.
        max_dimensions: most principal directions kept by the whitening.

    Returns:
        The gate, in evaluation mode with frozen parameters on the features' device, and its report.

    Raises:
        MergeError: shapes do not fit, values are not finite, there are fewer than 2 samples, or a setting is out of
            its range.
    """
    _check_fit(features, expert_log_lik, load_balance, epochs, batch_size)
    inputs = features.detach().to("cpu", torch.float32)
    log_lik = expert_log_lik.detach().to("cpu", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    mean, whitening = whiten(inputs, max_dimensions)
    gate = Gate(inputs.shape[1], whitening.shape[1], log_lik.shape[1], hidden=hidden, temperature=temperature)
    _initialise(gate, mean, whitening, generator)
    with torch.enable_grad():
        _descend(
            gate,
            (inputs - mean) @ whitening,
            log_lik,
            generator=generator,
            load_balance=load_balance,
            epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
        )
    gate.requires_grad_(False).eval()
    report = _report(gate, inputs, log_lik, epochs=epochs, load_balance=load_balance, seed=seed)
    return gate.to(features.device), report


def cross_fit(
    features: Tensor, expert_log_lik: Tensor, *, folds: int = 2, seed: int = 0, **settings: Any
) -> Tensor:
    """Return each sample's log-weights from a gate that was not fitted on it.

    This is how a gate is judged on the same held-out half that fits it (for the number of clusters, or a rung's value).

    Args:
        features: as for :func:`fit_gate`.
        expert_log_lik: likewise.
        folds: parts, at least 2; each is predicted by a gate fitted on the others.
        seed: the folds and the gates derive from it.
        settings: passed on to :func:`fit_gate`.

    Returns:
        ``[n, k]`` log-weights on the features' device, in the order of the samples.

    Raises:
        MergeError: as :func:`fit_gate`, or there are fewer than two samples to fit on in a fold.
    """
    samples = len(features)
    if folds < 2 or samples - math.ceil(samples / max(folds, 1)) < 2:
        raise MergeError(
            f"{samples} samples cannot be cross-fitted in {folds} folds: at least 2 folds and 4 samples"
        )
    part = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).to(features.device) % folds
    log_weights = torch.empty(samples, expert_log_lik.shape[1], device=features.device)
    for fold in range(folds):
        held, rest = part == fold, part != fold
        gate, _ = fit_gate(
            features[rest], expert_log_lik[rest.to(expert_log_lik.device)], seed=seed, **settings
        )
        with torch.no_grad():
            log_weights[held] = gate(features[held])
    return log_weights


def gaussian_log_likelihood(squared_errors: Tensor, *, dimensions: int = 1) -> Tensor:
    """Turn the experts' squared errors into log-likelihoods under one shared noise variance.

    The variance is the best single expert's mean squared error, so that a difference of one expert's error to
    another's weighs as much as the noise of the better one says.

    Args:
        squared_errors: ``[n, k]``, summed over a sample's target dimensions.
        dimensions: how many target dimensions were summed.

    Returns:
        ``[n, k]`` log-likelihoods in nats.

    Raises:
        MergeError: an error is negative or not finite, or not of shape ``[n, k]``.
    """
    if squared_errors.dim() != 2 or squared_errors.shape[0] == 0 or dimensions < 1:
        raise MergeError(
            f"squared errors of shape {tuple(squared_errors.shape)} over {dimensions} dimensions came; "
            f"[samples, experts] and at least one dimension are needed"
        )
    if not bool((torch.isfinite(squared_errors) & (squared_errors >= 0)).all()):
        raise MergeError(
            "squared errors must be finite and not negative: leave out the experts that diverged"
        )
    variance = squared_errors.mean(dim=0).min().clamp_min(torch.finfo(torch.float32).tiny) / dimensions
    return -0.5 * (squared_errors / variance + dimensions * torch.log(2 * math.pi * variance))


def switch_load_balance(log_weights: Tensor) -> Tensor:
    """Return the Switch auxiliary term for log-weights ``[n, k]``: 1 when balanced, ``k`` when collapsed."""
    experts = log_weights.shape[1]
    first_choice = torch.nn.functional.one_hot(log_weights.argmax(dim=1), experts).to(log_weights.dtype)
    return experts * (first_choice.mean(dim=0) * log_weights.exp().mean(dim=0)).sum()


def _descend(
    gate: Gate,
    whitened: Tensor,
    log_lik: Tensor,
    *,
    generator: torch.Generator,
    load_balance: float,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
) -> None:
    groups = [
        {"params": [gate.inner.weight, gate.outer.weight], "weight_decay": weight_decay},
        {"params": [gate.inner.bias, gate.outer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    samples = len(whitened)
    steps = epochs * math.ceil(samples / batch_size)
    done = 0
    for _ in range(epochs):
        order = torch.randperm(samples, generator=generator)
        for start in range(0, samples, batch_size):
            chosen = order[start : start + batch_size]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1.0 - done / steps)
            log_weights = torch.log_softmax(gate.scores(whitened[chosen]), dim=-1)
            loss = -torch.logsumexp(log_weights + log_lik[chosen], dim=1).mean()
            loss = loss + load_balance * switch_load_balance(log_weights)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            done += 1


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    # built on the meta device: the usual initialisation would draw from the global random state
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _initialise(gate: Gate, mean: Tensor, whitening: Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        gate.mean.copy_(mean)
        gate.whitening.copy_(whitening)
        nn.init.kaiming_uniform_(gate.inner.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(gate.inner.bias)
        # small scores: the gate starts near the uniform mixture and has to earn every preference
        nn.init.normal_(gate.outer.weight, std=0.01, generator=generator)
        nn.init.zeros_(gate.outer.bias)


def _report(
    gate: Gate, inputs: Tensor, log_lik: Tensor, *, epochs: int, load_balance: float, seed: int
) -> GateReport:
    with torch.no_grad():
        log_weights = gate(inputs)
    weights = log_weights.exp()
    first = log_weights.argmax(dim=1)
    singles = -log_lik.mean(dim=0)
    return GateReport(
        loads=tuple(weights.mean(dim=0).tolist()),
        top1_loads=tuple((torch.bincount(first, minlength=gate.experts) / len(first)).tolist()),
        entropy=float(-(weights * log_weights).sum(dim=1).mean()),
        mixture_nll=float(-torch.logsumexp(log_weights + log_lik, dim=1).mean()),
        top1_nll=float(-log_lik.gather(1, first[:, None]).mean()),
        best_expert=int(singles.argmin()),
        best_expert_nll=float(singles.min()),
        samples=len(inputs),
        epochs=epochs,
        parameters=sum(parameter.numel() for parameter in gate.parameters()),
        temperature=gate.temperature,
        load_balance=load_balance,
        seed=seed,
    )


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise MergeError(f"the gate's temperature is {temperature}, but must be finite and above 0")


def _check_fit(features: Tensor, log_lik: Tensor, load_balance: float, epochs: int, batch_size: int) -> None:
    if features.dim() != 2 or log_lik.dim() != 2 or len(features) != len(log_lik):
        raise MergeError(
            f"features {tuple(features.shape)} and log-likelihoods {tuple(log_lik.shape)} came; "
            f"[n, d] and [n, k] with the same n are needed"
        )
    if len(features) < 2 or log_lik.shape[1] < 2 or features.shape[1] < 1:
        raise MergeError(
            f"{len(features)} samples, {features.shape[1]} features and {log_lik.shape[1]} experts came; "
            f"at least 2 samples, 1 feature and 2 experts are needed"
        )
    if not bool(torch.isfinite(features).all()):
        raise MergeError("the features are not all finite: a gate cannot be fitted on a diverged parent")
    if not bool(torch.isfinite(log_lik).all()):
        raise MergeError(
            "the experts' log-likelihoods are not all finite: clamp probabilities of 0, or leave out diverged experts"
        )
    if not (math.isfinite(load_balance) and load_balance >= 0) or epochs < 1 or batch_size < 1:
        raise MergeError(
            f"load_balance {load_balance}, epochs {epochs} and batch_size {batch_size} came; "
            f"load_balance must be >= 0 and the counts at least 1"
        )
