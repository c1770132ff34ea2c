r"""Diagonal Fisher information, the true one: labels are drawn from the model's own predictions.

``F_i = E_x E_{y ~ p(y|x)} [(d log p(y|x) / d theta_i)^2]``, one label drawn for each input. With the data's labels in
place of drawn ones it would be the empirical Fisher, which is large exactly where a label is wrong and says little about
curvature.

Squared gradients are needed per sample. They are taken for a whole batch at once (``torch.func``) and, for models that
cannot be vectorised, sample by sample; both give the same numbers from the same seed, and the estimate says which ran.

References:
    Kunstner et al. 2019, Limitations of the empirical Fisher approximation, arXiv:1905.12558; Matena & Raffel 2022,
    arXiv:2111.09832.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.batches import (
    Batch,
    Forward,
    batch_size,
    device_of,
    forked_random_state,
    forward_inputs,
    map_tensors,
    move,
    rows,
    training_flags_kept,
)

_GRADIENTS_AT_ONCE = 2**24  # numbers held for one vectorised chunk of per-sample gradients (64 MiB in single)


class Likelihood(Protocol):
    """What a model's outputs say about labels: how to draw one, and how likely one is."""

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw labels for outputs ``[n, ...]`` with a CPU generator; returned on the outputs' device."""

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the log-probability of each sample's label, ``[n]`` nats; differentiable and vectorisable."""


@dataclass(frozen=True, slots=True)
class Categorical:
    """Outputs are logits with the classes in the last dimension; other dimensions but the first are summed."""

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one class for each position."""
        probabilities = outputs.detach().double().softmax(dim=-1).cpu()
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return drawn.view(outputs.shape[:-1]).to(outputs.device)

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the log-softmax at the labels."""
        chosen = outputs.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return _summed(chosen)


