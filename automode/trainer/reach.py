"""Which samples of its dataset a loader reads: a sampler may pick a part, as where one dataset serves training and validation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from automode.trainer.random_state import forked_rng

Positions = npt.NDArray[np.int64]


def positions_read(loader: Any, *, draw: bool) -> Positions | None:
    """Give the positions in the loader's dataset that its passes read.

    Args:
        loader: Any loader.
        draw: Whether a sampler of unknown kind may be drawn from, once, to see; its generator is put back. Not for
            training loaders: a sampler of the user's may keep count of its passes.

    Returns:
        Ascending positions; None where that is the whole dataset, or cannot be known.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler
    sampler: Any = batches.sampler if type(batches) is BatchSampler else batches
    if sampler is None:
        return None
    match sampler:
        case SubsetRandomSampler():
            return np.unique(np.asarray(list(sampler.indices), dtype=np.int64))
        case WeightedRandomSampler():
            return np.flatnonzero(np.asarray(sampler.weights) > 0).astype(np.int64)
    if type(sampler) in (SequentialSampler, RandomSampler) or not draw:
        return None
    return _drawn(batches, 2 * len(loader.dataset))  # type: ignore[arg-type]  # no length: a TypeError, as len() gives


def as_read(loader: Any, *, draw: bool = False) -> Any:
    """Give a loader's dataset, or the ``Subset`` of it that its sampler reads; see :func:`positions_read`."""
    positions = positions_read(loader, draw=draw)
    return loader.dataset if positions is None else Subset(loader.dataset, positions.tolist())


def _drawn(batches: Any, most: int) -> Positions:
    holders = [batches, getattr(batches, "sampler", None)]
    generators = [g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    with forked_rng():
        drawn = list(itertools.islice(itertools.chain.from_iterable(batches), most))
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return np.unique(np.asarray(drawn, dtype=np.int64))
