"""Scores of the signals study, each with an interval: Wilson for shares, bootstrap for medians and rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite, sqrt

import numpy as np
from _study_traces import AFTER, BUDGET, CREDIT, Trace
from _study_training import PROBE_EVERY

GAIN = 0.01
ROOM = 3 * BUDGET // 2
"""Steps from a plateau's first to its segment's last that `signals_traces.py` asks for: B / 2 that it lasts, and B to look ahead."""

Z95 = 1.96


def share(hits: int, n: int) -> str:
    """A share with its 95 % Wilson interval."""
    if not n:
        return "none"
    p, z2 = hits / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return f"{hits}/{n} = {p:.3f} [{max(0.0, middle - half):.3f}, {min(1.0, middle + half):.3f}]"


def bootstrap(values: Sequence[float], statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of a statistic of independent values."""
    rng = np.random.default_rng(0)
    array = np.array(values, dtype=float)
    draws = [statistic(array[rng.integers(0, len(array), len(array))]) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def merged(rows: Sequence[int]) -> list[int]:
    """Alarms less than CREDIT steps after one before are one with it."""
    ordered = sorted(set(rows))
    return [t for i, t in enumerate(ordered) if i == 0 or t - ordered[i - 1] >= CREDIT]


def gains(start: int, probe: Sequence[float]) -> dict[int, float]:
    """What the next B steps brought: the relative drop of the probe (median over +-100 steps), by step."""
    with np.errstate(all="ignore"):
        smooth = np.array([np.median(probe[max(0, i - 5) : i + 6]) for i in range(len(probe))])
    ahead = BUDGET // PROBE_EVERY
    first = -(-start // PROBE_EVERY) * PROBE_EVERY
    return {
        first + i * PROBE_EVERY: float(1.0 - smooth[i + ahead] / smooth[i]) for i in range(len(probe) - ahead)
    }


def lasting(drop: dict[int, float], stop: int) -> int | None:
    """First step before `stop` from which the next B bring less than 1 %, at every look for B / 2 steps."""
    steps = [t for t in sorted(drop) if t < stop]
    need = BUDGET // 2 // PROBE_EVERY
    for i in range(len(steps) - need + 1):
        if all(drop[t] < GAIN for t in steps[i : i + need]):
            return steps[i]
    return None


@dataclass
class Plateaus:
    """First alarms, segment by segment."""

    segments: int = 0
    false: int = 0
    true: int = 0
    with_plateau: int = 0
    found: int = 0
    with_room: int = 0
    found_with_room: int = 0
    delays: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, start: int, stop: int, probe: Sequence[float], alarm: int | None) -> None:
        """Score one segment: an alarm is false where the next B steps bring more than 2 %, true below 1 %."""
        drop = gains(start, probe)
        onset = lasting(drop, stop)
        self.segments += 1
        at = None if alarm is None else drop[max(t for t in drop if t <= max(alarm, min(drop)))]
        improving = at is not None and at > 0.02
        if improving:
            self.false += 1
            self.wrong.append(f"{name} at {alarm}: the next {BUDGET} steps brought {at:.1%}")
        elif at is not None and at < GAIN:
            self.true += 1
        if onset is not None:
            self.with_plateau += 1
            hit = alarm is not None and not improving
            self.found += hit
            if stop - onset >= ROOM:
                self.with_room += 1
                self.found_with_room += hit
                self.delays.append(max(0.0, (alarm or 0) - onset) / BUDGET if hit else inf)

    def line(self) -> list[str]:
        """The figures as cells of the table."""
        low, high = bootstrap(self.delays, lambda x: float(np.median(x))) if self.delays else (inf, inf)
        delay = float(np.median(self.delays)) if self.delays else inf
        return [
            share(self.false, self.segments),
            share(self.true, self.true + self.false),
            share(self.found_with_room, self.with_room),
            share(self.found, self.with_plateau),
            f"{_told(delay)} [{_told(low)}, {_told(high)}]",
        ]


def _told(value: float) -> str:
    return f"{value:.2f}" if isfinite(value) else "never"


def disturbed(trace: Trace, event: dict[str, object]) -> bool:
    """Whether an event measurably disturbed its run.

    Something was not finite; or the loss or gradient norm exceeded 1.25 times its largest of the 200 steps before; or 20 steps after the
    event the probe stood a tenth above that of a twin that took the same steps without it.
    """
    at, steps = int(str(event["at"])), int(str(event["steps"]))
    stop = min(len(trace.loss), at + steps + CREDIT)
    for values in (trace.loss, trace.gnorm):
        before, after = values[max(0, at - 200) : at], values[at:stop]
        if not np.isfinite(after).all() or after.max() > 1.25 * before[np.isfinite(before)].max():
            return True
    return not float(str(event["after"])) <= 1.1 * float(str(event["twin"]))


@dataclass
class Spikes:
    """Events found and missed, and alarms in runs without events."""

    found: dict[str, list[bool]] = field(default_factory=dict)
    delays: list[int] = field(default_factory=list)
    rates: list[tuple[int, int, str]] = field(default_factory=list)

    def add_events(self, trace: Trace, rows: Sequence[int]) -> None:
        """Credit alarms from an event's first step until CREDIT steps after its last."""
        for event in trace.events:
            if not disturbed(trace, event):
                continue
            at = int(event["at"])
            hits = [t for t in rows if at <= t < at + int(event["steps"]) + CREDIT]
            self.found.setdefault(str(event["kind"]), []).append(bool(hits))
            if hits:
                self.delays.append(min(hits) - at)

    def add_clean(self, trace: Trace, rows: Sequence[int]) -> None:
        """Count the alarms of a run without events."""
        self.rates.append((len(merged(rows)), len(trace.loss), trace.name))

    def line(self) -> list[str]:
        """The figures as cells of the table."""
        every = [hit for hits in self.found.values() for hit in hits]
        rates = [1e4 * k / n for k, n, _ in self.rates]
        low, high = bootstrap(rates, lambda x: float(x.mean()))
        if not any(rates):  # nothing to draw from: what a Poisson rate may be at the most (97.5 %)
            high = 3.69e4 / sum(n for _, n, _ in self.rates)
        worst = max(self.rates, key=lambda r: r[0] / r[1])
        return [
            share(sum(every), len(every)),
            f"{np.mean(rates):.2f} [{low:.2f}, {high:.2f}]",
            f"{max(rates):.1f} ({worst[2] if worst[0] else 'none'})",
            f"{np.mean([r == 0 for r in rates]):.2f}",
            f"{np.median(self.delays):.0f}" if self.delays else "never",
        ]


def false_after_kick(trace: Trace, alarms: Sequence[int]) -> bool | None:
    """Whether a plateau was called within AFTER steps of the kick although the next B brought more than 2 %; None: nothing to gain."""
    start, _, probe = trace.segments[0]
    drop = gains(start, probe)
    if not any(drop[t] > 0.02 for t in drop if t >= start + 100):
        return None
    for t in alarms:
        if start <= t < start + AFTER:
            return drop[max(s for s in drop if s <= max(t, min(drop)))] > 0.02
    return False


@dataclass
class Divergence:
    """Diverging runs warned of in time, and clean runs alarmed."""

    warned: int = 0
    runs: int = 0
    early: int = 0
    leads: list[float] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    clean: list[tuple[str, bool]] = field(default_factory=list)

    def add(self, trace: Trace, rows: Sequence[int]) -> None:
        """Score one run that doubled its probe."""
        assert trace.onset is not None
        assert trace.doubled is not None
        self.runs += 1
        self.early += any(t < trace.onset for t in rows)
        hits = [t for t in rows if trace.onset <= t < trace.doubled]
        if hits:
            self.warned += 1
            self.leads.append(trace.doubled - min(hits))
        else:
            self.missed.append(f"{trace.name} (doubled {trace.doubled - trace.onset} steps after the onset)")

    def add_clean(self, trace: Trace, rows: Sequence[int]) -> None:
        """Note a clean run that was alarmed, and whether its loss did rise by a tenth over the B steps before."""
        if not rows:
            return
        at = rows[0]
        loss = trace.loss[: at + 1]
        old, new = np.median(loss[-BUDGET : -BUDGET // 2]), np.median(loss[-100:])
        self.clean.append((f"{trace.name} at {at}", bool(new > 1.1 * old)))


def windows(trace: Trace) -> list[tuple[int, int]]:
    """Where the rate jumps by more than a tenth: the parts that plateau rules see one by one."""
    with np.errstate(all="ignore"):
        jumps = np.flatnonzero(np.abs(np.diff(trace.lr)) > 0.10 * np.abs(trace.lr[:-1])) + 1
    return list(pairwise([0, *jumps.tolist(), len(trace.lr)]))
