"""Embeddings: the input of the last parametric layer, seen from outside by a hook and gone afterwards."""

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
from automode.trainer.random_state import forked_rng
from automode.trainer.trees import rows_in
from automode.trainer.trunk import StepFn

DIMENSIONS = 64
_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)  # noqa: SLF001  # the only common bases

Features = npt.NDArray[np.float64]


def embeddings(
    model: nn.Module, step_fn: StepFn, batches: Iterable[Any], *, seed: int, dimensions: int = DIMENSIONS
) -> tuple[Features, list[Any], list[Any]]:
    """Run a network over batches and keep what its last parametric layer is given.

    Evaluation mode, no gradients, random state and training flags put back.

    Args:
        model: Left as it was.
        step_fn: Model and batch to (loss, outputs, targets).
        batches: Collated batches on the model's device.
        seed: Of the projection, for features wider than ``dimensions``.
        dimensions: At most so many columns.

    Returns:
        Features [n, d] (positions of a sequence averaged), and the outputs and targets of each batch.

    Raises:
        NotExecutableError: The network has no such layer, or it was not called once a batch.
    """
    try:
        layer = model.get_submodule(last_layer(model))
    except ValueError as error:
        raise NotExecutableError(str(error)) from error
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            seen.append(inputs[0].detach())

    rows: list[Tensor] = []
    outputs: list[Any] = []
    targets: list[Any] = []
    with forked_rng(), training_flags_kept(model), torch.no_grad():
        model.eval()
        handle = layer.register_forward_pre_hook(keep)
        try:
            for batch in batches:
                seen.clear()
                _, out, target = step_fn(model, batch)
                if not seen:
                    raise NotExecutableError(
                        "the last layer with parameters takes no part in the forward pass"
                    )
                rows.append(_one_row_each(seen[-1], layer, rows_in(target) or rows_in(out)))
                outputs.append(out)
                targets.append(target)
        finally:
            handle.remove()
    if not rows:
        raise NotExecutableError("no batch came to read features from")
    features = torch.cat(rows).double().cpu().numpy()
    return _projected(features, seed, dimensions), outputs, targets


def _one_row_each(features: Tensor, layer: nn.Module, n: int | None) -> Tensor:
    """Average what a layer is given over its positions, so that each sample has one row.

    Args:
        features: Input of the layer: channels last, or second for a convolution or batch norm.
        layer: The layer.
        n: Samples in the batch, or None where that is not known.
    """
    if isinstance(layer, _CHANNELS_SECOND) and features.dim() > 2:
        features = features.flatten(2).mean(dim=2)
    width = features.shape[-1]
    rows = features.shape[0] if n is None else n
    if not rows or features.numel() % (rows * width) or features.shape[0] % rows:
        raise NotExecutableError(
            f"the last layer with parameters is given {tuple(features.shape)} for a batch of {rows} samples, so that no"
            " row of features is one sample's"
        )
    # A model that flattens sequences gives positions as rows, sample after sample.
    return features.reshape(rows, -1, width).mean(dim=1)


def _projected(features: Features, seed: int, dimensions: int) -> Features:
    width = features.shape[1]
    if width <= dimensions:
        return features
    rng = np.random.default_rng(np.random.SeedSequence([seed, width, dimensions]))
    projection = rng.standard_normal((width, dimensions)) / np.sqrt(dimensions)
    return np.asarray(features @ projection, dtype=np.float64)
