"""Which metric should the end of a run be judged by, and is the best earlier state worth a place among the candidates?

    python benchmarks/finish_gain.py [--seeds 4] [--first-seed 5000] [--networks mlp cnn regression]

The scripts of ``rescue.py`` (sound, at a constant rate, with a rare class, overfitted), on clean labels and with a share of wrong ones in training and
validation alike. At each of 50 validations the raw weights and the three averages are scored, sample by sample, on validation and
test data. What is compared are rules: by which metric the best candidate is chosen on one half of the validation data and adopted at
z >= 1 on the other, and whether the best state so far (and its averages of then) is a candidate. Ten draws of the halves. Test labels are
always right.

``loss`` is the test loss of the last raw weights minus that of what the run ends with (cross-entropy, or squared error), ``points`` the
gain in accuracy, in points; each is followed by the share of runs that adopted something worse (accuracy: by more than half a
point). ``closed``: the share of the gap between the last raw weights and the raw weights of the best validation by test loss, which only an
oracle could pick. A metric named ``shown`` is the log score where the labels are shown to be clean, and the utility elsewhere.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from _rescue_scripts import Pair, Script, broken, loader_of, script
from torch import Tensor, nn

from automode.merges.trajectory import TrajectoryAverages
from automode.planner.acceptance import utility_classification
from automode.planner.metrics import GIVEN_UP, finishing_metric, noise_at_most, too_dear

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
RATES = {"mlp": (0.03, 0.01), "cnn": (0.03, 0.01), "regression": (0.1, 0.01)}
"""Rate and weight decay that ``rescue.py`` chooses."""

FAULTS = ("sound", "no schedule", "rare class", "overfitting")
NOISES = (0.0, 0.2, 0.4)
LOOKS, DRAWS = 50, 10
LEAST_Z, WORST_GUARD, WORSE_POINTS = 1.0, -1.64, 0.5


@dataclass(frozen=True)
class Scores:
    """One state on one set: loss, and for classes whether it is right, p(y) and the largest probability, each [n]."""

    loss: Floats
    right: Floats | None = None
    p: Floats | None = None
    top: Floats | None = None


@dataclass(frozen=True)
class Run:
    """One run: at each validation, scores by choice on validation and test data."""

    network: str
    fault: str
    noise: float
    seed: int
    val: list[dict[str, Scores]]
    test: list[dict[str, Scores]]


def noisy(given: Pair, share: float, seed: int) -> Pair:
    x, y = given
    if not share or y.is_floating_point():
        return given
    rng = np.random.default_rng([seed, 9, len(y)])
    wrong = torch.from_numpy(rng.random(len(y)) < share)
    other = (y + torch.from_numpy(rng.integers(1, 10, len(y)))) % 10
    return x, torch.where(wrong, other, y)


@torch.no_grad()
def scored(model: nn.Module, data: Pair) -> Scores:
    out, y = model(data[0]).double(), data[1]
    if y.is_floating_point():
        return Scores(((out - y.double()) ** 2).mean(dim=1).numpy())
    logs = torch.log_softmax(out, dim=1)
    mine = logs.gather(1, y[:, None])[:, 0]
    right = (logs.argmax(dim=1) == y).double()
    return Scores(-mine.numpy(), right.numpy(), mine.exp().numpy(), logs.max(dim=1).values.exp().numpy())


def run(network: str, fault: str, noise: float, seed: int) -> Run:
    rate, decay = RATES[network]
    sound = replace(script(network, seed), rate=rate, decay=decay)
    given: Script = sound if fault == "sound" else broken(fault, sound, seed)[0]
    given = replace(given, train=noisy(given.train, noise, seed), val=noisy(given.val, noise, seed))
    torch.manual_seed(seed)
    model, shell = given.network(), given.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, weight_decay=given.decay)
    loader = loader_of(given, seed)
    steps = given.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    averages = TrajectoryAverages(dict(model.named_parameters()), steps)
    parameters, step = dict(model.named_parameters()), 0
    found = Run(network, fault, noise, seed, [], [])
    every = max(1, given.epochs // LOOKS)
    for epoch in range(given.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            given.loss(model(x), y).backward()
            optimizer.step()
            if given.schedule == "cosine":
                schedule.step()
            step += 1
            averages.update(parameters, step)
        if (epoch + 1) % every == 0 or epoch + 1 == given.epochs:
            if epoch + 1 == given.epochs:
                averages.update(parameters, step, now=True)
            states: dict[str, dict[str, Tensor]] = {"raw": dict(model.state_dict())}
            states |= averages.candidates(model.state_dict())
            for kept, data in ((found.val, given.val), (found.test, given.test)):
                row = {}
                for name, state in states.items():
                    shell.load_state_dict(state)
                    row[name] = scored(shell, data)
                kept.append(row)
    return found


@dataclass(frozen=True)
class Rule:
    """How a run ends: by which metric, whether with its best state among the candidates, and chosen how.

    ``metric``: utility, log, or shown. ``best``: None, or how many validations are averaged. ``margin``: least z by which the best state must be
    ahead of the last averages on the first half. ``guard``: what must not be significantly worse where the log score decides.
    ``agree``: the metric that is not used must agree, over both halves. ``dear``: earlier states that are :func:`too_dear` are no candidates.
    """

    metric: str
    best: int | None = None
    floor: float = 1e-3
    margin: float = 0.0
    guard: str | None = "accuracy"
    clean_below: float = 0.15
    agree: bool = False
    dear: bool = False


RULES = {
    "utility, last states (was)": Rule("utility"),
    "log, last states": Rule("log"),
    "utility, best of 1": Rule("utility", 1),
    "utility, best of 3": Rule("utility", 3),
    "log, best of 1": Rule("log", 1),
    "log, best of 3": Rule("log", 3),
    "log, best of 5": Rule("log", 5),
    "log, best of 3, floor .01": Rule("log", 3, floor=1e-2),
    "log, best of 3, floor 1e-6": Rule("log", 3, floor=1e-6),
    "log, best of 3, margin 1": Rule("log", 3, margin=1.0),
    "log, best of 3, no guard": Rule("log", 3, guard=None),
    "log, best of 3, guard utility": Rule("log", 3, guard="utility"),
    "shown at .1, best of 3": Rule("shown", 3, clean_below=0.1),
    "shown, best of 3": Rule("shown", 3),
    "shown, both agree (was)": Rule("shown", 3, agree=True),
    "shown, agree, not too dear (is)": Rule("shown", 3, agree=True, dear=True),
}


def score(of: Scores, metric: str, floor: float) -> Floats:
    if of.p is None or of.right is None:
        error = np.sqrt(of.loss)
        return -np.where(error <= 1.0, 0.5 * error**2, error - 0.5)
    if metric == "utility":
        return utility_classification(of.right, np.clip(of.p, 0.0, 1.0))
    return np.asarray(1.0 - np.log(np.clip(of.p, floor, 1.0)) / np.log(floor))


def z_of(difference: Floats) -> float:
    error = difference.std(ddof=1) / np.sqrt(difference.size)
    return float(difference.mean() / error) if error > 0 else 0.0


def agreed(chosen: Scores, raw: Scores, metric: str, b: Ids) -> bool:
    """Whether the other metric allows it: accuracy where the log score decides, else the log score."""
    if chosen.right is None or raw.right is None:
        return True
    if metric == "log":
        held = chosen.right - raw.right
        return float(held.mean()) >= -GIVEN_UP - 1e-9 and z_of(held) >= WORST_GUARD
    return z_of(score(chosen, "log", 1e-3) - score(raw, "log", 1e-3)) >= LEAST_Z


def dear(of: Floats, state: Scores, last_of: Floats, last: Scores, a: Ids) -> bool:
    """Whether an earlier state buys too little of the log score with utility, on the first half."""
    return too_dear(
        log_score=float(of[a].mean()),
        utility=float(score(state, "utility", 1e-3)[a].mean()),
        last_log_score=float(last_of[a].mean()),
        last_utility=float(score(last, "utility", 1e-3)[a].mean()),
    )


def ends_with(run: Run, rule: Rule, a: Ids, b: Ids) -> tuple[int, str]:
    """Return the validation (-1: the end) and the choice whose weights the run ends with."""
    end, metric = run.val[-1], rule.metric
    raw = end["raw"]
    if metric == "shown":
        at_most = None if raw.right is None or raw.top is None else noise_at_most(raw.right[a], raw.top[a])
        metric = "log" if finishing_metric(at_most, rule.clean_below) == "log_score" else "utility"
    found = {(-1, name): score(of, metric, rule.floor) for name, of in end.items()}
    picked = max(found, key=lambda key: found[key][a].mean())
    if rule.best is not None:
        values = [score(row["raw"], "log", rule.floor)[a].mean() for row in run.val]
        means = [np.mean(values[max(0, i + 1 - rule.best) : i + 1]) for i in range(len(values))]
        at = int(np.argmax(means))
        if at < len(values) - 1:
            earlier = {(at, name): score(of, metric, rule.floor) for name, of in run.val[at].items()}
            if rule.dear and metric == "log":
                last = end[picked[1]]
                earlier = {
                    key: of
                    for key, of in earlier.items()
                    if not dear(of, run.val[at][key[1]], found[picked], last, a)
                }
            best = max(earlier, key=lambda key: earlier[key][a].mean(), default=picked)
            if best == picked:
                earlier = {best: found[picked]}
            ahead = (earlier[best] - found[picked])[a]
            if ahead.mean() > 0.0 and z_of(ahead) >= rule.margin:
                found, picked = found | earlier, best
    difference = found[picked] - found[-1, "raw"]
    if difference[a].mean() <= 0.0 or z_of(difference[b]) < LEAST_Z:
        return -1, "raw"
    chosen = run.val[picked[0]][picked[1]]
    if rule.agree and not agreed(chosen, raw, metric, b):
        return -1, "raw"
    if (
        rule.guard
        and not rule.agree
        and metric == "log"
        and raw.right is not None
        and chosen.right is not None
    ):
        held = chosen.right - raw.right
        if rule.guard == "utility":
            held = score(chosen, "utility", rule.floor) - score(raw, "utility", rule.floor)
        if z_of(held[b]) < WORST_GUARD:
            return -1, "raw"
    return picked


def report(name: str, runs: list[Run]) -> None:
    raws = [float(run.test[-1]["raw"].loss.mean()) for run in runs]
    oracle = [min(float(row["raw"].loss.mean()) for row in run.test) for run in runs]
    gap = float(np.mean(raws) - np.mean(oracle))
    print(
        f"\n{name}: {len(runs)} runs, test loss {np.mean(raws):.4f}, at the best validation {np.mean(oracle):.4f}"
    )
    print(f"  {'':28s} adopted  earlier     loss  worse  closed   points  worse")
    for title, rule in RULES.items():
        rows = []
        for run in runs:
            for draw in range(DRAWS):
                n = run.val[-1]["raw"].loss.size
                order = np.random.default_rng(draw).permutation(n)
                at, choice = ends_with(run, rule, order[: n // 2], order[n // 2 :])
                now, raw = run.test[at][choice], run.test[-1]["raw"]
                loss = float(raw.loss.mean() - now.loss.mean())
                points = 0.0
                if now.right is not None and raw.right is not None:
                    points = 100.0 * float(now.right.mean() - raw.right.mean())
                rows.append(((at, choice) != (-1, "raw"), at >= 0, loss, points))
        adopted, earlier, loss, points = np.array(rows, dtype=np.float64).T
        closed = f"{loss.mean() / gap:7.2f}" if gap > 1e-3 else "      -"
        print(
            f"  {title:28s} {adopted.mean():7.2f} {earlier.mean():8.2f} {loss.mean():8.4f} {(loss < 0).mean():6.2f} {closed} "
            f"{points.mean():8.2f} {(points < -WORSE_POINTS).mean():6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=5000)
    parser.add_argument("--networks", nargs="+", choices=list(RATES), default=list(RATES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [
        run(network, fault, noise, arguments.first_seed + i)
        for network in arguments.networks
        for fault in FAULTS
        for noise in (NOISES if network != "regression" else NOISES[:1])
        for i in range(arguments.seeds)
    ]
    for network in arguments.networks:
        for fault in FAULTS:
            for noise in NOISES:
                mine = [r for r in runs if (r.network, r.fault, r.noise) == (network, fault, noise)]
                if mine:
                    report(f"{network}, {fault}, {noise:.0%} wrong labels", mine)
    noisy_or_not = [r for r in runs if r.network != "regression"]
    for noise in NOISES:
        report(f"all classifiers, {noise:.0%} wrong labels", [r for r in noisy_or_not if r.noise == noise])


if __name__ == "__main__":
    main()
