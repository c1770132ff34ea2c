"""How good are the signals on runs that no threshold was tuned on? Beside the rules that others use, with intervals.

    python benchmarks/signals_study.py [--traces FOLDER] [--seed 770000]      # some 20 minutes of one core
    python benchmarks/signals_study.py --quick                                # four short runs: does it still work?

Trains 254 small networks (an MLP, a CNN, an autoencoder, a transformer, a regression, an imbalanced table; SGD with momentum and
Adam; five schedules; batches of 8 to 128) and folds their losses, gradient norms and rates exactly as ``automode signals`` does. With
``--traces`` the runs are kept in a folder and found there again, so that scoring can be repeated. The truth:

* plateau: 198 segments, cut where the schedule drops the rate. The loss on 512 fixed training samples is taken every 20 steps; what
  the next B = 800 steps really bring is known at every one of them, because each segment is trained on for 800 steps at its own
  rate from a snapshot. Above 2 % the run was improving, below 1 % it stood still. A false alarm is a first alarm while improving.
  Recall is over segments that stand still for B / 2 steps or more: over all of them, and over those that go on for 1.5 B or more from
  there, as `signals_traces.py` counts; the delay is over the latter. After a kick that multiplies the loss by 2.5 or more, a plateau
  called within 1200 steps, although the next B brought more than 2 %, is false as well.
* spikes: eight kinds of event; those that measurably disturbed the run count (`_study_scores.disturbed`). False alarms are
  those in the 110 plateau runs, in which nothing was injected; alarms less than 12 steps apart are one.
* slow divergence: the rate grows by .2 to .6 % a step, or a growing share of every batch is mislabelled, until the loss has
  doubled. A warning counts between the onset and the doubling.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _study_baselines import PLATEAU, SPIKE, above_best, kill_loss_spike, megatron
from _study_scores import GAIN, Divergence, Plateaus, Spikes, bootstrap, disturbed, false_after_kick, share
from _study_traces import BUDGET, Trace, jobs

from automode.cli.tables import table
from automode.engine.curve import read_curve, with_budget
from automode.planner.policy import Policy

SPIKE_STATES = {
    ("non_finite", "NON_FINITE"),
    ("loss_spike", "SPIKE"),
    ("grad_norm_spike", "SPIKE"),
    ("joint_spike", "SPIKE"),
    ("level_shift", "SHIFTED"),
}
OURS = "automode"
Told = dict[tuple[str, str], list[int]]


def traces(folder: Path, seed: int, *, quick: bool) -> Iterator[Trace]:
    """Train every run that the folder does not hold, and give all of them."""
    begin = time.monotonic()
    for name, make in jobs(seed, quick=quick):
        path = folder / f"{name}.npz"
        if not path.exists():
            make().save(path)
            print(f"\r{time.monotonic() - begin:5.0f} s  {name:<60}", end="", file=sys.stderr, flush=True)
        yield Trace.load(path)
    print(file=sys.stderr)


def fold(trace: Trace) -> Told:
    """What ``automode signals`` tells of a run: rows by name and value."""
    told: Told = defaultdict(list)
    policy = with_budget(Policy(), budget=BUDGET, gain=GAIN)
    for finding in read_curve(trace.loss, grad_norm=trace.gnorm, lr=trace.lr, policy=policy):
        told[finding.name, finding.value].append(finding.row)
    return told


def plateaus(runs: list[tuple[Trace, Told]]) -> None:
    scores: dict[str, Plateaus] = {}
    for trace, told in runs:
        for start, stop, probe in trace.segments:
            calls: dict[str, int | None] = {}
            for name, reading in ((f"{OURS}, trend", "trend"), (f"{OURS}, trend_firm", "trend_firm")):
                calls[name] = next((t for t in told[reading, "PLATEAU"] if start <= t < stop), None)
            for name, rule in PLATEAU.items():
                at = rule(trace.loss[start:stop], BUDGET, GAIN)
                calls[name] = None if at is None else start + at
            for name, alarm in calls.items():
                scores.setdefault(name, Plateaus()).add(trace.name, start, stop, probe, alarm)
    if not scores:
        return
    n = next(iter(scores.values()))
    print(
        f"\nPlateau: {n.segments} segments, {n.with_plateau} with a plateau, {n.with_room} of them 1.5 B or more before the end; B = {BUDGET} steps, gain {GAIN:.0%}\n"
    )
    print(
        table(
            (
                "rule",
                "false alarms",
                "precision",
                "recall, 1.5 B or more left",
                "recall, all",
                "median delay in B",
            ),
            [(name, *score.line()) for name, score in scores.items()],
        )
    )
    for name in (f"{OURS}, trend", f"{OURS}, trend_firm"):
        for wrong in scores[name].wrong:
            print(f"  false, {name.rpartition(' ')[2]}: {wrong}")


def kicks(runs: list[tuple[Trace, Told]]) -> None:
    counts: dict[str, list[bool]] = defaultdict(list)
    for trace, told in runs:
        start = trace.segments[0][0]
        calls = {f"{OURS}, {name}": told[name, "PLATEAU"] for name in ("trend", "trend_firm")}
        for name, rule in PLATEAU.items():
            at = rule(trace.loss, BUDGET, GAIN)
            calls[name] = [] if at is None or at < start else [at]
        for name, alarms in calls.items():
            false = false_after_kick(trace, alarms)
            if false is not None:
                counts[name].append(false)
    print("\nFalse plateau within 1200 steps of a kick\n")
    print(table(("rule", "false"), [(name, share(sum(v), len(v))) for name, v in counts.items()]))


def spikes(events: list[tuple[Trace, Told]], clean: list[tuple[Trace, Told]]) -> None:
    def ours(told: Told) -> list[int]:
        return [t for key in SPIKE_STATES for t in told[key]]

    scores = {name: Spikes() for name in (OURS, *SPIKE)}
    for trace, told in events:
        for name, score in scores.items():
            score.add_events(trace, ours(told) if name == OURS else SPIKE[name](trace.loss, trace.gnorm))
    for trace, told in clean:
        for name, score in scores.items():
            score.add_clean(trace, ours(told) if name == OURS else SPIKE[name](trace.loss, trace.gnorm))
    injected = [event for trace, _ in events for event in trace.events]
    count = sum(disturbed(trace, event) for trace, _ in events for event in trace.events)
    steps = sum(len(trace.loss) for trace, _ in clean)
    print(
        f"\nSpikes: {len(injected)} events, {count} disturbed their run; {steps} clean steps in {len(clean)} runs\n"
    )
    head = ("rule", "recall", "false alarms / 10k steps", "worst run / 10k", "runs without any", "delay")
    print(table(head, [(name, *score.line()) for name, score in scores.items()]))
    kinds = [(kind, share(sum(hits), len(hits))) for kind, hits in sorted(scores[OURS].found.items())]
    print("\n" + table((f"{OURS}, by kind", "recall"), kinds))
    at_once = [
        int(event["at"]) in told["non_finite", "NON_FINITE"]
        for trace, told in events
        for event in trace.events
        if event["kind"] in ("nan", "infinite")
    ]
    print(f"\nNaN and infinity told at their own step: {share(sum(at_once), len(at_once))}")


def divergence(runs: list[tuple[Trace, Told]], clean: list[tuple[Trace, Told]]) -> None:
    rules = {
        OURS: lambda trace, told: told["slow_divergence", "REGRESSING"],
        "mean above 1.5 times its best": lambda trace, _told: above_best(trace.loss),
        "Megatron, loss": lambda trace, _told: megatron(trace.loss),
        "KillLossSpike, loss": lambda trace, _told: kill_loss_spike(trace.loss),
    }
    scores = {name: Divergence() for name in rules}
    for name, rule in rules.items():
        for trace, told in runs:
            if trace.doubled is not None:
                scores[name].add(trace, rule(trace, told))
        for trace, told in clean:
            scores[name].add_clean(trace, rule(trace, told))
    rows = []
    for name, score in scores.items():
        low, high = bootstrap(score.leads, lambda x: float(np.median(x))) if score.leads else (0.0, 0.0)
        lead = f"{np.median(score.leads):.0f} [{low:.0f}, {high:.0f}]" if score.leads else "none"
        rose = sum(risen for _, risen in score.clean)
        rows.append(
            (name, share(score.warned, score.runs), lead, share(len(score.clean), len(clean)), str(rose))
        )
    print(f"\nSlow divergence: {scores[OURS].runs} of {len(runs)} runs doubled their loss\n")
    print(table(("rule", "warned in time", "median lead", "clean runs alarmed", "of these, did rise"), rows))
    for missed in scores[OURS].missed:
        print(f"  not warned of: {missed}")
    for alarmed, risen in scores[OURS].clean:
        print(f"  alarmed: {alarmed} ({'it did rise by a tenth' if risen else 'it did not rise by a tenth'})")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="four short runs")
    parser.add_argument("--traces", type=Path, default=None, help="folder in which the runs are kept")
    parser.add_argument("--seed", type=int, default=770_000, help="where the range of seeds begins")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.traces or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        by_kind: dict[str, list[tuple[Trace, Told]]] = defaultdict(list)
        for trace in traces(folder, options.seed, quick=options.quick):
            by_kind[trace.kind].append((trace, fold(trace)))
    plateaus(by_kind["plateau"])
    kicks(by_kind["kick"])
    spikes(by_kind["spike"], by_kind["plateau"])
    divergence(by_kind["diverging"], by_kind["plateau"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
