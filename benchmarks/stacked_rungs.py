"""A rung of K variants trained together (the stacked backend) and one after another (inline), all set-up charged.

    python benchmarks/stacked_rungs.py [--quick] [--steps 1000] [--repeats 3] [--networks smallest small ...] [--members 4 8 16]

One CPU thread, process CPU time. Both backends run the same specialists through the same runner: opening them from the trunk's
checkpoint, training in slices of one trunk step, evaluation on held-out data and durable checkpoints are in both times, and so
are the stacked backend's warm-up, its recording of a graph and its checks. Runs are interleaved; `cold` is the median of the
ratio inside each repeat with a fresh backend, `warm` the same for a second rung on the graph of the first. `step` compares
one step of all members, without set-up and evaluation: what long rungs come to.

Agreement: the largest difference of held-out utility between a variant trained together and alone, and the rank correlation
(Spearman) of the utilities. Training amplifies rounding, so that each stands beside its yardstick: the same for two runs alone,
one of which starts from weights changed by a part in 10^7, which is what single precision rounds to.

The variants differ in learning rate, weight decay and clipping; with --weighted, one in eight also weighs the selected samples,
for which a second loss is computed for all members.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentJob
from automode.backends.inline import InlineBackend
from automode.backends.stacked import StackedBackend
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.recipes import TrainingRecipe, Variant
from automode.session.checkpoints import CheckpointStore
from automode.session.rng_state import pack_rng
from automode.trainer.evaluation import Evaluator
from automode.trainer.evidence import Evidence
from automode.trainer.heldout import HeldOut
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.sample_source import SampleSource
from automode.trainer.specialists import CardData, SpecialistRunner
from automode.trainer.stackable import StackableSpecialists
from automode.trainer.states import States
from automode.trainer.steps import pair_step
from automode.trainer.trunk import Trunk, trainable

CARD = "c0ffee00"
CLASSES = 10
TRUNK_STEPS = 50


class SmallTransformer(nn.Module):
    """Two layers of width 32 over 16 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.position = nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [n, 16] to logits [n, classes]."""
        hidden = self.blocks(self.embedding(tokens) + self.position)
        logits: Tensor = self.head(hidden.mean(dim=1))
        return logits


def mlp(*widths: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 4 * 4, CLASSES)),
    )


def vectors(width: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.randn(n, width, generator=g)


@dataclass(frozen=True)
class Network:
    """A network and what it is trained on."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Tensor]
    batch: int


NETWORKS = {
    "smallest": Network(mlp(10, 32, CLASSES), vectors(10), 32),
    "small": Network(mlp(20, 64, 64, CLASSES), vectors(20), 256),
    "wider": Network(mlp(64, 256, 256, CLASSES), vectors(64), 128),
    "cnn": Network(small_cnn, lambda n, g: torch.randn(n, 1, 16, 16, generator=g), 32),
    "transformer": Network(SmallTransformer, lambda n, g: torch.randint(0, 32, (n, 16), generator=g), 16),
}


def variants(members: int, weighted: bool) -> tuple[Variant, ...]:
    rates = np.geomspace(0.25, 4.0, members)
    return tuple(
        Variant(
            name=f"v{i}",
            lr_mul=float(rate),
            weight_decay=0.05 if i % 3 == 1 else None,
            clip_norm=0.5 if i % 4 == 2 else None,
            loss_weight=2.0 if weighted and i % 8 == 5 else 1.0,
        )
        for i, rate in enumerate(rates)
    )


