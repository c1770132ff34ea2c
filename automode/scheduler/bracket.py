"""One bracket: the rungs from its first one up, and what may leave them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

from automode.scheduler.ladder import Ladder
from automode.scheduler.rung import Rung


class RungView(NamedTuple):
    """One rung as a progress display shows it.

    Attributes:
        bracket: The bracket's number.
        level: The rung's resource.
        size: Trials that reported, unusable values included.
        usable: Trials that reported a finite value.
        promoted: Trials that went on.
        in_flight: Segments on their way to it.
    """

    bracket: int
    level: int
    size: int
    usable: int
    promoted: int
    in_flight: int


class Bracket:
    """The rungs that one group of trials climbs, and how many segments are on their way to each.

    Args:
        ladder: The whole ladder.
        first: Index of the rung at which this bracket's trials start.
        quota: Never promote more than floor(size / eta) from a rung, whatever the order of arrival.
    """

    __slots__ = ("first", "in_flight", "ladder", "quota", "rungs")

    def __init__(self, *, ladder: Ladder, first: int, quota: bool) -> None:
        self.ladder = ladder
        self.first = first
        self.quota = quota
        self.rungs = [
            Rung(level=level, reduction_factor=ladder.reduction_factor) for level in ladder.levels[first:]
        ]
        self.in_flight = [0] * len(self.rungs)

    def rung(self, index: int) -> Rung:
        """Give the rung with this index of the whole ladder."""
        return self.rungs[index - self.first]

    def depart(self, index: int) -> None:
        """Count a segment that set out for this rung."""
        self.in_flight[index - self.first] += 1

    def arrive(self, index: int) -> None:
        """Count a segment for this rung that ended, one way or another."""
        self.in_flight[index - self.first] -= 1

    def promotable(self, index: int) -> int | None:
        """Give the trial that the paper's rule promotes from this rung now, or ``None``."""
        if not self.first <= index < self.ladder.top:
            return None
        key = self.rungs[index - self.first].promotable(quota=self.quota)
        return None if key is None else key[2]

    def drains(self) -> list[tuple[int, int]]:
        """List (rung index, trial) that settled rungs owe, lowest first; only valid once no candidate can start.

        A rung is settled when nothing is on its way to it or to a lower one. It then owes max(1, floor(size / eta))
        promotions in all, so that a short list still ends with a fully trained trial.
        """
        owing = []
        for place, rung in enumerate(self.rungs[:-1]):
            if self.in_flight[place]:
                break
            if rung.owed > 0 and (key := rung.waiting()) is not None:
                owing.append((self.first + place, key[2]))
        return owing

    def reached(self) -> int | None:
        """Give the highest rung index that a live trial waits at, ended at, or is on its way to."""
        for place in range(len(self.rungs) - 1, -1, -1):
            rung = self.rungs[place]
            if self.in_flight[place] or rung.waiting() is not None:
                return self.first + place
        return None

    def withdraw(self, trial: int) -> None:
        """Take a trial out of every rung."""
        for rung in self.rungs:
            rung.withdraw(trial)


class Assignment:
    """Which bracket a trial belongs to: a hash of its number and the seed, weighted as in Hyperband.

    Bracket ``b`` starts at rung ``b`` and gets ``ceil((K + 1) * eta**(K - b) / (K - b + 1))`` parts of the
    candidates, with K the top rung's index (Li et al., Hyperband, JMLR 2018, algorithm 1, over the same ladder).

    Args:
        ladder: The whole ladder.
        brackets: How many brackets there are; 1 gives everything to bracket 0.
        seed: Mixed into the hash.
    """

    __slots__ = ("_bounds", "_seed")

    def __init__(self, *, ladder: Ladder, brackets: int, seed: int) -> None:
        top = ladder.top
        self._seed = seed
        weights = (
            -(-(top + 1) * ladder.reduction_factor ** (top - b) // (top - b + 1)) for b in range(brackets)
        )
        self._bounds = list(accumulate(weights))

    def __call__(self, trial: int) -> int:
        """Give the bracket of a trial."""
        if len(self._bounds) == 1:
            return 0
        digest = hashlib.blake2b(f"{self._seed}/{trial}".encode(), digest_size=16).digest()
        return bisect_right(self._bounds, int.from_bytes(digest, "big") % self._bounds[-1])