@dataclass(frozen=True, slots=True)
class Bernoulli:
    """Outputs are logits of independent yes-or-no labels."""

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw 0 or 1 for each output."""
        drawn = torch.bernoulli(outputs.detach().sigmoid().cpu(), generator=generator)
        return drawn.to(outputs.device)

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return minus the binary cross-entropy."""
        return _summed(-nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none"))


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Outputs are means of normal labels with one standard deviation.

    Attributes:
        sigma: standard deviation of the noise, above 0; scales the whole Fisher by ``1 / sigma**2``.
    """

    sigma: float = 1.0

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a normal number around each output."""
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        return outputs.detach() + self.sigma * noise.to(outputs.device)

    def log_prob(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the normal log-density."""
        constant = math.log(self.sigma) + 0.5 * math.log(2 * math.pi)
        return _summed(-0.5 * ((labels - outputs) / self.sigma) ** 2 - constant)


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherEstimate:
    """A diagonal Fisher and what it cost.

    Attributes:
        diagonal: parameter name to mean squared gradient, single precision or better, on the parameter's device.
        samples: inputs read.
        passes: forward-equivalents spent: one forward to draw the labels, and a forward and backward (3) for each.
        method: how per-sample gradients were taken.
    """

    diagonal: dict[str, Tensor]
    samples: int
    passes: int
    method: Literal["vectorised", "loop"]


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    likelihood: Likelihood,
    max_samples: int | None = None,
    seed: int = 0,
    forward: Forward = forward_inputs,
) -> FisherEstimate:
    """Estimate the diagonal of the true Fisher information of every parameter that requires a gradient.

    The model runs in evaluation mode and is left as it was, gradients included; the global random state is untouched.

    Args:
        model: gives ``outputs`` that ``likelihood`` understands.
        batches: batches of inputs; labels in them are ignored.
        likelihood: :class:`Categorical`, :class:`Bernoulli`, :class:`Gaussian`, or one of your own.
        max_samples: stop after that many inputs; all batches unless given.
        seed: the drawn labels derive from it.
        forward: how the model reads a batch.

    Raises:
        MergeError: no input came, no parameter requires a gradient, or the information is not finite.
    """
    if max_samples is not None and max_samples < 1:
        raise MergeError(f"max_samples is {max_samples}, but must be at least 1")
    work = _Work(model, likelihood, forward)
    generator = torch.Generator().manual_seed(seed)
    samples = 0
    with training_flags_kept(model), forked_random_state(seed, device_of(model)):
        model.eval()
        for batch in batches:
            room = batch_size(batch) if max_samples is None else min(batch_size(batch), max_samples - samples)
            work.add(move(rows(batch, 0, room), device_of(model)), room, generator)
            samples += room
            if samples == max_samples:
                break
    if samples == 0:
        raise MergeError("no input came to estimate Fisher information from: pass at least one batch")
    diagonal = {name: total / samples for name, total in work.totals.items()}
    for name, value in diagonal.items():
        if not bool(torch.isfinite(value).all()):
            raise MergeError(
                f"the Fisher information of {name!r} is not finite: leave this model out of the merge"
            )
    return FisherEstimate(
        diagonal=diagonal,
        samples=samples,
        passes=4 * samples,
        method="vectorised" if work.vectorised else "loop",
    )


class _Work:
    """Sums of squared per-sample gradients."""

    def __init__(self, model: nn.Module, likelihood: Likelihood, forward: Forward) -> None:
        self.model = model
        self.likelihood = likelihood
        self.forward = forward
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise MergeError(
                "no parameter of the model requires a gradient: there is no Fisher information to take"
            )
        self.totals = {
            name: torch.zeros_like(
                p, dtype=torch.float32 if p.dtype.itemsize < 4 else p.dtype, requires_grad=False
            )
            for name, p in self.parameters.items()
        }
        self.vectorised = True
        numbers = sum(p.numel() for p in self.parameters.values())
        self.chunk = max(1, _GRADIENTS_AT_ONCE // max(numbers, 1))

    def add(self, batch: Batch, size: int, generator: torch.Generator) -> None:
        with torch.no_grad():
            outputs = self.forward(self.model, batch)
        if outputs.shape[0] != size:
            raise MergeError(
                f"a batch of {size} samples gave outputs of shape {tuple(outputs.shape)}: "
                f"the first dimension must be the samples"
            )
        if not bool(torch.isfinite(outputs).all()):
            raise MergeError("the model's outputs are not all finite: leave this model out of the merge")
        labels = self.likelihood.sample(outputs, generator)
        if self.vectorised:
            try:
                self._vectorised(batch, labels, size)
            except (RuntimeError, NotImplementedError, ValueError):
                # data-dependent control flow, in-place buffers, operators without a batching rule
                self.vectorised = False
            else:
                return
        self._looped(batch, labels, size)

    def _vectorised(self, batch: Batch, labels: Tensor, size: int) -> None:
        frozen = {name: p.detach() for name, p in self.parameters.items()}
        caller = _Caller(self.model, self.forward)

        def log_prob(parameters: dict[str, Tensor], one: Batch, label: Tensor) -> Tensor:
            batched = map_tensors(lambda tensor: tensor.unsqueeze(0), one)
            named = {f"model.{name}": value for name, value in parameters.items()}
            outputs = torch.func.functional_call(caller, named, (batched,))
            return self.likelihood.log_prob(outputs, label.unsqueeze(0))[0]

        gradients_of = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, 0, 0))
        sums = {name: torch.zeros_like(total) for name, total in self.totals.items()}
        for start in range(0, size, self.chunk):
            stop = min(start + self.chunk, size)
            gradients = gradients_of(frozen, rows(batch, start, stop), labels[start:stop])
            for name, gradient in gradients.items():
                sums[name] += gradient.detach().to(sums[name].dtype).square().sum(dim=0)
        for name, value in sums.items():
            self.totals[name] += value

    def _looped(self, batch: Batch, labels: Tensor, size: int) -> None:
        for index in range(size):
            with torch.enable_grad():
                outputs = self.forward(self.model, rows(batch, index, index + 1))
                value = self.likelihood.log_prob(outputs, labels[index : index + 1]).sum()
            gradients = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
            for name, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    self.totals[name] += gradient.to(self.totals[name].dtype).square()


class _Caller(nn.Module):
    """Lets ``functional_call`` reach the model through the caller's own ``forward`` function."""

    def __init__(self, model: nn.Module, how: Forward) -> None:
        super().__init__()
        self.model = model
        self.how = how

    def forward(self, batch: Batch) -> Tensor:
        return self.how(self.model, batch)


def _summed(per_position: Tensor) -> Tensor:
    return per_position if per_position.dim() == 1 else per_position.flatten(1).sum(dim=1)
