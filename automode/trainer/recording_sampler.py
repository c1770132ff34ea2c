"""The user's batch sampler with a note taken of each index list on its way past."""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch


class RecordingBatchSampler:
    """The user's batch sampler, with a note taken of each index list as it is drawn.

    Args:
        inner: The user's.

    Attributes:
        skip: Index lists that the next iterator draws and drops before its first.
        latest: The iterator made last.
        pending: Index lists drawn for batches that have not been yielded yet.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.skip = 0
        self.latest: RecordingIterator | None = None
        self.pending: deque[Sequence[Any] | None] = deque()

    def __iter__(self) -> Iterator[Any]:
        # iter() of the inner sampler must run now and not at the first next(): some draw random numbers in it. A
        # loader with workers calls this twice before its first batch; the last call is the one that is drawn from.
        self.pending = deque()
        self.latest = RecordingIterator(iter(self.inner), self.pending, self.skip)
        return self.latest

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)


class RecordingIterator:
    """One pass over the user's batch sampler."""

    __slots__ = ("_inner", "_pending", "_skip", "_skipped")

    def __init__(self, inner: Iterator[Any], pending: deque[Sequence[Any] | None], skip: int) -> None:
        self._inner = inner
        self._pending = pending
        self._skip = skip
        self._skipped: list[Sequence[Any] | None] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def skipped(self) -> list[Sequence[Any] | None]:
        """Drop what is to be skipped, where that has not happened yet; returns the index lists dropped."""
        while self._skip:
            self._skip -= 1
            try:
                self._skipped.append(noted(next(self._inner)))
            except StopIteration:
                self._skip = 0
        return self._skipped

    def __next__(self) -> Any:
        # At the first draw and not before: workers are sent their first batches while the iterator is made.
        if self._skip:
            self.skipped()
        positions = next(self._inner)
        self._pending.append(noted(positions))
        return positions


def checksum_of(lists: Sequence[Sequence[Any] | None], start: int) -> int:
    """CRC-32 of index lists one after the other, each with its length; what is no list of integers counts as empty."""
    for positions in lists:
        try:
            numbers = array("q", positions or ())
        except (TypeError, OverflowError):
            numbers = array("q")
        start = zlib.crc32(numbers.tobytes(), zlib.crc32(len(numbers).to_bytes(8, "little"), start))
    return start


def noted(positions: Any) -> Sequence[Any] | None:
    """Copy an index list, since a batch sampler may reuse its list; None where it is not one."""
    if isinstance(positions, (list, tuple, range)):
        if not positions or type(positions[0]) is int or isinstance(positions[0], (Integral, torch.Tensor)):
            return list(positions)
        return None
    if isinstance(positions, (torch.Tensor, np.ndarray)) and positions.ndim == 1:
        noted: list[Any] = positions.tolist()
        return noted if not noted or isinstance(noted[0], int) else None
    return None
