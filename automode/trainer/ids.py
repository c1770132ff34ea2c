"""Sample ids: which samples each training batch held, read without touching how the loader behaves.

A sample id is the int64 position of a sample in the *root* dataset, after every ``Subset`` is unwrapped, and means
something only beside that dataset's :func:`fingerprint`. Ids are read from a copy of the user's ``DataLoader`` whose
batch sampler notes every index list on its way past. A ``DataLoader`` with ``in_order=True`` yields batches in the order
in which their index lists were drawn, with workers or without, so that first in, first out matches them.

Nothing of the user's is replaced: the sampler, its generator and the loader object stay as they were, and the batches
and the random numbers drawn are those of the plain loader. Where ids cannot be read so, there are none, and
:attr:`RecordedLoader.reason` says why.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from automode.errors import DataError
from automode.trainer.recording_sampler import (
    RecordedIterator,
    RecordingBatchSampler,
    checksum_of,
    draws_new_lists,
)
from automode.trainer.tensor_loader import TensorLoader, TensorPass

IdArray = npt.NDArray[np.int64]

_FINGERPRINT_ROWS = 16
_READ_AT_MOST = 128
_CONTENT_ATTRIBUTES = ("tensors", "data", "targets", "labels")


class IdSource(Protocol):
    """Knows the samples of a batch."""

    @property
    def reason(self) -> str | None:
        """Why there are no ids; None while there are."""
        ...

    def root_ids(self, batches: Sequence[Sequence[Any]]) -> IdArray | None:
        """Map what is known of several batches to root ids at once; None where it cannot be, and :attr:`reason` says why."""
        ...


def fingerprint(dataset: Any) -> str:
    """Name a dataset by its type, its length and, where it keeps arrays, a hash of a few rows of them.

    Items are never fetched through ``__getitem__``: that may draw random numbers or read a disk. Rows come from the
    ``tensors`` of a ``TensorDataset``, from a plain sequence of tensors, and from ``data``, ``targets`` and ``labels``
    where those are tensors or numpy arrays.

    Args:
        dataset: Any dataset; a ``Subset`` is named after its root.

    Returns:
        ``"<type>:<length or ?>:<16 hex digits or ->"``.
    """
    root = dataset
    while isinstance(root, Subset):
        root = root.dataset
    length = _length(root)
    digest = hashlib.sha256()
    seen = False
    for kept in _content(root):
        digest.update(f"{tuple(kept.shape)}{kept.dtype}".encode())
        rows = np.unique(np.linspace(0, max(len(kept) - 1, 0), _FINGERPRINT_ROWS).astype(np.int64))
        digest.update(array_bytes(kept[rows.tolist()]) if len(kept) else b"")
        seen = True
    return f"{type(root).__qualname__}:{'?' if length is None else length}:{digest.hexdigest()[:16] if seen else '-'}"


def root_of(dataset: Any) -> tuple[Any, IdArray | None]:
    """Unwrap nested ``Subset``.

    Args:
        dataset: Any dataset.

    Returns:
        The root dataset, and the root position of each of ``dataset``'s own positions (None: they are the same).

    Raises:
        DataError: The indices of a ``Subset`` are not integers.
    """
    root, chain = dataset, []
    while isinstance(root, Subset):
        indices = np.asarray(root.indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise DataError(
                f"the indices of a Subset of {type(root.dataset).__qualname__} have dtype {indices.dtype} and shape"
                f" {indices.shape}; sample ids need a flat list of integers"
            )
        chain.append(indices.astype(np.int64))
        root = root.dataset
    if not chain:
        return root, None
    positions = chain[0]
    for outer in chain[1:]:
        positions = outer[positions]
    length = _length(root)
    return root, positions if length is None else np.where(positions < 0, positions + length, positions)


class RecordedLoader:
    """Iterate a loader exactly as it is, and know which samples each batch held.

    Args:
        loader: The user's loader: a ``DataLoader``, or any iterable of batches (then there are no ids).

    Attributes:
        loader: The object given, not modified.
        reason: Why there are no ids, or None while there are.
        current: Positions of the batch just read; see :meth:`ids_of_batch`.
        read: Index lists of batches read since :meth:`order` was called.
        root: The dataset that ids point into, or None.
        length: Number of samples of ``root``, or None where it has no length.
        fingerprint: :func:`fingerprint` of ``root``, or None.

    A second ``fit`` over a loader with ``persistent_workers`` starts workers of its own, where the plain loader
    would have gone on with those it had.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.root: Any = None
        self.length: int | None = None
        self.fingerprint: str | None = None
        self.reason = _refusal(loader)
        self.current: Sequence[Any] | None = None
        self._map: IdArray | None = None
        self._source_length: int | None = None
        self._clone: DataLoader[Any] | None = None
        self._recorder: RecordingBatchSampler | None = None
        self.read: list[Sequence[Any] | None] = []
        self._tensors: TensorLoader | None = None
        self._digest = self._summed = 0
        if self.reason is not None:
            return
        assert isinstance(loader, DataLoader)
        self._tensors = loader if type(loader) is TensorLoader else None
        try:
            self.root, self._map = root_of(loader.dataset)
        except DataError as error:
            self.reason = str(error)
            return
        self.length = _length(self.root)
        self._source_length = _length(loader.dataset)
        self.fingerprint = fingerprint(self.root)
        if self._tensors is not None:
            return
        self._recorder = RecordingBatchSampler(loader.batch_sampler)
        self._clone = object.__new__(type(loader))
        vars(self._clone)["_iterator"] = None

    @property
    def recorded(self) -> bool:
        """Whether index lists are noted on their way past, so that batches can be skipped without being read."""
        return self._clone is not None or self._tensors is not None

    @property
    def draws_from_torch(self) -> bool:
        """Whether a pass is made, and its index lists are drawn, by torch's own code and from its generators alone."""
        return self._tensors is not None or (self._clone is not None and draws_new_lists(self.loader))

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def batches(self, skip: int = 0) -> Iterator[Any]:
        """Begin a pass.

        Args:
            skip: Batches at the beginning whose index lists are drawn and dropped, their samples never read; only while
                :attr:`recorded`.
        """
        self.read, self._digest, self._summed = [], 0, 0
        if self._tensors is not None:
            begun = TensorPass(self._tensors, skip)
            self.read = [begun.drawn.popleft() for _ in itertools.islice(begun.batches, skip)]
            return RecordedIterator(self, begun.batches, begun.drawn.popleft)
        if self._clone is None or self._recorder is None:
            return iter(self.loader)
        # Attributes that the user set since the last epoch count, as they would on the plain loader. The guard in
        # DataLoader.__setattr__ is for samplers swapped in mid-life, which a copy made before each epoch is not.
        kept = vars(self._clone)["_iterator"]
        self._recorder.inner = vars(self.loader)["batch_sampler"]
        self._recorder.skip = skip
        self._recorder.shares = draws_new_lists(self.loader)
        vars(self._clone).update(vars(self.loader), batch_sampler=self._recorder, _iterator=kept)
        batches = iter(self._clone)
        self._recorder.skip = 0
        if skip:
            assert self._recorder.latest is not None
            self.read = self._recorder.latest.skipped()
        draw = self._recorder.draw
        shared = self._recorder.shares and isinstance(draw, functools.partial)
        return RecordedIterator(self, batches, draw, listed=shared)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a loader without a length raises its own TypeError

    def ids_of_batch(self) -> Sequence[Any] | None:
        """Give the positions in the loader's dataset of the batch just yielded, for :meth:`root_ids` to map later.

        Returns:
            Positions, one per sample, or None where there are no ids.
        """
        return self.current

    def order(self, count: int | None = None) -> int:
        """A checksum of the index lists of the batches yielded (or skipped) in this pass, in order; 0 where none are noted.

        Args:
            count: Of the first so many alone: the last one may have been read for a step that then failed. None: of all.
        """
        summed = self.read if count is None else self.read[: max(0, count - self._summed)]
        self._digest = checksum_of(summed, self._digest)
        self._summed += len(summed)
        self.read = self.read[len(summed) :]
        return self._digest

    def ahead(self, count: int | None = None) -> tuple[int, int]:
        """How many index lists have been drawn for batches not yielded yet, and a checksum of the first ``count`` of them.

        To be asked for after :meth:`order`: a batch that this was not to count stands before them.
        """
        pending = [] if self._recorder is None else list(self._recorder.pending)
        drawn = [*self.read, *pending][: len(pending)][:count]
        return len(drawn), checksum_of(drawn, 0)

    def root_ids(self, batches: Sequence[Sequence[Any]]) -> IdArray | None:
        """Map the positions of several batches to root ids at once.

        Args:
            batches: What :meth:`ids_of_batch` gave, batch by batch.

        Returns:
            int64 array of shape [total samples], or None where a position is no valid integer position; from then
            on :attr:`reason` says so and no ids are given.
        """
        total = sum(map(len, batches))
        try:
            if all(type(positions) is array for positions in batches):
                ids = np.frombuffer(bytearray().join(batches), np.int64)  # type: ignore[arg-type]  # arrays of "q"
            else:
                ids = np.fromiter(itertools.chain.from_iterable(batches), np.int64, total)
        except (TypeError, ValueError, OverflowError) as error:
            self._refuse(f"the batch sampler yields positions that are not integers ({error})")
            return None
        if total and self._source_length is not None:
            low, high = int(ids.min()), int(ids.max())
            if low < -self._source_length or high >= self._source_length:
                self._refuse(
                    f"the batch sampler yields positions from {low} to {high}, outside a dataset of"
                    f" {self._source_length} samples"
                )
                return None
            if low < 0:
                ids = np.where(ids < 0, ids + self._source_length, ids)
        return ids if self._map is None else self._map[ids]

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        self.current = None

    def without_ids(self, positions: Sequence[Any] | None) -> None:
        """Know that the batch just read has no ids, or is not to have any; None: the first such."""
        if self.reason is None and positions is None:
            self._refuse("the batch sampler yields something other than lists of integer positions")
        self.current = None

    def order_up(self) -> None:
        """Sum up the index lists of batches that were read, now and then, so that they are not all kept."""
        if len(self.read) >= _READ_AT_MOST:
            self.order(self._summed + len(self.read) - 1)


