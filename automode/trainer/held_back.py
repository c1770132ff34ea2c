"""Training samples that no batch may hold, and what takes their places where too little of a batch would be left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from automode.errors import DataError
from automode.trainer.random_state import seeded_rng
from automode.trainer.sample_source import Ids

INSTEAD: Final = (
    "pass a validation loader (torch.utils.data.random_split makes one), or leave holdout_share out"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBack:
    """Training samples that no batch may hold.

    Attributes:
        ids: Their ids, ascending.
        positions: Where they are in the loader's dataset, each once.
        of: How many samples the loader reads in all.
        stand_ins: Positions of training samples, one for each of :attr:`ids`, that take their places in a batch of which too little is left.
        fetch: Reads a batch by positions, as the loader would.
        ids_at: Ids of the samples at positions.
        seed: The session's.
    """

    ids: Ids
    positions: Ids
    of: int
    stand_ins: Ids
    fetch: Callable[[Sequence[int]], Any]
    ids_at: Callable[[Sequence[int]], Ids]
    seed: int

    @property
    def trained(self) -> float:
        """Share of the loader's samples that are trained on."""
        return 1.0 - self.ids.size / self.of

    def holds(self, ids: Ids) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Mark which samples are held out; quick however many there are."""
        place = np.minimum(np.searchsorted(self.ids, ids), self.ids.size - 1)
        found: np.ndarray[Any, np.dtype[np.bool_]] = self.ids[place] == ids
        return found

    def replaced(self, positions: Sequence[Any], ids: Ids) -> tuple[Any, list[int]]:
        """Read a batch anew, with a training sample in the place of each held-out one; the same again in a run that is taken up.

        Args:
            positions: Of the batch, in the loader's dataset.
            ids: Of the same samples.
        """
        place = np.searchsorted(self.ids, ids)
        inside = self.holds(ids)
        taken = [
            int(self.stand_ins[place[row]]) if inside[row] else int(position)
            for row, position in enumerate(positions)
        ]
        with seeded_rng(self.seed + taken[0]):
            return self.fetch(taken), taken


def lost(reason: str | None) -> DataError:
    """What a run ends with whose batches do not tell their samples any more."""
    return DataError(
        f"batches have lost their sample ids ({reason}), so that held-out samples cannot be kept out of training any more: {INSTEAD}"
    )
