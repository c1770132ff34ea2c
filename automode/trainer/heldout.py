"""Held-out data: split once a session by sample id into val-A and val-B, and checked for training samples among it.

val-A chooses (rungs, averages, the gate), val-B judges (one look a card). The split is stratified by class and seeded.
A validation set that shares samples with the training set proves nothing, so that is looked for: by
identity of the root dataset and ids, and where the roots differ, by the content of the samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from automode.errors import DataError
from automode.merges.batches import move
from automode.planner.pricing import CHOOSING
from automode.trainer.evaluation import Ids, Part
from automode.trainer.ids import root_of
from automode.trainer.random_state import forked_rng, seeded_rng
from automode.trainer.reach import positions_read

COMPARED = 2000
"""Validation samples, at the most, whose content is looked for in the training set."""

SEARCHED = 20_000
"""Training samples, at the most, that are read one by one for that; of TensorDatasets all rows are compared."""

HASHED_AT_ONCE = 65_536
BRIEF_WORDS = 16

READ_FOR_CLASSES = 5000
"""Samples, at the most, that are read one by one to split them by class, where a dataset does not keep its targets."""


_END = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Validation samples that are training samples too.

    Attributes:
        n: How many of those looked at.
        share: Of those looked at, 0 to 1.
        how: ``ids`` (same root dataset), ``content``, or ``unknown`` where it could not be looked for.
    """

    n: int
    share: float
    how: str


@dataclass(frozen=True, slots=True)
class _ById:
    """What of a loader is needed to read its samples by id."""

    dataset: Any
    collate_fn: Any
    batch_size: int | None


class HeldOut:
    """The validation set in two halves, read by a loader of our own.

    The user's loader is not iterated: samples are read in the order of their ids, by the same collate function and in batches of
    the same size, without workers, inside a forked random state.

    Args:
        loader: The user's validation loader.
        device: Where batches go.
        seed: Of the split.
        positions: Positions in its dataset to read; None: those that the loader reads.

    Attributes:
        ids: Sample ids (positions in the root dataset), in the order in which they are read.
        reason: Why there is no held-out evidence; None where there is.
        readable: Whether there are batches to be read.
    """

    readable = True

    def __init__(self, loader: Any, device: torch.device, seed: int, *, positions: Ids | None = None) -> None:
        self.reason: str | None = None
        self.ids: Ids = np.empty(0, dtype=np.int64)
        self._device = device
        self._seed = seed
        self._loader = loader
        self._positions: Ids = np.empty(0, dtype=np.int64)
        self._in_a: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._few: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self.reason = _refusal(loader)
        if self.reason is None:
            self._split(seed, positions)

    def __getstate__(self) -> dict[str, Any]:
        """Leave of the loader what reading by id takes, where that is how it is read: a worker needs no more."""
        state = dict(self.__dict__)
        if self.reason is None and not isinstance(self._loader, _ById):
            loader = self._loader
            state["_loader"] = _ById(loader.dataset, loader.collate_fn, loader.batch_size)
        return state

    @property
    def n_a(self) -> int:
        """Samples of val-A."""
        return int(self._in_a.sum())

    @property
    def n_b(self) -> int:
        """Samples of val-B."""
        return int(self._in_a.size - self._in_a.sum())

    def is_a(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Mark which ids belong to val-A."""
        return np.isin(ids, self.ids[self._in_a])

    def batches(self, part: Part | None) -> Iterator[tuple[Any, Ids]]:
        """A fresh pass over a part (the whole set for None): collated batches on the device, each with its ids."""
        if self.reason is not None:
            yield from self._as_they_come()
            return
        chosen = self._samples(part)
        positions, ids = self._positions[chosen], self.ids[chosen]
        size = self._loader.batch_size or 256
        for start in range(0, positions.size, size):
            batch = self._fetch(positions[start : start + size])
            yield move(batch, self._device), ids[start : start + size]

    def _samples(self, part: Part | None) -> npt.NDArray[np.bool_]:
        match part:
            case None:
                return np.ones_like(self._in_a)
            case "A":
                return self._in_a
            case "B":
                return ~self._in_a
            case "few":
                return self._few
            case _:
                assert_never(part)

    def _fetch(self, positions: Ids) -> Any:
        dataset, collate = self._loader.dataset, self._loader.collate_fn
        if type(dataset) is TensorDataset and collate is default_collate:
            rows = torch.from_numpy(positions)
            return [tensor[rows.to(tensor.device)] for tensor in dataset.tensors]
        # Seeded by where it begins: what a dataset draws for a sample (an augmentation) is the same for every network
        # that is judged on it. Around each fetch alone, since a pass may be left half-way.
        with seeded_rng(self._seed + int(positions[0])):
            return collate([dataset[int(i)] for i in positions])

    def _as_they_come(self) -> Iterator[tuple[Any, Ids]]:
        """Batches of a loader without ids, numbered as they come; for the user's own validation only."""
        seen = 0
        # Around each fetch alone, since a pass may be left half-way.
        with seeded_rng(self._seed):
            batches = iter(self._loader)
        while True:
            with seeded_rng(self._seed + seen):
                batch: Any = next(batches, _END)
            if batch is _END:
                return
            n = len(batch[0]) if isinstance(batch, list | tuple) else len(batch)
            yield move(batch, self._device), np.arange(seen, seen + n, dtype=np.int64)
            seen += n

    def _split(self, seed: int, given: Ids | None) -> None:
        dataset: Any = self._loader.dataset
        _, mapped = root_of(dataset)
        read = positions_read(self._loader, draw=True) if given is None else given
        positions = np.arange(len(dataset), dtype=np.int64) if read is None else read
        ids = positions if mapped is None else np.asarray(mapped, dtype=np.int64)[positions]
        order = np.argsort(ids, kind="stable")
        self._positions, self.ids = positions[order], ids[order]
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0xA]))
        self._in_a = halves(strata_of(dataset, self._positions), rng)
        self._few = np.zeros_like(self._in_a)
        self._few[rng.permutation(np.flatnonzero(self._in_a))[:CHOOSING]] = True


