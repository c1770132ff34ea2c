"""New labels of some samples: they take the place of the data's own between the loader and the loss, and nowhere else.

A data set is never written to. What a loader or a source of samples has collated is a fresh batch, of which the targets are copied
before any of them is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from automode.errors import DataError
from automode.trainer.sample_source import Ids


@dataclass(frozen=True, slots=True)
class NewLabels:
    """Classes by sample id.

    Attributes:
        ids: Ascending, each once.
        labels: The class of each, from 0.
    """

    ids: Ids
    labels: Ids

    @classmethod
    def none(cls) -> NewLabels:
        """No labels at all."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    @classmethod
    def of(cls, ids: Any, labels: Any) -> NewLabels:
        """Put pairs in order; ids must differ."""
        ids, labels = np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        return cls(ids[order], labels[order])

    @classmethod
    def unpacked(cls, rows: Any) -> NewLabels:
        """Read what :meth:`packed` gave; more columns are passed over."""
        array = np.asarray(rows, dtype=np.int64)
        return cls(array[:, 0].copy(), array[:, 1].copy())

    @property
    def size(self) -> int:
        """How many samples have one."""
        return int(self.ids.size)

    def packed(self) -> Ids:
        """Ids and classes as the columns of one array, [n, 2]."""
        return np.stack([self.ids, self.labels], axis=1)

    def over(self, others: NewLabels) -> NewLabels:
        """These and the others; where both know a sample, these."""
        rest = ~np.isin(others.ids, self.ids)
        return NewLabels.of(
            np.concatenate([self.ids, others.ids[rest]]), np.concatenate([self.labels, others.labels[rest]])
        )

    def without(self, ids: Ids) -> NewLabels:
        """These but for some samples."""
        keep = ~np.isin(self.ids, ids)
        return NewLabels(self.ids[keep], self.labels[keep])

    def put(self, batch: Any, ids: Ids) -> Any:
        """Return a batch with the new labels in it.

        Args:
            batch: ``(inputs, targets)`` with whole numbers, one a sample, as targets; it is left as it is.
            ids: The sample of each row.

        Raises:
            DataError: The targets are no such numbers.
        """
        if not self.size:
            return batch
        place = np.minimum(np.searchsorted(self.ids, ids), self.size - 1)
        rows = np.flatnonzero(self.ids[place] == ids)
        if not rows.size:
            return batch
        targets = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
        if (
            not isinstance(targets, Tensor)
            or targets.dim() != 1
            or targets.is_floating_point()
            or targets.shape[0] != ids.size
        ):
            raise DataError(
                "labels are replaced in batches (inputs, targets) whose targets are whole numbers, one a sample, and a batch came that "
                "is none: roll the card back that gave new labels"
            )
        changed = targets.clone()
        changed[torch.from_numpy(rows).to(targets.device)] = torch.from_numpy(self.labels[place[rows]]).to(
            device=targets.device, dtype=targets.dtype
        )
        return type(batch)((batch[0], changed)) if type(batch) in (list, tuple) else (batch[0], changed)
