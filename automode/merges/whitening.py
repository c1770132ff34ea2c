"""Whitening: features scaled and turned so that the units they came in decide nothing."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DIMENSIONS = 64
_CONSTANT = 1e-6  # spread, as a share of the largest value, that single-precision rounding alone can make
_SMALLEST_VARIANCE = 1e-4  # share of the largest principal variance below which a direction is noise


def whiten(features: Tensor, max_dimensions: int = MAX_DIMENSIONS) -> tuple[Tensor, Tensor]:
    """Return the mean ``[d]`` and a matrix ``[d, m]`` that takes centred features to unit, uncorrelated directions.

    Features are first scaled to unit variance each, so that the units they came in decide nothing. Principal
    directions with less than 1e-4 of the largest variance are dropped, so that whitening does not blow up noise;
    constant features count for nothing, and if all are constant one direction of zeros is left.
    """
    doubles = features.double()
    mean = doubles.mean(dim=0)
    centred = doubles - mean
    spread = centred.square().sum(dim=0).div(max(len(features) - 1, 1)).sqrt()
    varies = spread > _CONSTANT * doubles.abs().amax(dim=0)
    scale = torch.where(varies, spread.reciprocal(), torch.zeros_like(spread))
    scaled = centred * scale
    values, vectors = torch.linalg.eigh(scaled.T @ scaled / max(len(features) - 1, 1))
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int((values > values[0] * _SMALLEST_VARIANCE).sum()) if bool(varies.any()) else 0
    kept = min(kept, max_dimensions)
    if kept == 0:
        return mean.float(), torch.zeros(features.shape[1], 1)
    return mean.float(), (scale[:, None] * vectors[:, :kept] * values[:kept].rsqrt()).float()