def _refusal(loader: Any) -> str | None:
    if not isinstance(loader, DataLoader):
        return f"the validation loader is a {type(loader).__name__}, whose samples have no ids"
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
        return "the validation dataset is iterable only, so its samples have no ids"
    if loader.batch_size is None and loader.batch_sampler is None:
        return "the validation loader does not batch (batch_size=None), so its samples have no ids"
    try:
        n = len(loader.dataset)  # type: ignore[arg-type]  # a dataset may have no length; that is what is asked
    except TypeError:
        return "the validation dataset has no length"
    return "the validation set is empty" if n == 0 else None


def strata_of(dataset: Any, positions: Ids) -> npt.NDArray[np.int64]:
    """Class of each sample where the samples are (input, class) pairs, else all one stratum."""
    one = np.zeros(positions.size, dtype=np.int64)
    try:
        with forked_rng():
            labels = _targets(dataset, positions)
    except (DataError, TypeError, IndexError, KeyError, ValueError, RuntimeError):
        return one
    return one if labels is None else labels


def _targets(dataset: Any, positions: Ids) -> npt.NDArray[np.int64] | None:
    root, mapped = root_of(dataset)
    kept = root.tensors[-1] if type(root) is TensorDataset and len(root.tensors) > 1 else _kept_targets(root)
    if kept is not None:
        if kept.dtype.is_floating_point or kept.dim() != 1:
            return None
        rows = positions if mapped is None else mapped[positions]
        return np.asarray(kept[torch.from_numpy(rows)].cpu().numpy(), dtype=np.int64)
    if positions.size > READ_FOR_CLASSES:
        return None
    first = dataset[int(positions[0])]
    if not isinstance(first, list | tuple) or len(first) < 2 or not _is_class(first[-1]):
        return None
    return np.array([int(dataset[int(i)][-1]) for i in positions], dtype=np.int64)


def _kept_targets(root: Any) -> torch.Tensor | None:
    """Classes that a dataset keeps in view, as torchvision's do."""
    for name in ("targets", "labels"):
        value = getattr(root, name, None)
        if isinstance(value, list | torch.Tensor | np.ndarray) and len(value) == len(root):
            return torch.as_tensor(value)
    return None


