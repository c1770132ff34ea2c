"""The four kinds of run of the signals study, and the truth about each, from what training on really brings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _study_tasks import Task, tasks
from _study_training import PROBE_EVERY, Array, Curve, Fault, Training

BUDGET = 800
LENGTH = 4800
SCHEDULES = ("constant", "step", "halving", "cosine", "warm-up and cosine")
OPTIMIZERS = ("sgd", "adam")
BATCHES = (8, 16, 32, 64, 128)
EVENT_EVERY = 350
CREDIT = 12
AFTER = 1200
"""Steps after a kick within which a plateau is looked for."""


@dataclass
class Trace:
    """A recorded run. ``segments``: (start, stop, probes from start to BUDGET steps beyond stop)."""

    name: str
    kind: str
    loss: Array
    gnorm: Array
    lr: Array
    segments: list[tuple[int, int, list[float]]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    onset: int | None = None
    doubled: int | None = None

    def save(self, path: Path) -> None:
        """Write it as npz, through a file of another name, so that one that was cut short is not taken for whole."""
        meta = {k: v for k, v in asdict(self).items() if k not in ("loss", "gnorm", "lr")}
        part = path.with_name(f"part-{path.name}")
        np.savez_compressed(part, loss=self.loss, gnorm=self.gnorm, lr=self.lr, meta=json.dumps(meta))
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote."""
        with np.load(path) as data:
            return cls(loss=data["loss"], gnorm=data["gnorm"], lr=data["lr"], **json.loads(str(data["meta"])))


def rate_of(schedule: str, step: int) -> float:
    """The schedule's factor on the rate; beyond the run's end it stays where it was."""
    share = min(1.0, step / LENGTH)
    match schedule:
        case "constant":
            return 1.0
        case "step":
            return 1.0 if share < 0.5 else 0.2 if share < 0.75 else 0.04
        case "halving":
            return 1.0 if share < 1 / 3 else 0.5 if share < 2 / 3 else 0.25
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        case _:
            return min(1.0, (step + 1) / 200) * 0.5 * (1.0 + math.cos(math.pi * share))


