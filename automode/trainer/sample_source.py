"""Training samples by id: how a specialist draws its own batches without the user's loader noticing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset, default_collate

from automode.errors import DataError
from automode.merges.batches import move

Ids = np.ndarray[Any, np.dtype[np.int64]]

READ_BATCH = 256
"""Samples that are read at once where all or many of them are looked through."""


class SampleSource:
    """Fetches batches of the root dataset by sample id.

    Args:
        dataset: A map-style dataset; ids are its indices.
        collate: The user's collate function.
        device: Where tensors go.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], device: torch.device) -> None:
        if not hasattr(dataset, "__getitem__"):
            raise DataError(f"{type(dataset).__name__} has no __getitem__, so samples cannot be drawn by id")
        self._dataset = dataset
        self._collate = collate
        self._device = device
        self._tensors = (
            dataset.tensors if type(dataset) is TensorDataset and collate is default_collate else None
        )

    def batch(self, ids: Ids) -> Any:
        """Return one collated batch on the device; rows in the order of ``ids``."""
        if self._tensors is not None:
            index = torch.from_numpy(ids)
            return [move(t.index_select(0, index.to(t.device)), self._device) for t in self._tensors]
        return move(self._collate([self._dataset[int(i)] for i in ids]), self._device)


class FixedPass:
    """The same few training batches each time that it is called: for norm statistics and Fisher information.

    Args:
        source: Training samples by id; None: there are none, and every pass is empty.
        ids: Samples to choose from.
        batch_size: Rows a batch, at least 1.
        batches: Batches a pass, at the most.
        seed: Which samples they are.
    """

    def __init__(
        self, source: SampleSource | None, ids: Ids, *, batch_size: int, batches: int, seed: int
    ) -> None:
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0xBA7C]))
        self._source = source
        self._ids = rng.permutation(ids)[: batch_size * batches]
        self._batch_size = batch_size

    def __call__(self) -> Iterator[Any]:
        """Begin a pass."""
        if self._source is None:
            return
        for start in range(0, self._ids.size, self._batch_size):
            yield self._source.batch(self._ids[start : start + self._batch_size])


class BatchPlan:
    """Which samples a specialist's k-th batch holds: a pure function of the seed and k, so that a segment can start anywhere.

    Each batch takes ``1 - replay`` of its rows from the selected ids and the rest from the others; both lists are walked in
    seeded permutations, pass after pass. All trials of a card share the plan, so that their values differ by their
    recipes and not by their luck.

    Args:
        selected: Ids to specialise on, at least one.
        others: Ids to replay from; may be empty.
        replay: Share of each batch from ``others``, 0 to 1.
        batch_size: Rows a batch.
        entropy: Seed material.
        mixed: Draw from selected and others together, as they come; ``replay`` counts for nothing then.
    """

    def __init__(
        self,
        selected: Ids,
        others: Ids,
        *,
        replay: float,
        batch_size: int,
        entropy: Sequence[int],
        mixed: bool = False,
    ) -> None:
        if selected.size == 0:
            raise DataError("the selection holds no training sample")
        self._marked = selected if mixed else None
        if mixed:
            selected, others = np.union1d(selected, others), np.empty(0, dtype=np.int64)
        from_others = round(replay * batch_size) if others.size else 0
        from_others = min(from_others, batch_size - 1)
        self._parts = [(selected, batch_size - from_others, 0)]
        if from_others:
            self._parts.append((others, from_others, 1))
        self._entropy = list(entropy)
        self._cached: dict[int, tuple[int, Ids]] = {}
        self.selected_rows = batch_size - from_others

    def ids(self, k: int) -> Ids:
        """Ids of batch ``k`` (from 0); the first ``selected_rows`` are of the selection."""
        return np.concatenate([self._take(pool, n, part, k) for pool, n, part in self._parts])

    def chosen(self, k: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Tell which rows of batch ``k`` are of the selection."""
        if self._marked is not None:
            return np.isin(self.ids(k), self._marked)
        rows = np.zeros(sum(n for _, n, _ in self._parts), dtype=np.bool_)
        rows[: self.selected_rows] = True
        return rows

    def _take(self, pool: Ids, n: int, part: int, k: int) -> Ids:
        start = k * n
        found: list[Ids] = []
        while n > 0:
            turn, offset = divmod(start, pool.size)
            piece = self._permuted(pool, part, turn)[offset : offset + n]
            found.append(piece)
            start += piece.size
            n -= piece.size
        return np.concatenate(found)

    def _permuted(self, pool: Ids, part: int, turn: int) -> Ids:
        cached = self._cached.get(part)
        if cached is None or cached[0] != turn:
            rng = np.random.default_rng(np.random.SeedSequence([*self._entropy, part, turn]))
            cached = (turn, pool[rng.permutation(pool.size)])
            self._cached[part] = cached
        return cached[1]
