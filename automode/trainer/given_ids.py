"""Sample ids of a loop that is not ours: as its author gives them, or as a loader recorded them on their way past."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from automode.errors import UsageError
from automode.trainer.ids import RecordedLoader

IdArray = npt.NDArray[np.int64]


class RootIds(list[int]):
    """Positions in the root dataset, as opposed to those in a loader's own (a ``Subset``'s, say)."""


class GivenIds:
    """Maps what a watched step was given to positions in the root dataset.

    Args:
        loader: The training loader, whose positions are mapped and by whose length ids are checked; None: ids stand for
            themselves.

    Attributes:
        reason: Why there are no ids from here on; None while there are.
    """

    def __init__(self, loader: RecordedLoader | None) -> None:
        self.reason: str | None = None
        self._loader = loader

    def root_ids(self, batches: Sequence[Sequence[Any]]) -> IdArray | None:
        """Map the ids of several batches at once; None where one is no id, and :attr:`reason` says so from then on."""
        if all(type(batch) is RootIds for batch in batches):
            return self._checked(np.fromiter((i for batch in batches for i in batch), np.int64))
        if not any(type(batch) is RootIds for batch in batches):
            return self._mapped(batches)
        parts = [
            self._checked(np.asarray(batch, np.int64)) if type(batch) is RootIds else self._mapped([batch])
            for batch in batches
        ]
        return (
            None
            if any(part is None for part in parts)
            else np.concatenate([p for p in parts if p is not None])
        )

    def _mapped(self, batches: Sequence[Sequence[Any]]) -> IdArray | None:
        assert self._loader is not None
        found = self._loader.root_ids(batches)
        self.reason = self.reason or self._loader.reason
        return found

    def _checked(self, ids: IdArray) -> IdArray | None:
        length = None if self._loader is None else self._loader.length
        if ids.size and (ids.min() < 0 or (length is not None and ids.max() >= length)):
            last = "and up" if length is None else f"to {length - 1}"
            self.reason = f"ids from {ids.min()} to {ids.max()} came, and samples are numbered from 0 {last}"
            return None
        return ids


def root_ids_of(given: Any) -> RootIds:
    """Take ids as a user gives them: a tensor, an array or a sequence of whole numbers.

    Raises:
        UsageError: They are something else.
    """
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    try:
        if not all(type(i) is int for i in given):
            given = [operator.index(i) for i in given]
    except TypeError:
        raise UsageError(
            f"ids must be the samples' positions, a whole number for each, got {type(given).__name__} {str(given)[:80]}"
        ) from None
    return RootIds(given)
