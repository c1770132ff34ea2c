"""A loader of tensors in memory that gathers many batches at once: the batches of a ``DataLoader``, in a fraction of its time.

A ``DataLoader`` over a ``TensorDataset`` reads every sample by itself and stacks it again. Here the epoch's permutation is drawn as
``DataLoader`` draws it, from the same generators at the same moments, and the rows are fetched by ``index_select``, many batches
in one call. Batches, their order, and every random state are the same.
"""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from automode.errors import UsageError

CHUNK_BYTES = 16 << 20
"""Bytes of data gathered in one call, at the most, but one batch at the least."""

Batch = list[Tensor]


class TensorLoader(DataLoader[Any]):
    """Batches of tensors in memory; a ``DataLoader`` in every respect but speed.

    Args:
        data: Tensors with samples along the first dimension, or one ``TensorDataset``, or a ``Subset`` of one.
        batch_size: Rows of a batch, at least 1.
        shuffle: Draw a new order for every epoch.
        drop_last: Leave out a last batch that is not full.
        generator: Draws the orders; None: torch's global generator, as with ``DataLoader``.

    Raises:
        UsageError: The data are something else, or of different lengths.
    """

    def __init__(
        self,
        *data: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        dataset = _dataset_of(data)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UsageError(f"batch_size must be a whole number at least 1, got {batch_size!r}")
        super().__init__(
            dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, generator=generator
        )

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> Self:
        """Make one that gives what a ``DataLoader`` gives.

        Args:
            loader: Over a ``TensorDataset`` or a ``Subset`` of one, with torch's own samplers and collation, without workers.

        Raises:
            UsageError: It is another kind of loader.
        """
        if why := _why_not(loader):
            raise UsageError(f"TensorLoader.of takes a plain DataLoader over tensors, but {why}")
        assert loader.batch_size is not None
        shuffles = isinstance(loader.sampler, RandomSampler)
        return cls(
            loader.dataset,
            batch_size=loader.batch_size,
            shuffle=shuffles,
            drop_last=loader.drop_last,
            generator=loader.generator,
        )

    def __iter__(self) -> Any:
        return TensorPass(self).batches

    def epoch(self, skip: int = 0) -> Iterator[tuple[array[int], Batch | None]]:
        """Begin an epoch.

        Args:
            skip: Batches at its beginning whose rows are not read.

        Yields:
            Positions in the dataset, and the batch; None in place of one that is skipped.
        """
        begun = TensorPass(self, skip)
        return ((begun.drawn.popleft(), batch) for batch in begun.batches)


class TensorPass:
    """One pass over a loader's tensors.

    No Python function runs between two batches of a piece: on a small model each would cost as much as a good part of the step.

    Args:
        loader: Whose tensors they are.
        skip: Batches at the beginning whose rows are not read.

    Attributes:
        batches: The batches; None in place of one that is skipped.
        drawn: Positions in the dataset of each batch that has been given or gathered, in order; whoever wants them takes them.
    """

    def __init__(self, loader: TensorLoader, skip: int = 0) -> None:
        self._loader = loader
        self.drawn: deque[array[int]] = deque()
        # A DataLoader draws a seed for workers when it is asked for an iterator, also where it has none.
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        self.batches: Iterator[Batch | None] = itertools.chain.from_iterable(self._pieces(skip))

    def _pieces(self, skip: int) -> Iterator[Iterable[Batch | None]]:
        """Draw the order, and gather many batches at a time."""
        loader = self._loader
        n, size = len(loader.dataset), loader.batch_size  # type: ignore[arg-type]  # checked when it was made
        assert size is not None
        last_draw = False
        order: Tensor | None = None
        generator: torch.Generator | None = None
        if isinstance(loader.sampler, RandomSampler):
            generator = loader.generator
            if generator is None:
                generator = torch.Generator()
                generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
            else:
                last_draw = (
                    True  # a DataLoader draws another permutation of its generator at the end, and drops it
                )
            order = torch.randperm(n, generator=generator)
        positions = array("q", (torch.arange(n) if order is None else order).numpy().tobytes())
        whole = n - n % size
        end = whole if loader.drop_last else n
        passed = min(skip * size, end)
        if passed:
            if last_draw and passed > whole:
                torch.randperm(n, generator=generator)
                last_draw = False
            yield itertools.repeat(None, self._draw(positions, 0, passed))
        tensors, rows = _tensors_of(loader.dataset)
        for first, stop in _spans(tensors, passed, whole, end, size):
            if last_draw and stop > whole:
                torch.randperm(n, generator=generator)
                last_draw = False
            index = torch.arange(first, stop) if order is None else order[first:stop]
            if rows is not None:
                index = rows[index]
            gathered = [t.index_select(0, index.to(t.device)) for t in tensors]
            self._draw(positions, first, stop)
            # Not views of one another: a batch that is written to must not count as a change of its neighbours.
            yield map(list, zip(*(torch.unsafe_split(part, size) for part in gathered), strict=True))
        if last_draw:
            torch.randperm(n, generator=generator)

    def _draw(self, positions: array[int], first: int, stop: int) -> int:
        """Note the batches of a piece; returns how many they are."""
        size = self._loader.batch_size
        assert size is not None
        starts = range(first, stop, size)
        self.drawn.extend([positions[start : min(start + size, stop)] for start in starts])
        return len(starts)


def _spans(
    tensors: tuple[Tensor, ...], first: int, whole: int, end: int, size: int
) -> Iterator[tuple[int, int]]:
    """What is gathered in one call each: as many full batches as may be, and the last one by itself where it is not full."""
    row_bytes = sum(t[:1].numel() * t.element_size() for t in tensors)
    chunk = max(1, CHUNK_BYTES // max(1, row_bytes * size)) * size
    for start in range(first, whole, chunk):
        yield start, min(start + chunk, whole)
    if max(first, whole) < end:
        yield whole, end


def _dataset_of(data: tuple[Any, ...]) -> Any:
    if len(data) == 1 and _is_tensors(data[0]):
        return data[0]
    if not data or not all(isinstance(part, Tensor) and part.ndim for part in data):
        came = ", ".join(type(part).__name__ for part in data) or "nothing"
        raise UsageError(
            f"TensorLoader takes tensors with samples along the first dimension, a TensorDataset or a Subset of one; got {came}"
        )
    if len({len(part) for part in data}) > 1:
        raise UsageError(
            f"TensorLoader takes tensors of one length, got {', '.join(str(len(part)) for part in data)}"
        )
    return TensorDataset(*data)


def _is_tensors(dataset: Any) -> bool:
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) is TensorDataset


def _tensors_of(dataset: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The tensors, and the row of each sample (None: its position)."""
    rows: Tensor | None = None
    while type(dataset) is Subset:
        inner = torch.from_numpy(np.asarray(dataset.indices, dtype=np.int64))
        rows = inner if rows is None else inner[rows]
        dataset = dataset.dataset
    if rows is not None:
        rows = torch.where(rows < 0, rows + len(dataset), rows)
    return dataset.tensors, rows


def _why_not(loader: Any) -> str | None:
    if type(loader) not in (DataLoader, TensorLoader):
        return f"a {type(loader).__name__} came"
    if not _is_tensors(loader.dataset):
        return f"its dataset is a {type(loader.dataset).__name__}"
    if loader.num_workers or loader.collate_fn is not default_collate or loader.pin_memory:
        return "it has workers, a collate function of its own, or pins memory"
    if type(loader.batch_sampler) is not BatchSampler:
        return "it has a batch sampler of its own, or none"
    sampler = loader.sampler
    if type(sampler) is SequentialSampler:
        return None
    if (
        type(sampler) is not RandomSampler
        or sampler.replacement
        or sampler.num_samples != len(loader.dataset)
    ):
        return f"its sampler is a {type(sampler).__name__} that is no plain permutation"
    return None if sampler.generator is loader.generator else "its sampler has a generator of its own"
