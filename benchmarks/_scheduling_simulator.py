"""A simulator of W workers over synthetic learning curves, and the rules that released schedulers follow.

eta = 4, r = 1, R = 256. Curves are power laws from the untrained loss 1.0 to an asymptote, ``y(t) = a + (1 - a) (1 + t)**-c``;
among ``crossing`` ones slow learners end lower, so that early ranks mislead. Reports carry noise (standard deviation .01),
seeded by (trial, resource): every rule sees the same curves. Stragglers multiply a segment's time by 1 + |z|, drops strike with
a fixed chance per time unit (Li et al., MLSys 2020, appendix A.1).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from typing import Protocol

import numpy as np

from automode.scheduler import ASHA, Lockstep

ETA, TOP = 4, 256
LEVELS = (1, 4, 16, 64, 256)
SIGMA = 0.01


class Pool:
    """Learning curves of n configurations.

    Attributes:
        best: The least final loss among them.
        good: The final loss of the last one in the best hundredth.
    """

    def __init__(self, n: int, seed: int, *, crossing: bool = False) -> None:
        rng = np.random.default_rng([seed, 1])
        self.seed = seed
        quality = rng.beta(1.6, 2.4, n)
        self.asymptote = 0.05 + 0.9 * quality
        self.rate = np.exp(rng.normal(-0.8, 0.4, n))
        if crossing:
            self.rate *= np.exp(2.0 * (quality - quality.mean()))
        self.cost = np.exp(rng.normal(0.0, 0.3, n))
        finals = sorted(self.true(i, TOP) for i in range(n))
        self.best, self.good = finals[0], finals[max(0, n // 100 - 1)]

    def true(self, trial: int, resource: int) -> float:
        """Noise-free loss."""
        a = float(self.asymptote[trial])
        return a + (1.0 - a) * (1.0 + resource) ** -float(self.rate[trial])

    def report(self, trial: int, resource: int) -> float:
        """Loss as measured: the same noise whoever asks."""
        noise = np.random.default_rng([self.seed, 2, trial, resource]).standard_normal()
        return self.true(trial, resource) + SIGMA * float(noise)


Segment = tuple[int, int, int]
"""(trial, from, to)"""


class Rule(Protocol):
    """What the simulator drives."""

    def next(self) -> Segment | None:
        """Give the next segment, or None when there is nothing to do for now."""

    def report(self, trial: int, resource: int, value: float) -> int | None:
        """Take a report; a resource means that the trial goes on to it in place."""

    def failed(self, trial: int) -> None:
        """Take a failure."""


class Ours:
    """The adapter of automode's scheduler."""

    def __init__(self, candidates: int | None, **options: object) -> None:
        self.asha = ASHA(1, TOP, ETA, candidates=candidates, **options)  # type: ignore[arg-type]

    def next(self) -> Segment | None:
        """Give the next segment, or None."""
        job = self.asha.next()
        return None if job is None else (job.trial, job.from_resource, job.to_resource)

    def report(self, trial: int, resource: int, value: float) -> None:
        """Take a report."""
        self.asha.report(trial, resource, value)

    def failed(self, trial: int) -> None:
        """Have it repeated."""
        self.asha.failed(trial)


class OursInLockstep(Ours):
    """The same in deterministic mode."""

    def __init__(self, candidates: int | None, slots: int) -> None:
        super().__init__(candidates)
        self.asha = Lockstep(self.asha, slots=slots)  # type: ignore[assignment]


class Paper:
    """ASHA as published: no drain, and a dropped trial is lost."""

    def __init__(self, n: int) -> None:
        self.n, self.started = n, 0
        self.values: dict[int, list[tuple[float, int]]] = {level: [] for level in LEVELS}
        self.waiting: dict[int, list[tuple[float, int]]] = {level: [] for level in LEVELS}

    def next(self) -> Segment | None:
        """Give the next segment, or None."""
        for low, high in reversed(list(pairwise(LEVELS))):
            if self.waiting[low]:
                key = self.waiting[low][0]
                if bisect_left(self.values[low], key) < len(self.values[low]) // ETA:
                    del self.waiting[low][0]
                    return key[1], low, high
        if self.started >= self.n:
            return None
        self.started += 1
        return self.started - 1, 0, LEVELS[0]

    def report(self, trial: int, resource: int, value: float) -> None:
        """Take a report."""
        insort(self.values[resource], (value, trial))
        insort(self.waiting[resource], (value, trial))

    def failed(self, trial: int) -> None:
        """The trial is lost."""


@dataclass
class Random:
    """Every configuration is trained fully."""

    n: int
    started: int = 0

    def next(self) -> Segment | None:
        """Give the next segment, or None."""
        if self.started >= self.n:
            return None
        self.started += 1
        return self.started - 1, 0, TOP

    def report(self, trial: int, resource: int, value: float) -> None:
        """Every configuration goes to the end anyway."""

    def failed(self, trial: int) -> None:
        """The trial is lost."""