def _is_class(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and not value.is_floating_point()
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def halves(strata: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Mark half of each stratum, the strata given by number; odd ones out take turns, so that the halves differ by one at the most."""
    in_a = np.zeros(strata.size, dtype=np.bool_)
    turn = 0
    for value in np.unique(strata):
        mine = rng.permutation(np.flatnonzero(strata == value))
        take, odd = divmod(mine.size, 2)
        if odd:
            take += turn
            turn = 1 - turn
        in_a[mine[:take]] = True
    return in_a


def find_overlap(train: Any, val: Any) -> Overlap:
    """Look for validation samples in the training set.

    Args:
        train: The training dataset.
        val: The validation dataset.
    """
    try:
        train_root, train_ids = root_of(train)
        val_root, val_ids = root_of(val)
        n_train, n_val = len(train), len(val)
    except (TypeError, AttributeError):
        return Overlap(n=0, share=0.0, how="unknown")
    if train_root is val_root:
        mine = np.arange(n_train) if train_ids is None else np.asarray(train_ids)
        theirs = np.arange(n_val) if val_ids is None else np.asarray(val_ids)
        n = int(np.isin(theirs, mine).sum())
        return Overlap(n=n, share=n / max(1, n_val), how="ids")
    try:
        with forked_rng():
            return _by_content(train, val, n_train, n_val)
    except Exception:  # a dataset of any kind may fail to be read here; then nothing is known, which is said
        return Overlap(n=0, share=0.0, how="unknown")


def _by_content(train: Any, val: Any, n_train: int, n_val: int) -> Overlap:
    rng = np.random.default_rng(0)
    asked = np.arange(n_val) if n_val <= COMPARED else np.sort(rng.choice(n_val, COMPARED, replace=False))
    train_rows, val_rows = _input_rows(train), _input_rows(val)
    if train_rows is not None and val_rows is not None:
        if train_rows.shape[1:] != val_rows.shape[1:] or train_rows.dtype != val_rows.dtype:
            return Overlap(n=0, share=0.0, how="content")
        n = _rows_in_common(val_rows[torch.from_numpy(asked).to(val_rows.device)], train_rows)
        return Overlap(n=n, share=n / max(1, asked.size), how="content")
    rows = (
        np.arange(n_train) if n_train <= SEARCHED else np.sort(rng.choice(n_train, SEARCHED, replace=False))
    )
    wanted = [_digest(val[int(i)]) for i in asked]
    if not any(wanted):
        return Overlap(n=0, share=0.0, how="unknown")
    known = {_digest(train[int(i)]) for i in rows}
    n = sum(1 for digest in wanted if digest is not None and digest in known)
    return Overlap(n=n, share=n / max(1, asked.size), how="content")


def _input_rows(dataset: Any) -> torch.Tensor | None:
    """Inputs of a TensorDataset, or of a subset of one, with more than one number a sample."""
    root, mapped = root_of(dataset)
    if type(root) is not TensorDataset or root.tensors[0].layout is not torch.strided:
        return None
    inputs = root.tensors[0].detach()
    if inputs[:1].numel() < 2:
        return None
    return inputs if mapped is None else inputs[torch.from_numpy(mapped).to(inputs.device)]


def _rows_in_common(asked: torch.Tensor, known: torch.Tensor) -> int:
    """Count the rows of one tensor that are rows of another, by their bytes."""
    # A few words of each row tell nearly all apart; only the rest is read in full.
    asked_brief, known_brief = _row_hashes(asked, BRIEF_WORDS), _row_hashes(known, BRIEF_WORDS)
    asked = asked[torch.from_numpy(np.isin(asked_brief, known_brief)).to(asked.device)]
    known = known[torch.from_numpy(np.isin(known_brief, asked_brief)).to(known.device)]
    return int(np.isin(_row_hashes(asked), _row_hashes(known)).sum())


def _row_hashes(rows: torch.Tensor, words_read: int | None = None) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of the bytes of each row, or of some words spread over it; equal rows have equal hashes."""
    found = []
    for start in range(0, len(rows), HASHED_AT_ONCE):
        chunk = rows[start : start + HASHED_AT_ONCE]
        raw = chunk.reshape(len(chunk), -1).cpu().contiguous().view(torch.uint8).numpy()
        if raw.shape[1] % 8:
            raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8)))
        words = raw.view(np.uint64)
        if words_read is not None and words.shape[1] > words_read:
            words = words[:, np.linspace(0, words.shape[1] - 1, words_read).astype(np.intp)]
        odd = (
            np.random.default_rng(0x0A5).integers(1 << 62, size=(2, words.shape[1]), dtype=np.uint64) * 2 + 1
        )
        # Numbers of few significant bits are zero in their low ones: fold the high bits down before multiplying.
        words = (words ^ (words >> np.uint64(31))) * odd[0]
        words = (words ^ (words >> np.uint64(29))) * odd[1]
        found.append(words.sum(axis=1, dtype=np.uint64))
    return np.concatenate(found) if found else np.empty(0, dtype=np.uint64)


def _digest(sample: Any) -> bytes | None:
    """Digest of a sample's input; None where it holds no array of more than one number to compare."""
    value = sample[0] if isinstance(sample, list | tuple) and sample else sample
    if isinstance(value, torch.Tensor):
        value = (
            value.detach().cpu().contiguous().numpy()
            if value.dtype != torch.bfloat16
            else value.float().numpy()
        )
    if not isinstance(value, np.ndarray) or value.size < 2:
        return None
    return hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).digest()
