"""How good are the plateau and spike signals on recorded training runs?

Usage: AUTOMODE_DATA=/folder/with/traces python benchmarks/signals_traces.py

Reads ``traces/*.npz`` below the folder (arrays ``loss`` of every step, ``gnorm`` before clipping, ``lr``, ``probe``: the loss on
fixed examples every 20 steps; ``meta``: JSON, with the injected ``events`` in ``spike*`` runs) and prints

* plateau: per segment (cut where the learning rate jumps), the first alarm against the probe's truth. Over the next B steps
  the probe (median over +-100 steps) falls by more than 2 %: improving; by less than 1 %: plateau; between: neither.
  A false alarm is a first alarm while improving; recall and delay are over segments with a plateau that lasts at least
  B / 2 steps, from its first step. In the last B steps of a segment the probe cannot look ahead: its last answer stands.
* spikes: recall over the injected events that measurably disturbed the run, and false alarms per 10 000 steps in clean
  runs. Alarms less than 12 steps apart are one; an event is credited until 12 steps after its end. An event counts as disturbing when
  within that time something was not finite, or the loss or gradient norm exceeded 1.25 times its largest of the 200 steps
  before, or the next two probes exceed the last one before by 10 %.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from automode.planner.policy import Policy
from automode.planner.signals import TrendState
from automode.planner.watching import signals_for

BUDGET = 800
GAIN = 0.01
POLICY = Policy()
PROBE_EVERY = 20
CREDIT = 12
SPIKE_ALARMS = ("non_finite", "loss", "grad_norm", "joint", "shift")
Array = NDArray[np.float64]


@dataclass
class Trace:
    """One recorded run."""

    name: str
    loss: Array
    gnorm: Array
    lr: Array
    probe: Array
    events: list[tuple[int, int, str]]


@dataclass
class Replay:
    """What the suite said at every step of a run."""

    advise: list[str] = field(default_factory=list)
    execute: list[str] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    alarms: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


def load(path: Path) -> Trace:
    with np.load(path) as data:
        meta: dict[str, Any] = json.loads(str(data["meta"]))
        return Trace(
            name=path.stem,
            loss=data["loss"],
            gnorm=data["gnorm"],
            lr=data["lr"],
            probe=data["probe"],
            events=[(int(t), int(n), str(kind)) for t, n, kind in meta.get("events", [])],
        )


def replay(trace: Trace) -> Replay:
    suite = signals_for(POLICY, BUDGET)
    out = Replay()
    regressing = False
    columns = (trace.loss.tolist(), trace.gnorm.tolist(), trace.lr.tolist())
    for step, (loss, gnorm, lr) in enumerate(zip(*columns, strict=True)):
        readings = suite.observe(step, loss, gnorm, lr) or ()
        out.advise.append(str(suite.trend.status))
        out.execute.append(str(suite.trend.firm))
        out.best.append(suite.trend.best_execute)
        if suite.non_finite.bad_run:
            out.alarms["non_finite"].append(step)
        if suite.loss_z.fired:
            out.alarms["loss"].append(step)
        if suite.grad_norm_z.fired:
            out.alarms["grad_norm"].append(step)
        if suite.joint_z.fired:
            out.alarms["joint"].append(step)
        entered = {(r.name, r.state) for r in readings}
        if ("level_shift", "SHIFTED") in entered:
            out.alarms["shift"].append(step)
        if ("drift", "DRIFTING") in entered:
            out.alarms["drift"].append(step)
        now = suite.trend.status is TrendState.REGRESSING
        if now and not regressing:
            out.alarms["regressing"].append(step)
        regressing = now
    return out


def segments(lr: Array) -> list[tuple[int, int]]:
    """Half-open step ranges between learning rate jumps of more than 10 %."""
    with np.errstate(divide="ignore", invalid="ignore"):
        jumps = np.flatnonzero(np.abs(np.diff(lr)) > 0.10 * np.abs(lr[:-1])) + 1
    cuts = [0, *jumps.tolist(), len(lr)]
    return [(a, b) for a, b in pairwise(cuts) if b - a > BUDGET + 200]


def truth(trace: Trace, start: int, stop: int) -> dict[int, float]:
    """Relative drop of the smoothed probe over the next BUDGET steps, by step."""
    first, last = -(-start // PROBE_EVERY), (stop - 1) // PROBE_EVERY
    probe = trace.probe[first : last + 1]
    smooth = np.array([np.median(probe[max(0, i - 5) : i + 6]) for i in range(len(probe))])
    ahead = BUDGET // PROBE_EVERY
    return {(first + i) * PROBE_EVERY: 1.0 - smooth[i + ahead] / smooth[i] for i in range(len(probe) - ahead)}


def lasting_plateau(drop: dict[int, float]) -> int | None:
    """First step from which the drop stays below 1 % for BUDGET / 2 steps."""
    steps = sorted(drop)
    need = BUDGET // 2 // PROBE_EVERY
    for i in range(len(steps) - need + 1):
        if all(drop[t] < 0.01 for t in steps[i : i + need]):
            return steps[i]
    return None


@dataclass
class Plateaus:
    """Counts over segments."""

    segments: int = 0
    false: int = 0
    true: int = 0
    with_plateau: int = 0
    found: int = 0
    delays: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, trace: Trace, start: int, stop: int, states: list[str], best: list[float]) -> None:
        """Score the first alarm of one segment."""
        drop = truth(trace, start, stop)
        if not drop:
            return
        last = max(drop)
        onset = lasting_plateau(drop)
        alarm = next((t for t in range(start, stop) if states[t] == "PLATEAU"), None)
        self.segments += 1
        at = None if alarm is None else drop.get(min(last, alarm // PROBE_EVERY * PROBE_EVERY), math.nan)
        improving = at is not None and at > 0.02
        if improving:
            self.false += 1
            self.wrong.append(f"{trace.name}@{alarm}: best case {best[alarm or 0]:.4f}, truth {at:.4f}")
        elif at is not None and at < 0.01:
            self.true += 1
        if onset is not None:
            self.with_plateau += 1
            if alarm is not None and not improving:
                self.found += 1
                self.delays.append(max(0.0, alarm - onset))
            else:
                self.delays.append(math.inf)

    def line(self, name: str) -> str:
        """Return the figures as a line of the table."""
        claims = self.false + self.true
        return (
            f"{name:<24} segments {self.segments:>4}  FA {self.false / self.segments:.3f}  "
            f"recall {self.found}/{self.with_plateau} = {self.found / max(1, self.with_plateau):.3f}  "
            f"precision {self.true / max(1, claims):.3f}  median delay {median(self.delays):.0f}"
        )


def onsets(steps: list[int]) -> list[int]:
    """Steps that follow the one before by CREDIT or more: alarms closer together are one."""
    ordered = sorted(set(steps))
    return [t for i, t in enumerate(ordered) if i == 0 or t - ordered[i - 1] >= CREDIT]


def disturbed(trace: Trace, start: int, length: int) -> bool:
    stop = min(len(trace.loss), start + length + CREDIT)
    for values in (trace.loss, trace.gnorm):
        before, after = values[max(0, start - 200) : start], values[start:stop]
        if not np.isfinite(before[-50:]).all():
            return False
        if not np.isfinite(after).all() or after.max() > 1.25 * before.max():
            return True
    i = start // PROBE_EVERY
    after_probe = trace.probe[i + 1 : i + 3]
    return bool((after_probe > 1.1 * trace.probe[max(0, i - 1)]).any())


def report_plateaus(runs: list[tuple[Trace, Replay]]) -> None:
    print(f"\nPlateau (B = {BUDGET} steps, rho = {GAIN:g})")
    trend = POLICY.trend
    for name, attribute in (
        (f"advise (z {trend.z_advise:g})", "advise"),
        (f"execute (z {trend.z_execute:g})", "execute"),
    ):
        counts = Plateaus()
        for trace, said in runs:
            for start, stop in segments(trace.lr):
                counts.add(trace, start, stop, getattr(said, attribute), said.best)
        print("  " + counts.line(name))
        for wrong in counts.wrong:
            print("      false:", wrong)


def report_clean(runs: list[tuple[Trace, Replay]]) -> None:
    steps = sum(len(trace.loss) for trace, _ in runs)
    print(f"\nClean runs: {len(runs)} runs, {steps} steps; alarms per 10 000 steps")
    rules = {
        "loss": ["loss"],
        "grad_norm": ["grad_norm"],
        "joint": ["joint"],
        "shift": ["shift"],
        "drift": ["drift"],
        "all of these": [*SPIKE_ALARMS],
    }
    for name, kinds in rules.items():
        found = [
            (1e4 * len(onsets([t for k in kinds for t in said.alarms[k]])) / len(tr.loss), tr.name)
            for tr, said in runs
        ]
        total = sum(rate * len(tr.loss) / 1e4 for (rate, _), (tr, _) in zip(found, runs, strict=True))
        quiet = sum(rate == 0.0 for rate, _ in found) / len(found)
        worst = max(found)
        print(
            f"  {name:<26} {1e4 * total / steps:6.2f}   runs without any {quiet:.2f}   worst {worst[0]:.1f} ({worst[1]})"
        )
    alarmed = [trace.name for trace, said in runs if said.alarms["regressing"]]
    print(f"  REGRESSING: {len(alarmed)}/{len(runs)} runs ever alarmed {alarmed}")


def report_spikes(runs: list[tuple[Trace, Replay]]) -> None:
    by_kind: dict[str, list[bool]] = defaultdict(list)
    by_rule: dict[str, int] = defaultdict(int)
    delays: list[int] = []
    stray = events = 0
    for trace, said in runs:
        spans = [(t, t + n + CREDIT) for t, n, _ in trace.events]
        for t, n, kind in trace.events:
            if not disturbed(trace, t, n):
                continue
            events += 1
            hits = {rule: [a for a in at if t <= a < t + n + CREDIT] for rule, at in said.alarms.items()}
            combined = [a for rule in SPIKE_ALARMS for a in hits.get(rule, [])]
            by_kind[kind].append(bool(combined))
            if combined:
                delays.append(min(combined) - t)
            else:
                print(f"      missed: {trace.name} {kind} at {t}")
            for rule, at in hits.items():
                by_rule[rule] += bool(at)
        combined = [a for rule in SPIKE_ALARMS for a in said.alarms[rule]]
        stray += sum(not any(a <= t < b + 100 for a, b in spans) for t in onsets(combined))
    hit = sum(sum(v) for v in by_kind.values())
    print(f"\nSpikes: {events} disturbing events in {len(runs)} runs")
    print(
        f"  combined recall {hit}/{events} = {hit / max(1, events):.3f}; precision {hit / max(1, hit + stray):.3f}"
    )
    print(f"  delay: median {median(delays):.0f}, p90 {np.percentile(delays, 90):.0f} steps")
    for kind, found in sorted(by_kind.items()):
        print(f"    {kind:<18} {sum(found)}/{len(found)}")
    for rule, count in sorted(by_rule.items()):
        print(f"    by {rule:<15} {count}/{events}")


def main() -> int:
    root = os.environ.get("AUTOMODE_DATA")
    if not root:
        print(
            "skipped: set AUTOMODE_DATA to a folder that holds traces/*.npz (recorded runs are not in the repository)"
        )
        return 0
    paths = sorted((Path(root) / "traces").glob("*.npz"))
    if not paths:
        print(f"skipped: no traces/*.npz below AUTOMODE_DATA={root}")
        return 0
    runs = [(trace, replay(trace)) for trace in map(load, paths)]
    clean = [run for run in runs if not run[0].events]
    injected = [run for run in runs if run[0].events]
    if clean:
        report_plateaus(clean)
        report_clean(clean)
    if injected:
        report_spikes(injected)
    return 0


if __name__ == "__main__":
    sys.exit(main())