@dataclass
class Synchronous:
    """Successive halving in brackets of 256 (or of all, if fewer); a bracket waits for the last of its rung."""

    n: int
    retry: bool = False
    started: int = 0
    brackets: list[dict[str, object]] = field(default_factory=list)
    home: dict[int, int] = field(default_factory=dict)
    ready: list[Segment] = field(default_factory=list)

    def next(self) -> Segment | None:
        """Give the next segment, or None."""
        if not self.ready:
            size = min(256, self.n - self.started)
            if size <= 0:
                return None
            trials = range(self.started, self.started + size)
            self.started += size
            self.home.update(dict.fromkeys(trials, len(self.brackets)))
            self.brackets.append({"rung": 0, "left": size, "values": []})
            self.ready += [(trial, 0, LEVELS[0]) for trial in trials]
        return self.ready.pop(0)

    def report(self, trial: int, resource: int, value: float) -> None:
        """Take a report."""
        self._arrive(trial, value)

    def failed(self, trial: int) -> None:
        """Have it repeated, or count it as done without a value."""
        bracket = self.brackets[self.home[trial]]
        rung = bracket["rung"]
        assert isinstance(rung, int)
        if self.retry:
            self.ready.insert(0, (trial, LEVELS[rung - 1] if rung else 0, LEVELS[rung]))
        else:
            self._arrive(trial, None)

    def _arrive(self, trial: int, value: float | None) -> None:
        bracket = self.brackets[self.home[trial]]
        values, left, rung = bracket["values"], bracket["left"], bracket["rung"]
        assert isinstance(values, list)
        assert isinstance(left, int)
        assert isinstance(rung, int)
        if value is not None:
            values.append((value, trial))
        bracket["left"] = left - 1
        if left > 1 or rung + 1 == len(LEVELS) or not values:
            return
        chosen = sorted(values)[: max(1, len(values) // ETA)]
        bracket.update(rung=rung + 1, left=len(chosen), values=[])
        self.ready = [(each, LEVELS[rung], LEVELS[rung + 1]) for _, each in chosen] + self.ready


@dataclass
class Stopping:
    """The rule of Optuna's pruner: at a rung a trial goes on if it is among the best max(1, n // eta) so far, else it stops."""

    n: int
    started: int = 0
    rungs: dict[int, list[float]] = field(default_factory=lambda: {level: [] for level in LEVELS})

    def next(self) -> Segment | None:
        """Give the next segment, or None."""
        if self.started >= self.n:
            return None
        self.started += 1
        return self.started - 1, 0, LEVELS[0]

    def report(self, trial: int, resource: int, value: float) -> int | None:
        """Let the trial go on, or stop it."""
        values = self.rungs[resource]
        values.append(value)
        values.sort()
        keeps = value <= values[max(1, len(values) // ETA) - 1]
        return LEVELS[LEVELS.index(resource) + 1] if keeps and resource < TOP else None

    def failed(self, trial: int) -> None:
        """The trial is lost."""


@dataclass
class Run:
    """What a simulation gives: regret at the asked times, and totals; times and cost are in R."""

    regret: list[float]
    final: float
    time_to_good: float
    cost: float
    full: int
    first_full: float
    end: float


def simulate(
    rule: Rule,
    pool: Pool,
    workers: int,
    *,
    until: float = math.inf,
    straggle: float = 0.0,
    p_drop: float = 0.0,
    varied_cost: bool = True,
    moments: tuple[float, ...] = (),
) -> Run:
    """Run a rule on simulated workers; time is in units of resource, moments and results are in R."""
    rng = np.random.default_rng([pool.seed, 3])
    heap: list[tuple[float, int, Segment, bool]] = []
    run = Run([], 1.0 - pool.best, math.inf, 0.0, 0, math.inf, 0.0)
    marks = sorted(moments)
    now, order, lowest = 0.0, 0, math.inf

    def launch(segment: Segment) -> None:
        nonlocal order
        trial, low, high = segment
        length = (high - low) * (float(pool.cost[trial]) if varied_cost else 1.0)
        length *= 1.0 + abs(float(rng.normal(0.0, straggle))) if straggle else 1.0
        lifetime = float(rng.geometric(p_drop)) if p_drop else math.inf
        order += 1
        heappush(heap, (now + min(length, lifetime), order, segment, lifetime < length))
        run.cost += (high - low) / TOP

    while True:
        while len(heap) < workers and (segment := rule.next()) is not None:
            launch(segment)
        if not heap or heap[0][0] > until:
            break
        now, _, (trial, _, high), dropped = heappop(heap)
        while marks and marks[0] * TOP < now:
            run.regret.append(run.final)
            marks.pop(0)
        if dropped:
            rule.failed(trial)
            continue
        value = pool.report(trial, high)
        if value < lowest:
            lowest, run.final = value, pool.true(trial, high) - pool.best
        if high == TOP:
            run.full += 1
            run.first_full = min(run.first_full, now / TOP)
            if pool.true(trial, TOP) <= pool.good:
                run.time_to_good = min(run.time_to_good, now / TOP)
        onward = rule.report(trial, high, value)
        if onward is not None:
            launch((trial, high, onward))
    run.end = now / TOP
    run.regret += [run.final] * len(marks)
    return run
