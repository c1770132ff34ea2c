"""What automode does for a script that is broken, and for one that is sound.

    python benchmarks/rescue.py [--networks mlp cnn] [--faults "rate x10" nan] [--seeds 10] [--first-seed 7000] [--policy default]
                                [--workers 2] [--json FILE]

A sound script (AdamW, cosine, rate and weight decay chosen on validation data with seeds of their own) is broken in one way at a
time. Each cell, a network and a fault, compares three runs with the same data, first weights and order of the data: the script as it
is, the same script with ``automode=True`` at the same number of sample passes, and the script as somebody would write it who
knows the fault (no more passes either). What counts is the held-out loss on test data at the end, cut at the loss of the best
constant answer, so that a run that ended in NaN counts as one that learnt nothing.

The share closed is (as is - automode) / (as is - cured), of mean losses; a cell where the cure does not lower the loss, by a paired
t-test at 5 %, has no gap to close and only counts for harm. Harm is a loss that is higher with automode by more than 1 %, tested one-sided,
paired by seed, and corrected over all cells (Holm).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch
from _rescue_scripts import FAULTS, NETWORKS, Script, broken, loader_of, script
from scipy.stats import t as student
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from automode import Trainer

RATES, DECAYS, CHOOSING = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.01, 0.3), (500, 501)
HARM = 0.01
Floats = npt.NDArray[np.float64]


def train(given: Script, seed: int, mode: Any, policy: str) -> tuple[nn.Module, dict[str, Any]]:
    """Run a script, with automode in this mode; returns the model and what automode did."""
    torch.manual_seed(seed)
    model = given.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, weight_decay=given.decay)
    loader = loader_of(given, seed)
    steps = given.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = _Best(given, model)
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(
            project="rescue",
            max_epochs=given.epochs,
            automode=mode,
            policy=policy,
            session_dir=folder,
            val_every_n_epochs=max(1, given.epochs // 50),
            scheduler_interval="step",
            seed=seed,
            progress=False,
            console=False,
            checkpoint_every=None,
        ).fit(
            model=model,
            optimizer=optimizer,
            loss_fn=given.loss,
            train_loader=best.watching(loader) if given.best_epoch else loader,
            val_loader=DataLoader(TensorDataset(*given.val), batch_size=512),
            scheduler=schedule if given.schedule == "cosine" else None,
        )
        with result.session as session:
            made = {r.body["card"]["id"]: r.body["card"] for r in session.events(kind="card_proposed")}
            cards = [
                f"{made[card.card_id]['reason']}@{made[card.card_id]['step']} {card.state}"
                for card in session.cards()
            ]
            verdicts = [
                f"{r.body['candidate']}: {r.body['verdict']} ({r.body['mean']:+.4f}, z {r.body['z']:.2f})"
                for r in session.events(kind="verdict_given")
            ]
            safeguards = [r.body["what"] for r in session.events(kind="safeguarded")]
    best.finish()
    return model, {
        "cards": cards,
        "verdicts": verdicts,
        "safeguards": len(safeguards),
        "compute": dict(result.compute),
    }


class _Best:
    """Early stopping: the weights of the epoch whose validation loss was lowest."""

    def __init__(self, given: Script, model: nn.Module) -> None:
        self.given, self.model = given, model
        self.lowest = math.inf
        self.weights: dict[str, torch.Tensor] = {}

    def watching(self, loader: Any) -> Any:
        return _Epochs(loader, self.look)

    def look(self) -> None:
        found = held_out(self.given, self.model, self.given.val)
        if found < self.lowest:
            self.lowest = found
            self.weights = {k: v.clone() for k, v in self.model.state_dict().items()}

    def finish(self) -> None:
        if self.given.best_epoch:
            self.look()
            self.model.load_state_dict(self.weights)


class _Epochs:
    """A loader that calls before every epoch."""

    def __init__(self, loader: Any, before: Any) -> None:
        self.loader, self.before = loader, before

    def __iter__(self) -> Any:
        self.before()
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def held_out(given: Script, model: nn.Module, data: Any) -> float:
    with torch.no_grad():
        loss = float(given.judge(model(data[0]), data[1]))
    return loss if math.isfinite(loss) else math.inf


def ignorant(given: Script) -> float:
    """Loss of the best constant answer on the test data."""
    y = given.test[1]
    if y.is_floating_point():
        return float(y.var(correction=0))
    shares = torch.bincount(y).double() / len(y)
    return float(-(shares * shares.clamp_min(1e-12).log()).sum())


def chosen(network: str) -> tuple[float, float]:
    """Rate and weight decay of the sound script: the lowest validation loss over a grid."""

    def loss(rate: float, decay: float) -> float:
        total = 0.0
        for seed in CHOOSING:
            given = replace(script(network, seed), rate=rate, decay=decay)
            total += held_out(given, train(given, seed, False, "default")[0], given.val)
        return total

    return min(((r, d) for r in RATES for d in DECAYS), key=lambda pair: loss(*pair))


def one(job: tuple[str, str, int, float, float, str]) -> dict[str, Any]:
    """All three runs of a cell for one seed."""
    network, fault, seed, rate, decay, policy = job
    torch.set_num_threads(1)
    sound = replace(script(network, seed), rate=rate, decay=decay)
    as_is, cured = broken(fault, sound, seed) if fault != "sound" else (sound, sound)
    most = ignorant(sound)
    found: dict[str, Any] = {"network": network, "fault": fault, "seed": seed, "policy": policy}
    began = time.process_time()
    for name, given, mode in (("as is", as_is, False), ("automode", as_is, True), ("cured", cured, False)):
        if name == "cured" and fault == "sound":
            found[name] = found["as is"]
            continue
        model, about = train(given, seed, mode, policy)
        found[name] = min(most, held_out(given, model, given.test))
        if mode:
            found |= about
    return found | {"cpu_s": time.process_time() - began}


def p_greater(differences: Floats, than: Floats | float = 0.0) -> float:
    """One-sided p of a paired t-test that the mean exceeds a value; 1 for a single pair, which cannot tell."""
    d = differences - than
    if d.size < 2:
        return 1.0
    if not d.std():
        return 0.0 if d.mean() > 0 else 1.0
    return float(student.sf(d.mean() / (d.std(ddof=1) / math.sqrt(d.size)), d.size - 1))


def holm(ps: dict[Any, float]) -> dict[Any, float]:
    """Adjusted p values."""
    worst, found = 0.0, {}
    for rank, (key, p) in enumerate(sorted(ps.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, p * (len(ps) - rank)))
        found[key] = worst
    return found


def report(rows: list[dict[str, Any]]) -> None:
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["network"], row["fault"]), []).append(row)
    losses = {
        cell: {name: np.array([r[name] for r in found]) for name in ("as is", "automode", "cured")}
        for cell, found in cells.items()
    }
    harm = holm(
        {
            cell: p_greater(loss["automode"] - loss["as is"], HARM * loss["as is"])
            for cell, loss in losses.items()
        }
    )
    print(
        f"{'network':12s} {'fault':14s} {'as is':>8s} {'automode':>9s} {'cured':>8s} {'closed':>8s} {'better':>7s} {'harm p':>7s}  cards adopted"
    )
    shares = []
    for (network, fault), loss in losses.items():
        gap = p_greater(loss["as is"] - loss["cured"]) < 0.05
        share = (
            (loss["as is"] - loss["automode"]).mean() / (loss["as is"] - loss["cured"]).mean()
            if gap
            else math.nan
        )
        if gap:
            shares.append(share)
        found = cells[network, fault]
        adopted = [card.split("@")[0] for r in found for card in r["cards"] if card.endswith("adopted")]
        told = ", ".join(f"{name} {adopted.count(name)}" for name in dict.fromkeys(adopted))
        ahead = int((loss["automode"] < loss["as is"]).sum())
        print(
            f"{network:12s} {fault:14s} {loss['as is'].mean():8.4f} {loss['automode'].mean():9.4f} {loss['cured'].mean():8.4f} "
            f"{'no gap' if not gap else f'{share:.0%}':>8s} {f'{ahead}/{len(found)}':>7s} {harm[network, fault]:7.3f}  {told}"
        )
    worse = [cell for cell, p in harm.items() if p < 0.05]
    if shares:
        print(f"\nshare of the gap closed, median of {len(shares)} cells with a gap: {median(shares):.0%}")
    print(f"cells significantly worse by more than {HARM:.0%}: {worse or 'none'} of {len(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--faults", nargs="+", choices=(*FAULTS, "sound"), default=[*FAULTS, "sound"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=7000)
    parser.add_argument("--policy", default="default", help="name of a preset, or a YAML file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--json",
        type=Path,
        help="every run, one JSON line each, and the rates chosen; what stands there is not run again",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, sound = _ran(arguments.json, arguments.policy)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        unknown = [network for network in arguments.networks if network not in sound]
        for network, (rate, decay) in zip(unknown, pool.map(chosen, unknown), strict=True):
            sound[network] = rate, decay
            _keep(arguments.json, {"chosen": network, "rate": rate, "decay": decay})
        for network in arguments.networks:
            rate, decay = sound[network]
            print(f"{network}: rate {rate:g}, weight decay {decay:g}", flush=True)
        # Seed by seed: a run that is cut short has judged all its cells, on fewer seeds.
        wanted = [
            (network, fault, arguments.first_seed + i)
            for i in range(arguments.seeds)
            for network in arguments.networks
            for fault in arguments.faults
        ]
        jobs = [(*cell, *sound[cell[0]], arguments.policy) for cell in wanted if cell not in rows]
        try:
            for row in pool.map(one, jobs):
                rows[row["network"], row["fault"], row["seed"]] = row
                sys.stderr.write(".")
                sys.stderr.flush()
                _keep(arguments.json, row)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            print(f"\ncut short: {sum(cell in rows for cell in wanted)} of {len(wanted)} runs")
    sys.stderr.write("\n")
    report([rows[cell] for cell in wanted if cell in rows])


def _keep(file: Path | None, row: dict[str, Any]) -> None:
    if file is not None:
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


def _ran(
    file: Path | None, policy: str
) -> tuple[dict[tuple[str, str, int], dict[str, Any]], dict[str, tuple[float, float]]]:
    """Runs of before, by network, fault and seed; and rate and weight decay of the networks for which they are chosen."""
    if file is None or not file.exists():
        return {}, {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ran = {(r["network"], r["fault"], r["seed"]): r for r in rows if r.get("policy") == policy}
    return ran, {r["chosen"]: (r["rate"], r["decay"]) for r in rows if "chosen" in r}


if __name__ == "__main__":
    main()