def cuts_of(schedule: str) -> list[int]:
    """Steps at which the schedule drops the rate at once, and the run's ends."""
    inner = {"step": (LENGTH // 2, 3 * LENGTH // 4), "halving": (LENGTH // 3, 2 * LENGTH // 3)}
    return [0, *inner.get(schedule, ()), LENGTH]


def begin(
    name: str, kind: str, task: Task, optimizer: str, batch: int, seed: int
) -> tuple[Training, Trace, Curve]:
    """A fresh run and its empty log."""
    return Training(task, optimizer, batch, seed), Trace(name, kind, *(np.empty(0),) * 3), Curve()


def finish(trace: Trace, curve: Curve) -> Trace:
    """Move the log into the trace."""
    trace.loss, trace.gnorm, trace.lr = (np.array(x) for x in (curve.loss, curve.gnorm, curve.lr))
    return trace


def plateau_run(name: str, task: Task, optimizer: str, batch: int, schedule: str, seed: int) -> Trace:
    """Train under a schedule; wherever the rate is dropped, train on at the old rate from a snapshot first, for the truth."""
    run, trace, curve = begin(name, "plateau", task, optimizer, batch, seed)
    rate = task.rates[optimizer == "adam"] * 10 ** np.random.default_rng(seed).uniform(-1.0, 0.3)
    cuts = cuts_of(schedule)
    for start, stop in pairwise(cuts):
        first = len(curve.probe)
        for step in range(start, stop):
            run.advance(rate * rate_of(schedule, step), curve)
        saved, beyond = run.snapshot(), Curve()
        last = stop - 1 if stop < LENGTH else stop
        for step in range(stop, stop + BUDGET + PROBE_EVERY):
            run.advance(rate * rate_of(schedule, last if stop < LENGTH else step), beyond)
        run.restore(saved)
        trace.segments.append((start, stop, curve.probe[first:] + beyond.probe))
    return finish(trace, curve)


def faults(kind: str, length: int) -> list[Fault]:
    """What an event of a kind does to its steps."""

    def noise(
        x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not x.is_floating_point():
            return torch.from_numpy(rng.integers(0, 20, tuple(x.shape))), y
        return x + 5.0 * torch.from_numpy(rng.standard_normal(tuple(x.shape))).float(), y

    def half(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        bad, _ = noise(x, y, rng)
        mixed = x.clone()
        mixed[::2] = bad[::2]
        return mixed, y

    def labels(
        x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if y.is_floating_point():
            return x, -3.0 * y.roll(1, 0)
        top = int(y.max()) + 1
        return x, (y + torch.from_numpy(rng.integers(1, max(2, top), tuple(y.shape)))) % max(2, top)

    def broken(
        x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * math.nan, y) if x.is_floating_point() else (x, y)

    one = {
        "bad batch": Fault(batch=noise),
        "corrupted batch": Fault(batch=half),
        "wrong labels": Fault(batch=labels),
        "gradient x30": Fault(gradient=30.0),
        "gradient x1000": Fault(gradient=1000.0),
        "rate x20": Fault(rate=20.0),
        "nan": Fault(batch=broken, gradient=math.nan),
        "infinite": Fault(gradient=math.inf),
    }[kind]
    return [one] * length


KINDS = (
    ("bad batch", 1),
    ("corrupted batch", 1),
    ("wrong labels", 1),
    ("gradient x30", 1),
    ("gradient x1000", 1),
    ("rate x20", 6),
    ("nan", 1),
    ("infinite", 1),
)


def spike_run(name: str, task: Task, optimizer: str, batch: int, seed: int) -> Trace:
    """Inject every kind of event once, in random order; a run that an event has ruined is taken back after 60 steps."""
    run, trace, curve = begin(name, "spike", task, optimizer, batch, seed)
    rng = np.random.default_rng(seed)
    rate = task.rates[optimizer == "adam"] * 10 ** rng.uniform(-1.0, 0.0)
    for i in rng.permutation(len(KINDS)):
        kind, length = KINDS[i]
        for _ in range(EVENT_EVERY + int(rng.integers(0, 60))):
            run.advance(rate, curve)
        before, at = run.snapshot(), run.step
        for _ in range(length + 20):
            run.advance(rate)
        twin = [run.probe()]
        run.restore(before)
        for fault in faults(kind, length):
            run.advance(rate, curve, fault)
        for _ in range(20):
            run.advance(rate, curve)
        after = [run.probe()]
        trace.events.append({"at": at, "steps": length, "kind": kind, "twin": twin[0], "after": after[0]})
        for _ in range(40):
            run.advance(rate, curve)
        if not after[0] < 1.5 * twin[0]:
            step = run.step
            run.restore(before)
            run.step = step
    return finish(trace, curve)


def kick_run(name: str, task: Task, optimizer: str, batch: int, seed: int) -> Trace:
    """Push the weights off while the run is improving, so that the loss jumps to 2.5 times itself or more, and train on."""
    run, trace, curve = begin(name, "kick", task, optimizer, batch, seed)
    rng = np.random.default_rng(seed)
    rate = task.rates[optimizer == "adam"] * 10 ** rng.uniform(-1.0, -0.5)
    start = 600
    for _ in range(start):
        run.advance(rate, curve)
    level, clean = run.probe(), run.weights.clone()
    direction = torch.from_numpy(rng.standard_normal(len(clean))).float() * clean.std()
    size = 0.1
    while run.probe() < 2.5 * level and size < 1e3:
        size *= 1.25
        run.weights.copy_(clean + size * direction)
    first = len(curve.probe)
    for _ in range(AFTER):
        run.advance(rate, curve)
    beyond = Curve()
    for _ in range(BUDGET + PROBE_EVERY):
        run.advance(rate, beyond)
    trace.segments.append((start, start + AFTER, curve.probe[first:] + beyond.probe))
    return finish(trace, curve)


def diverging_run(name: str, task: Task, optimizer: str, batch: int, seed: int) -> Trace:
    """Raise the rate by a small factor a step, or mislabel a growing share of every batch, until the training loss has doubled.

    Doubled: the mean of the last 40 losses is at least twice the median of ten such means before the onset. The transformer's loss
    cannot double by wrong labels (a uniform guess comes to less), so there it is the rate alone.
    """
    run, trace, curve = begin(name, "diverging", task, optimizer, batch, seed)
    rng = np.random.default_rng(seed)
    rate = task.rates[optimizer == "adam"] * 10 ** rng.uniform(-0.5, 0.0)
    trace.onset = 1000 + int(rng.integers(0, 400))
    for _ in range(trace.onset):
        run.advance(rate, curve)
    level = float(np.median(np.reshape(curve.loss[-400:], (10, 40)).mean(axis=1)))
    by_rate = seed % 3 != 0 or name.startswith("divergence-transformer")
    factor = 1.0 + rng.uniform(0.002, 0.006)
    for i in range(2000):
        fault = None if by_rate else Fault(batch=_mislabelled(i / 1500))
        run.advance(rate * factor**i if by_rate else rate, curve, fault)
        if run.step % PROBE_EVERY == 0 and not np.mean(curve.loss[-40:]) < 2.0 * level:
            trace.doubled = run.step
            break
    return finish(trace, curve)


def _mislabelled(
    share: float,
) -> Callable[[torch.Tensor, torch.Tensor, np.random.Generator], tuple[torch.Tensor, torch.Tensor]]:
    def fault(
        x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wrong = torch.from_numpy(rng.random(len(y)) < share)
        mixed = y.clone()
        mixed[wrong] = y.roll(1, 0)[wrong]
        return x, mixed

    return fault


Job = tuple[str, Callable[[], Trace]]


def jobs(seed: int, *, quick: bool) -> Iterator[Job]:
    """Name every run of the study, and what makes it; `seed` starts a range of seeds that nothing else uses."""
    found = tasks()
    number = seed
    for name, task in found.items():
        for optimizer in OPTIMIZERS:
            for repeat in range(1 if name == "transformer" else 2):
                for i, schedule in enumerate(SCHEDULES):
                    number += 1
                    if quick and (name, optimizer, repeat, i) != ("regression", "sgd", 0, 1):
                        continue
                    batch = BATCHES[(number + i + repeat) % (3 if name == "transformer" else 5)]
                    title = f"plateau-{name}-b{batch}-{optimizer}-{schedule.split()[0]}-{number}"
                    yield title, _bound(plateau_run, title, task, optimizer, batch, schedule, number)
    for kind, make, repeats in (
        ("spike", spike_run, 2),
        ("kick", kick_run, 3),
        ("divergence", diverging_run, 7),
    ):
        for name, task in found.items():
            for optimizer in OPTIMIZERS:
                for i in range(repeats):
                    number += 1
                    if quick and (name, optimizer, i) != ("regression", "sgd", 0):
                        continue
                    batch = (8, 32, 16)[i % 3] if name == "transformer" else (8, 64, 16, 128, 32, 8, 16)[i]
                    title = f"{kind}-{name}-b{batch}-{optimizer}-{number}"
                    yield title, _bound(make, title, task, optimizer, batch, number)


def _bound(make: Callable[..., Trace], *arguments: Any) -> Callable[[], Trace]:
    return lambda: make(*arguments)