@dataclass
class Run:
    """A trunk after a few steps, and a runner that forks from it."""

    runner: SpecialistRunner
    checkpoints: CheckpointStore
    base: str

    def jobs(self, recipe: TrainingRecipe, steps: int, first: int) -> list[SegmentJob]:
        """A job for each variant, of so many steps, in slices of one step of each."""
        return [
            SegmentJob(
                card=CARD,
                trial=first + i,
                attempt=1,
                variant=variant,
                base=self.base,
                checkpoint=self.base,
                from_resource=0,
                to_resource=steps,
                top_resource=9 * steps,
                per_trunk_step=float(len(recipe.variants)),
            )
            for i, variant in enumerate(recipe.variants)
        ]

    def jittered(self, recipe: TrainingRecipe, steps: int) -> list[SegmentJob]:
        """The same jobs from weights changed by a part in 10^7."""
        weights, rest, _ = self.checkpoints.load(self.base)
        generator = torch.Generator().manual_seed(5)
        moved = {
            name: tensor * (1.0 + 1e-7 * torch.randn(tensor.shape, generator=generator))
            for name, tensor in weights.items()
        }
        base = self.checkpoints.save(moved, rest, {"kind": "jittered"})
        return [replace(job, checkpoint=base) for job in self.jobs(recipe, steps, 0)]


def labelled(network: Network, teacher: nn.Module, n: int, generator: torch.Generator) -> TensorDataset:
    """Inputs with the classes that a teacher of the same architecture gives them, a tenth of them wrong."""
    inputs = network.inputs(n, generator)
    with torch.no_grad():
        classes = teacher(inputs)
        classes = (classes / classes.std(dim=0)).argmax(dim=1)
    wrong = torch.rand(n, generator=generator) < 0.1
    classes[wrong] = torch.randint(0, CLASSES, (int(wrong.sum()),), generator=generator)
    return TensorDataset(inputs, classes)


