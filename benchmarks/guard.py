"""How often does a session accept what is worse than its control?

    python benchmarks/guard.py [--tasks digits digits4 blobs moons friedman] [--seeds 32] [--first-seed 0] [--workers 1]
                               [--minutes 25] [--quick] [--json FILE]

Short runs on clean tasks (scikit-learn's digits moved a little, the same in four views, Gaussian blobs, two moons, Friedman's
regression; one hidden layer, Adam or SGD, constant rate or cosine, by the seed) in act mode with the session's real machinery. For every task and
seed there is a session that is handed eight cards (four forks of fourteen kinds, four merges of the run's averages) and makes the
finishing merge; for every fourth seed another one under the default policy alone. A decision is one look of a card at val-B (400 samples). The
candidate and the control that it compared are read from the session's checkpoints afterwards, and scored on 60,000 test samples
that no session saw.

``worse`` counts accepted candidates whose test mean is below the control's, test noise included: of the metric that
acceptance compared (utility, or a log score where labels are shown to be clean), of the error (share of wrong answers; mean square of a regression), and of the loss; ``surely`` those whose metric is
below it by 1.64 standard errors of the test set. ``by 1 %`` and ``.2`` are relative error and points of accuracy; ``worst`` is the
largest relative rise of the error, ``gain`` the mean relative fall of the error of what was accepted. Shares have exact 95 % intervals
(Clopper and Pearson 1934) as if decisions were independent; those of one session are not quite.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _guard_sessions import Decision, Outcome, as_plain, decided
from _guard_tasks import TASKS
from scipy.stats import beta

POINTS, RELATIVE, SURE = 0.2, 0.01, 1.64
WORSE_GOAL, WORST_GOAL, LEAST_DECISIONS = 0.05, 0.02, 500
QUICK_SEEDS = 1

Job = tuple[str, int, bool]
Test = Callable[[Decision], bool]

WORSE: dict[str, Test] = {
    "metric": lambda d: d.gain < 0.0,
    "error": lambda d: d.error > 0.0,
    "loss": lambda d: d.loss > 0.0,
    "surely": lambda d: d.gain < -SURE * d.gain_se,
    "by 1 %": lambda d: d.error > RELATIVE,
    "by .2": lambda d: d.points < -POINTS,
}


def interval(hits: int, n: int) -> tuple[float, float]:
    """Exact 95 % interval of a share (Clopper and Pearson 1934, Biometrika 26)."""
    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
    return low, high


def share(hits: int, n: int) -> str:
    """A share of decisions, with its interval."""
    if not n:
        return "none"
    low, high = interval(hits, n)
    return f"{hits}/{n} = {hits / n:.3f} [{low:.3f}, {high:.3f}]"


def accepted(decisions: Sequence[Decision]) -> list[Decision]:
    return [d for d in decisions if d.verdict == "accepted"]


def worst(decisions: Sequence[Decision]) -> float:
    """The largest relative rise of the error among the accepted, in percent; 0 where none rose."""
    return 100.0 * max([0.0, *(d.error for d in accepted(decisions))])


def row(name: str, decisions: Sequence[Decision]) -> str:
    taken = accepted(decisions)
    counts = "".join(f"{sum(test(d) for d in taken):8d}" for test in WORSE.values())
    gain = -100.0 * sum(d.error for d in taken) / len(taken) if taken else math.nan
    return f"  {name:24s} {len(decisions):9d} {len(taken):9d} {counts} {worst(decisions):8.2f} {gain:8.2f}"


def table(title: str, groups: dict[str, list[Decision]]) -> None:
    print(f"\n{title:26s} decisions  accepted of them worse" + " " * 34 + "worst %   gain %")
    print(" " * 46 + "".join(f"{name:>8s}" for name in WORSE))
    for name, decisions in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        print(row(name, decisions))


def grouped(decisions: Sequence[Decision], key: Callable[[Decision], str]) -> dict[str, list[Decision]]:
    groups: dict[str, list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(key(decision), []).append(decision)
    return groups


def report(outcomes: Sequence[Outcome]) -> bool:
    """Print the tables and the goals; whether all of these are met."""
    decisions = [d for outcome in outcomes for d in outcome.decisions]
    forks = [d for d in decisions if not d.kind.startswith("averages")]
    averages = [d for d in decisions if d.kind.startswith("averages")]
    table("kind of candidate", grouped(decisions, lambda d: d.kind))
    table("task", grouped(decisions, lambda d: d.task))
    table(
        "all",
        {
            "forks": forks,
            "averages": averages,
            "default policy alone": [d for d in decisions if not d.own_cards],
            "all": decisions,
        },
    )
    cards = [card for outcome in outcomes for card in outcome.cards]
    refused = sum(len(outcome.refused) for outcome in outcomes)
    print(
        f"\n{len(outcomes)} sessions, {len(cards)} cards, {len(decisions)} looks at val-B, {refused} cards refused"
    )
    taken = accepted(decisions)
    for name, test in WORSE.items():
        hits = sum(test(d) for d in taken)
        print(
            f"accepted and worse ({name}): {share(hits, len(decisions))} of decisions, {share(hits, len(taken))} of the accepted"
        )
    missed = sum(
        d.verdict != "accepted" and d.gain > SURE * d.gain_se and d.error < -RELATIVE for d in decisions
    )
    print(
        f"kept the control although the candidate was surely better, by over 1 %: {share(missed, len(decisions))}"
    )
    harm = max(sum(WORSE[name](d) for d in taken) for name in ("metric", "error")) / max(1, len(decisions))
    goals = {
        f"decisions >= {LEAST_DECISIONS}": (len(decisions) >= LEAST_DECISIONS, f"{len(decisions)}"),
        f"accepted and worse (metric or error) <= {WORSE_GOAL:.0%}": (harm <= WORSE_GOAL, f"{harm:.1%}"),
        f"worst <= {WORST_GOAL:.0%} relative error": (
            worst(decisions) <= 100 * WORST_GOAL,
            f"{worst(decisions):.2f} %",
        ),
    }
    print()
    for name, (met, seen) in goals.items():
        print(f"  {'met   ' if met else 'MISSED'} {name}: {seen}")
    return all(met for met, _ in goals.values())


def outcome_of(job: Job) -> Outcome:
    torch.set_num_threads(1)
    task, seed, own_cards = job
    return decided(task, seed, own_cards=own_cards)


def run(jobs: Sequence[Job], workers: int, minutes: float | None) -> list[Outcome]:
    """Run the sessions in the order of the jobs, whoever runs them; none is begun when the minutes are over."""
    began, outcomes = time.perf_counter(), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = iter(jobs)
        line = deque(pool.submit(outcome_of, job) for job in islice(waiting, 2 * workers))
        while line:
            outcomes.append(line.popleft().result())
            if len(outcomes) % 50 == 0:
                print(f"{len(outcomes)} of {len(jobs)} sessions", file=sys.stderr)
            if minutes is None or time.perf_counter() - began < 60.0 * minutes:
                line.extend(pool.submit(outcome_of, job) for job in islice(waiting, 1))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--first-seed", type=int, default=0, help="0 to 999 are development seeds")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="begin no further session after so long, seed by seed")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SEEDS} seed a task, and no goals")
    parser.add_argument("--json", type=Path, help="every decision, one JSON line each")
    arguments = parser.parse_args()
    count = QUICK_SEEDS if arguments.quick else arguments.seeds
    jobs = [
        (task, arguments.first_seed + i, own)
        for i in range(count)
        for task in arguments.tasks
        for own in (True, False)
        if own or i % 4 == 0
    ]
    began = time.perf_counter()
    outcomes = run(jobs, arguments.workers, arguments.minutes)
    if arguments.json is not None:
        decisions = [as_plain(d) for outcome in outcomes for d in outcome.decisions]
        arguments.json.write_text("".join(json.dumps(d) + "\n" for d in decisions), encoding="utf-8")
    met = report(outcomes)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())