def array_bytes(values: Any) -> bytes:
    """Give the raw bytes of a tensor or array, so that equal contents have equal bytes.

    Args:
        values: Tensor (any device, any dtype) or numpy array.

    Returns:
        The elements in C order.
    """
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(values).tobytes()


def _refusal(loader: Any) -> str | None:
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__qualname__} is not a torch DataLoader, so its batches carry no sample ids"
    kind = type(loader)
    if kind is TensorLoader:
        return None
    if isinstance(loader.dataset, IterableDataset):
        return "an IterableDataset has no positions, so its batches carry no sample ids"
    if loader.batch_sampler is None:
        return "batch_size=None turns batching off, so batches carry no sample ids"
    if not getattr(loader, "in_order", True):
        return "in_order=False yields batches in any order, so they cannot be matched with their sample ids"
    for name in ("__iter__", "_get_iterator", "_index_sampler"):
        if getattr(kind, name) is not getattr(DataLoader, name):
            return (
                f"{kind.__qualname__} overrides DataLoader.{name}, so its batches need not match its sampler"
            )
    if "batch_sampler" not in vars(loader):
        return f"{kind.__qualname__} computes its batch sampler, so batches cannot be matched with it"
    if getattr(loader, "_iterator", None) is not None:
        return "the loader's persistent workers run already; pass a loader that was not iterated before to get sample ids"
    return None


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _content(dataset: Any) -> list[Any]:
    """Give the arrays that a dataset visibly holds, each with samples along its first dimension."""
    if isinstance(dataset, TensorDataset):
        return [tensor for tensor in dataset.tensors if _plain(tensor)]
    if isinstance(dataset, (list, tuple)):
        picked = np.unique(np.linspace(0, max(len(dataset) - 1, 0), _FINGERPRINT_ROWS).astype(np.int64))
        flat: list[Any] = []
        for index in picked.tolist() if len(dataset) else []:
            item = dataset[index]
            flat.extend(item if isinstance(item, (list, tuple)) else [item])
        return [part.reshape(1, -1) for part in flat if _plain(part)]
    found: list[Any] = []
    for name in _CONTENT_ATTRIBUTES:
        value = vars(dataset).get(name) if hasattr(dataset, "__dict__") else None
        if value is not None and _plain(value) and value.ndim:
            found.append(value)
    return found


def _plain(value: Any) -> bool:
    """Tell whether something is an array whose elements are its bytes: no Python objects, no sparse layout."""
    if isinstance(value, torch.Tensor):
        return value.layout is torch.strided
    return isinstance(value, np.ndarray) and value.dtype.kind != "O"
