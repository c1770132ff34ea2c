"""One rung of one bracket: who reached it, how they rank, who left it upwards."""

from __future__ import annotations

import math
from heapq import heappop, heappush

from automode.scheduler.ranking import Key, Ranking

Value = float | None
"""A reported metric as it came: finite, NaN, infinite or missing."""


def is_usable(value: Value) -> bool:
    """Tell whether a reported metric can be ranked: present and finite."""
    return value is not None and math.isfinite(value)


class Entry:
    """What one trial reported at one rung."""

    __slots__ = ("attempt", "key", "promoted", "seq", "value")

    def __init__(self, *, value: Value, seq: int, attempt: int, promoted: bool = False) -> None:
        self.value = value
        self.seq = seq
        self.attempt = attempt
        self.key: Key | None = None
        self.promoted = promoted


class Rung:
    """The trials that reported at one resource level.

    Ranks are exact and ties go to the earlier report. An unusable value (NaN, infinite, missing) counts in
    ``size``, takes no rank and is never offered for promotion.

    Args:
        level: The rung's resource.
        reduction_factor: One in this many is due for promotion.
    """

    __slots__ = ("_due_cache", "_eta", "_ranking", "_waiting", "entries", "level", "promoted")

    def __init__(self, *, level: int, reduction_factor: int) -> None:
        self.level = level
        self.entries: dict[int, Entry] = {}
        self.promoted = 0
        self._eta = reduction_factor
        self._ranking = Ranking()
        self._waiting: list[Key] = []
        self._due_cache: tuple[bool, Key | None] | None = None

    @property
    def size(self) -> int:
        """How many trials reported here, unusable values included."""
        return len(self.entries)

    @property
    def usable(self) -> int:
        """How many trials reported a finite value here."""
        return len(self._ranking)

    @property
    def due(self) -> int:
        """How many of the present entries the paper's rule lets go on: floor(size / eta)."""
        return len(self.entries) // self._eta

    @property
    def owed(self) -> int:
        """How many promotions a rung that nobody can join any more still has to make (the drain rule)."""
        return max(1, self.due) - self.promoted if self.entries else 0

    @property
    def best(self) -> Key | None:
        """The best key, promoted or not; ``None`` when no value is finite."""
        return self._ranking.first

    def record(self, trial: int, loss: float, entry: Entry) -> None:
        """Add a trial's report; ``loss`` is the value turned so that smaller is better."""
        assert trial not in self.entries, f"trial {trial} is already in the rung at {self.level}"
        self.entries[trial] = entry
        self._due_cache = None
        if not is_usable(entry.value):
            return
        key = (loss, entry.seq, trial)
        entry.key = key
        self._ranking.add(key)
        if entry.promoted:
            self.promoted += 1
        else:
            heappush(self._waiting, key)

    def rank(self, trial: int) -> int | None:
        """Give the trial's rank, 0 the best; ``None`` for an unusable value."""
        key = self.entries[trial].key
        return None if key is None else self._ranking.rank(key)

    def waiting(self) -> Key | None:
        """Give the best key that has not been promoted, or ``None``."""
        heap = self._waiting
        while heap:
            entry = self.entries.get(heap[0][2])
            if entry is not None and not entry.promoted:
                return heap[0]
            heappop(heap)
        return None

    def promotable(self, *, quota: bool) -> Key | None:
        """Give the best waiting key if its rank is below :attr:`due`, else ``None``.

        Only that one key needs testing: if it does not qualify, no worse one does.

        Args:
            quota: Also demand that fewer than :attr:`due` were promoted so far.
        """
        if self._due_cache is None or self._due_cache[0] != quota:
            key = self.waiting()
            if key is not None and (
                (quota and self.promoted >= self.due) or self._ranking.rank(key) >= self.due
            ):
                key = None
            self._due_cache = (quota, key)
        return self._due_cache[1]

    def promote(self, trial: int) -> None:
        """Mark a waiting trial as promoted; it can never be promoted from here again."""
        entry = self.entries[trial]
        assert entry.key is not None, f"trial {trial} has no finite value at {self.level}"
        assert not entry.promoted, f"trial {trial} was already promoted from {self.level}"
        entry.promoted = True
        self.promoted += 1
        self._due_cache = None

    def withdraw(self, trial: int) -> None:
        """Take a trial out: it competes no more, and a promotion that it used is given back."""
        entry = self.entries.pop(trial, None)
        if entry is None:
            return
        self._due_cache = None
        if entry.key is not None:
            self._ranking.remove(entry.key)
        if entry.promoted:
            self.promoted -= 1

    def beyond(self, rank: int) -> list[int]:
        """Give the waiting trials whose rank is at least ``rank``, unusable ones not among them."""
        return [
            key[2]
            for place, key in enumerate(self._ranking)
            if place >= rank and not self.entries[key[2]].promoted
        ]
