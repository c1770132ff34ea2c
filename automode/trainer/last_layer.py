"""Gradient norms of single samples with respect to the last layer, in closed form: no backward pass through the network.

For a linear last layer z = W h + b the gradient of one sample's loss is g h^T for W and g for b, where g is the gradient with respect to
z (p - y for a cross entropy), so that its norm is |g| sqrt(|h|^2 + 1). It ranks samples much as the norm over all
layers does (Katharopoulos and Fleuret 2018, arXiv:1803.00942; Paul et al. 2021, arXiv:2107.07075).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from automode.errors import NotExecutableError
from automode.merges.batches import training_flags_kept
from automode.merges.moe import last_layer
from automode.trainer.per_sample import PerSampleLoss
from automode.trainer.random_state import forked_rng
from automode.trainer.trunk import StepFn


def gradient_norms(
    model: nn.Module, step_fn: StepFn, per_sample: PerSampleLoss, batches: Iterable[Any]
) -> npt.NDArray[np.float64]:
    """Return the norm of each sample's loss gradient with respect to weight and bias of the last layer.

    Evaluation mode; random state, training flags and gradients are left as they were. One forward pass.

    Args:
        model: Left as it was.
        step_fn: Model and batch to (loss, outputs, targets).
        per_sample: The loss of each sample; must be exact.
        batches: Collated batches on the model's device.

    Returns:
        Norms [n], at least 0. Of a sequence, the norm of the gradient of its mean loss.

    Raises:
        NotExecutableError: The last layer with parameters is not linear, or was not called once a batch.
    """
    try:
        layer = model.get_submodule(last_layer(model))
    except ValueError as error:
        raise NotExecutableError(str(error)) from error
    if not isinstance(layer, nn.Linear):
        raise NotExecutableError(
            f"gradient norms are read from a linear last layer, and this network's is a {type(layer).__name__}"
        )
    seen: list[tuple[Tensor, Tensor]] = []

    def cut(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        # From here on the graph is kept: what follows the layer is the loss, and little else.
        torch.set_grad_enabled(True)
        leaf = output.detach().requires_grad_()
        seen.append((inputs[0].detach(), leaf))
        return leaf

    norms: list[Tensor] = []
    with forked_rng(), training_flags_kept(model), torch.no_grad():
        model.eval()
        handle = layer.register_forward_hook(cut)
        try:
            for batch in batches:
                seen.clear()
                torch.set_grad_enabled(False)
                _, outputs, targets = step_fn(model, batch)
                if len(seen) != 1:
                    raise NotExecutableError(
                        f"the last layer was called {len(seen)} times for a batch, where once was needed"
                    )
                losses = per_sample.differentiable(outputs, targets)
                norms.append(_norms(*seen[0], losses, bias=layer.bias is not None))
        finally:
            handle.remove()
    return np.asarray(torch.cat(norms).double().cpu().numpy(), dtype=np.float64)


def _norms(features: Tensor, scores: Tensor, losses: Tensor, *, bias: bool) -> Tensor:
    """Norms from the layer's input and output; with several positions a sample their gradients add up."""
    n = losses.shape[0]
    if not losses.requires_grad or features.numel() % (n * features.shape[-1]) or features.shape[0] % n:
        raise NotExecutableError(
            f"the last layer is given {tuple(features.shape)} for {n} samples, so that no rows are one sample's"
        )
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    g = gradient.reshape(n, -1, scores.shape[-1]).double()
    h = features.reshape(n, -1, features.shape[-1]).double()
    # |sum_t g_t h_t^T|^2 = sum_ts (g_t . g_s)(h_t . h_s), without forming the outer products.
    squared = ((g @ g.transpose(1, 2)) * (h @ h.transpose(1, 2))).sum(dim=(1, 2))
    if bias:
        squared = squared + g.sum(dim=1).square().sum(dim=1)
    return squared.clamp_min(0.0).sqrt()