def make_run(
    network: Network, members: int, folder: Path, *, weighted: bool = False
) -> tuple[Run, TrainingRecipe]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    teacher = network.make().eval()
    training = labelled(network, teacher, max(2048, 8 * network.batch), generator)
    held_out = HeldOut(
        DataLoader(labelled(network, teacher, 512, generator), batch_size=256), torch.device("cpu"), 3
    )
    model = network.make()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss_fn = nn.CrossEntropyLoss()
    trunk = Trunk(
        model=model,
        optimizer=optimizer,
        scheduler=None,
        step_fn=pair_step(loss_fn, torch.device("cpu")),
        loss_fn=loss_fn,
        device=torch.device("cpu"),
    )
    trunk.averages = TrajectoryAverages(trainable(model), 10_000)
    source = SampleSource(training, default_collate, trunk.device)
    for k in range(TRUNK_STEPS):
        ids = np.arange(network.batch, dtype=np.int64) + (k * network.batch) % (len(training) - network.batch)
        optimizer.zero_grad()
        trunk.step_fn(model, source.batch(ids))[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trunk.step += 1
    checkpoints = CheckpointStore(folder)
    exact, judged = per_sample_twin(loss_fn), per_sample_twin(loss_fn)
    loss, outputs, targets = trunk.step_fn(model, source.batch(np.arange(network.batch, dtype=np.int64)))
    exact.check(outputs.detach(), targets, loss.detach())
    states = States(trunk, checkpoints, lambda: iter(()))
    evaluator = Evaluator(
        step_fn=trunk.step_fn, batches=held_out.batches, per_sample=judged, autocast=trunk.autocast
    )
    recipe = TrainingRecipe(variants=variants(members, weighted), replay=0.1)
    half = np.arange(len(training) // 2, dtype=np.int64)
    runner = SpecialistRunner(
        trunk=trunk,
        source=source,
        judge=Evidence(evaluator, states, {}),
        checkpoints=checkpoints,
        batch_size=network.batch,
        steps_per_epoch=None,
        per_sample=exact,
        cards={
            CARD: CardData(
                recipe=recipe, selected=half, others=half + half.size, entropy=(7,), step=TRUNK_STEPS
            )
        },
    )
    weights, rest = trunk.state()
    rest["rng"] = pack_rng()
    return Run(runner, checkpoints, checkpoints.save(weights, rest, {"kind": "base"})), recipe


def rung(backend: Backend, jobs: list[SegmentJob]) -> tuple[dict[int, SegmentDone], float]:
    """Run jobs to their end; returns the results in the order of the variants, and the CPU seconds."""
    started = time.process_time()
    for job in jobs:
        backend.submit(job)
    results: dict[int, SegmentDone] = {}
    while backend.busy:
        for result in backend.pump(1):
            if isinstance(result, SegmentFailed):
                raise RuntimeError(result.error)  # noqa: TRY004
            results[result.job.trial - jobs[0].trial] = result
    return results, time.process_time() - started


def measure(name: str, members: int, steps: int, repeats: int, *, weighted: bool) -> dict[str, Any]:
    network = NETWORKS[name]
    cold, warm, marginal, inline_s, stacked_s = [], [], [], [], []
    notes: list[str] = []
    agreement: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        run, recipe = make_run(network, members, Path(folder), weighted=weighted)
        runner = StackableSpecialists(run.runner)
        for repeat in range(repeats):
            backend = StackedBackend(runner)
            alone, first = rung(InlineBackend(runner), run.jobs(recipe, steps, 0))
            together, second = rung(backend, run.jobs(recipe, steps, 0))
            _, third = rung(backend, run.jobs(recipe, steps, 100))
            _, short = rung(InlineBackend(runner), run.jobs(recipe, steps // 4, 0))
            _, shorter = rung(backend, run.jobs(recipe, steps // 4, 200))
            notes = sorted({note.text for note in backend.notes()})
            cold.append(first / second)
            warm.append(first / third)
            marginal.append((first - short) / max(third - shorter, 1e-9))
            inline_s.append(first)
            stacked_s.append(second)
            if repeat == 0:
                jittered, _ = rung(InlineBackend(runner), run.jittered(recipe, steps))
                yardstick = compared(alone, jittered)
                agreement = compared(alone, together) | {
                    f"jitter_{key}": value for key, value in yardstick.items()
                }
    return {
        "network": name,
        "members": members,
        "steps": steps,
        "cold": statistics.median(cold),
        "warm": statistics.median(warm),
        "step": statistics.median(marginal),
        "inline_s": statistics.median(inline_s),
        "stacked_s": statistics.median(stacked_s),
        **agreement,
        "notes": notes,
    }


def compared(first: dict[int, SegmentDone], second: dict[int, SegmentDone]) -> dict[str, float]:
    a, b = (np.array([found[i].value for i in sorted(found)]) for found in (first, second))
    return {"difference": float(np.abs(a - b).max()), "rank": float(spearmanr(a, b).statistic)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="200 steps, one repeat, 4 and 16 members")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--members", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument(
        "--weighted", action="store_true", help="one variant in eight weighs the selected samples"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line a measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, repeats, sizes = arguments.steps, arguments.repeats, arguments.members
    if arguments.quick:
        steps, repeats, sizes = 200, 1, [4, 16]
    if not arguments.json:
        print(f"rung of {steps} steps, {repeats} repeats, torch {torch.__version__}, one CPU thread")
        print(" " * 58 + "value difference    rank correlation")
        print(
            "network        K   inline s  stacked s   cold   warm   step  stacked   jitter   stacked   jitter"
        )
    for name in arguments.networks:
        for members in sizes:
            row = measure(name, members, steps, repeats, weighted=arguments.weighted)
            if arguments.json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"{name:12s} {members:3d} {row['inline_s']:10.2f} {row['stacked_s']:10.2f} {row['cold']:6.2f} {row['warm']:6.2f} "
                f"{row['step']:6.2f} {row['difference']:8.1e} {row['jitter_difference']:8.1e} {row['rank']:10.3f} "
                f"{row['jitter_rank']:8.3f}",
                flush=True,
            )
            for note in row["notes"]:
                print(f"    {note}", flush=True)


if __name__ == "__main__":
    main()
