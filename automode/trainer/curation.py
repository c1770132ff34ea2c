"""Samples that the trunk no longer trains on, or trains on with other labels, since a card was adopted that did so.

The loader, its sampler and its random numbers stay the user's: a batch is drawn as ever, and the rows of what is left out
are taken from it before the step; labels are replaced in a copy of its targets. Compute is charged as if nothing were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from automode.trainer.held_back import HeldBack, lost
from automode.trainer.ids import RecordedLoader
from automode.trainer.new_labels import NewLabels
from automode.trainer.rows import rows_of
from automode.trainer.sample_source import Ids
from automode.trainer.user_warning import warn_user

LEAST_ROWS = 2
"""A batch of which fewer rows would remain is trained on as it came: norm layers cannot train on a single sample."""


class Curation:
    """Takes left-out samples from batches, and gives others new labels.

    Args:
        loader: Maps positions in the loader's dataset to sample ids.
        excluded: Ids of the samples to leave out.
        relabelled: Labels that take the place of the data's own.
        held: Samples that are never trained on; None: none are held out.

    Attributes:
        excluded: As given, ascending and each once.
        relabelled: As given.
    """

    def __init__(
        self,
        loader: RecordedLoader,
        excluded: Ids,
        relabelled: NewLabels | None = None,
        held: HeldBack | None = None,
    ) -> None:
        self._held = held
        self.relabelled = NewLabels.none() if relabelled is None else relabelled
        self.excluded = np.unique(np.asarray(excluded, dtype=np.int64))
        self._loader = loader
        self._warned = False
        self._out = np.zeros(int(self.excluded[-1]) + 1 if self.excluded.size else 0, dtype=np.bool_)
        self._out[self.excluded] = True

    def __call__(self, batch: Any, positions: Sequence[Any] | None) -> tuple[Any, Sequence[Any] | None]:
        """Return batch and positions without the rows that are left out, with new labels where there are any.

        Args:
            batch: Tensors, arrays and lists with one row a sample along the first dimension, in containers of any depth;
                anything else in it stays as it is.
            positions: What :meth:`RecordedLoader.ids_of_batch` gave; None leaves the batch as it is, and warns.

        Raises:
            DataError: There are no positions any more, and samples are held out.
        """
        ids = None if positions is None else self._loader.root_ids([positions])
        if positions is None or ids is None:
            if self._held is not None:
                raise lost(self._loader.reason)
            self._warn()
            return batch, positions
        if self._held is not None:
            batch, positions, ids = self._without_held(self._held, batch, positions, ids)
        known = ids < self._out.size
        keep = np.ones(ids.size, dtype=np.bool_)
        keep[known] = ~self._out[ids[known]]
        rows = np.flatnonzero(keep)
        if rows.size == ids.size or rows.size < LEAST_ROWS:
            return self.relabelled.put(batch, ids), positions
        kept = self.relabelled.put(rows_of(batch, rows, ids.size), ids[rows])
        return kept, [positions[row] for row in rows.tolist()]

    @staticmethod
    def _without_held(
        held: HeldBack, batch: Any, positions: Sequence[Any], ids: Ids
    ) -> tuple[Any, Sequence[Any], Ids]:
        """Take held-out rows from a batch; where too few would remain, read it anew with others in their places."""
        free = np.flatnonzero(~held.holds(ids))
        if free.size == ids.size:
            return batch, positions, ids
        if free.size >= LEAST_ROWS:
            return rows_of(batch, free, ids.size), [positions[row] for row in free.tolist()], ids[free]
        batch, taken = held.replaced(positions, ids)
        return batch, taken, held.ids_at(taken)

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        lost = [f"{self.excluded.size} samples that an adopted card left out are trained on again"]
        if self.relabelled.size:
            lost.append(f"{self.relabelled.size} that it relabelled have the labels of the data again")
        warn_user(
            f"{' and '.join(lost)}: batches have lost their sample ids ({self._loader.reason})",
            RuntimeWarning,
        )
