"""The user's batch sampler with a note taken of each index list on its way past."""

from __future__ import annotations

import contextlib
import functools
import itertools
import struct
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

if TYPE_CHECKING:
    from automode.trainer.ids import RecordedLoader

_OF_INTEGERS = (RandomSampler, SequentialSampler)


class RecordingBatchSampler:
    """The user's batch sampler, with a note taken of each index list as it is drawn.

    Args:
        inner: The user's.

    Attributes:
        skip: Index lists that the next iterator draws and drops before its first.
        shares: Whether its lists may be kept as they are, since each is new, of integers, and nobody writes to it; and each is asked
            for right before its batch is made.
        latest: The iterator made last.
        pending: Index lists drawn for batches that have not been yielded yet.
        draw: Gives the index list of the batch that has just been yielded.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.skip = 0
        self.shares = False
        self.latest: RecordingIterator | None = None
        self.pending: deque[Sequence[Any] | None] = deque()
        self.draw: Callable[[], Sequence[Any] | None] = self.pending.popleft

    def __iter__(self) -> Iterator[Any]:
        # iter() of the inner sampler must run now and not at the first next(): some draw random numbers in it. A
        # loader with workers calls this twice before its first batch; the last call is the one that is drawn from.
        self.pending = deque()
        if self.shares and not self.skip:
            drawn, kept = itertools.tee(iter(self.inner))
            self.draw = functools.partial(next, kept)
            return drawn
        self.draw = self.pending.popleft
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
        note: Sequence[Any] | None
        try:  # here and not in a function: this runs once a step
            note = array("q", positions) if type(positions) is list else noted(positions)
        except (TypeError, OverflowError):
            note = noted(positions)
        self._pending.append(note)
        return positions


class RecordedIterator:
    """One pass over a loader whose index lists are noted.

    Args:
        owner: Keeps them.
        batches: The loader's own iterator.
        draw: Gives the index list of the batch that has just been read.
        listed: Whether that is a list of integers for certain.

    Attributes:
        batches: As given. Whoever reads it calls :meth:`noted` after each batch.
        packs: Whether lists of integers are noted as arrays, for whoever keeps many: a list keeps as many integers alive, and the
            garbage collector looks through it.
    """

    __slots__ = ("_count", "_draw", "_listed", "_owner", "_pack", "_room", "batches", "packs")

    def __init__(
        self,
        owner: RecordedLoader,
        batches: Iterator[Any],
        draw: Callable[[], Sequence[Any] | None],
        *,
        listed: bool = False,
    ) -> None:
        self._owner = owner
        self._draw = draw
        self.batches = batches
        self._listed = listed
        self.packs = False
        self._make_room(0)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            batch = next(self.batches)
        except StopIteration:
            raise
        except Exception:
            # The index list of a batch that failed is spent, should the caller go on to the next batch.
            with contextlib.suppress(IndexError, StopIteration):
                self._draw()
            raise
        self.noted()
        self._owner.order_up()
        return batch

    def noted(self) -> Sequence[Any] | None:
        """Take note of the batch that has just been read; returns its positions."""
        owner, positions = self._owner, self._draw()
        if self.packs and self._listed and positions is not None:
            if len(positions) != self._count:
                self._make_room(len(positions))
            self._pack(self._room, 0, *positions)
            positions = array("q", self._room)
        owner.read.append(positions)
        owner.current = positions
        if positions is None or owner.reason is not None:
            owner.without_ids(positions)
            return None
        return positions

    def _make_room(self, count: int) -> None:
        """Prepare to pack so many integers: that takes half the time that an array takes to read them off a list."""
        packer = struct.Struct(f"{count}q")
        self._count, self._pack, self._room = count, packer.pack_into, bytearray(packer.size)


def draws_new_lists(loader: Any) -> bool:
    """Whether each index list is a new one of integers that only torch's own code reads, right before its batch is made."""
    return (
        not loader.num_workers
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.batch_sampler.sampler) in _OF_INTEGERS
        and not hasattr(loader.dataset, "__getitems__")
    )


def checksum_of(lists: Sequence[Sequence[Any] | None], start: int) -> int:
    """CRC-32 of index lists one after the other, each with its length; what is no list of integers counts as empty."""
    for positions in lists:
        numbers = positions if isinstance(positions, array) else _integers(positions)
        if numbers is None:
            numbers = array("q")
        start = zlib.crc32(numbers, zlib.crc32(len(numbers).to_bytes(8, "little"), start))
    return start


def noted(positions: Any) -> Sequence[Any] | None:
    """Copy an index list, since a batch sampler may reuse its list; None where it is not one.

    Integers are kept as an array: it takes less room, is no work for the garbage collector, and is put end to end with others and
    summed up in no time.
    """
    if isinstance(positions, array):
        return positions
    if type(positions) is list and (numbers := _integers(positions)) is not None:
        return numbers
    if isinstance(positions, (list, tuple, range)):
        if not positions or type(positions[0]) is int or isinstance(positions[0], (Integral, torch.Tensor)):
            return list(positions)
        return None
    if isinstance(positions, (torch.Tensor, np.ndarray)) and positions.ndim == 1:
        noted: list[Any] = positions.tolist()
        return noted if not noted or isinstance(noted[0], int) else None
    return None


def _integers(positions: Sequence[Any] | None) -> array[int] | None:
    """The positions as an array; None where they are no integers."""
    try:
        return array("q", positions or ())
    except (TypeError, OverflowError):
        return None
