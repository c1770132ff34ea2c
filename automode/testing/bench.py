"""A small run to fork specialists from: a network, its optimizer, some data, and everything that a runner needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from automode.backends.base import SegmentDone, SegmentJob
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.policy import SafeguardPolicy
from automode.planner.recipes import TrainingRecipe, Variant
from automode.session.checkpoints import CheckpointStore
from automode.session.rng_state import pack_rng
from automode.trainer.card_data import CardData
from automode.trainer.evaluation import Evaluator
from automode.trainer.evidence import Evidence
from automode.trainer.heldout import HeldOut
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.random_state import RandomState, forked_rng
from automode.trainer.sample_source import FixedPass, SampleSource
from automode.trainer.specialists import SpecialistRunner
from automode.trainer.states import States
from automode.trainer.steps import pair_step
from automode.trainer.trunk import Precision, Trunk, trainable
from automode.trainer.worker_runner import SpecialistFactory, specialist_factory

CARD = "c0ffee00"
FEATURES, CLASSES, BATCH = 6, 3, 16
CPU = torch.device("cpu")


def small_network(*, norm: bool = False, dropout: float = 0.0) -> nn.Module:
    """Make a network of two layers, with what makes copying hard where asked for."""
    middle: list[nn.Module] = [nn.Linear(FEATURES, 12)]
    if norm:
        middle.append(nn.BatchNorm1d(12))
    middle.append(nn.ReLU())
    if dropout:
        middle.append(nn.Dropout(dropout))
    return nn.Sequential(*middle, nn.Linear(12, CLASSES))


def small_dataset(n: int, seed: int) -> TensorDataset:
    """Make ``n`` samples of a task that a small network learns in a few dozen steps."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, n]))
    inputs = torch.from_numpy(rng.standard_normal((n, FEATURES)).astype(np.float32))
    classes = inputs[:, :CLASSES].argmax(dim=1)
    return TensorDataset(inputs, classes)


@dataclass(slots=True)
class Memory:
    """Everything of the parent's that training beside it must leave as it is."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    gradients: list[Tensor | None]
    flags: list[bool]
    wanted: list[bool]
    averages: dict[str, Any] | None
    random: RandomState

    @classmethod
    def of(cls, trunk: Trunk) -> Memory:
        """Remember a trunk as it is now, and the process's random states."""
        return cls(
            weights=trunk.weights(),
            optimizer=_copied(trunk.optimizer.state_dict()),
            scheduler=None if trunk.scheduler is None else _copied(trunk.scheduler.state_dict()),
            gradients=[None if p.grad is None else p.grad.clone() for p in trunk.parameters],
            flags=[module.training for module in trunk.model.modules()],
            wanted=[p.requires_grad for p in trunk.model.parameters()],
            averages=None if trunk.averages is None else _copied(trunk.averages.state_dict()),
            random=RandomState.capture(),
        )

    def differences(self, other: Memory) -> list[str]:
        """Name what differs, bit by bit; empty where nothing does."""
        names = ("weights", "optimizer", "scheduler", "gradients", "flags", "wanted", "averages")
        found = [name for name in names if not identical(getattr(self, name), getattr(other, name))]
        return found if self.random.same_as(other.random) else [*found, "random"]


@dataclass(slots=True)
class Bench:
    """A trunk after a few steps, its durable snapshot, and a runner that forks from it.

    Attributes:
        trunk: The run.
        runner: Trains specialists.
        checkpoints: Durable states.
        base: Digest of the trunk's snapshot.
        loader: The trunk's own batches.
        judged: The held-out scores behind the runner's judge.
        evaluator: What gives them.
        held_out: What they are read from.
        refresh: Training batches for norm statistics.
    """

    trunk: Trunk
    runner: SpecialistRunner
    checkpoints: CheckpointStore
    base: str
    loader: DataLoader[Any]
    judged: Evidence
    evaluator: Evaluator
    held_out: HeldOut
    refresh: FixedPass
    _batches: list[Any] = field(default_factory=list)

    def factory(self) -> SpecialistFactory:
        """Make what a worker makes its runner of."""
        return specialist_factory(
            self.runner,
            self.evaluator,
            held_out=self.held_out,
            refresh=self.refresh,
            checkpoints=self.checkpoints.root,
        )

    def step(self, steps: int = 1) -> None:
        """Train the trunk on, as the loop would."""
        trunk = self.trunk
        for _ in range(steps):
            if not self._batches:
                self._batches = list(self.loader)
            trunk.optimizer.zero_grad(set_to_none=True)
            loss, _, _ = trunk.step_fn(trunk.model, self._batches.pop())
            loss.backward()  # type: ignore[no-untyped-call]
            trunk.optimizer.step()
            trunk.step += 1
            if trunk.scheduler is not None:
                trunk.scheduler.step()
            if trunk.averages is not None:
                trunk.averages.update(trainable(trunk.model), trunk.step)

    def snapshot(self) -> str:
        """Make the trunk durable as it is now; returns the digest."""
        weights, rest = self.trunk.state()
        rest["rng"] = pack_rng()
        return self.checkpoints.save(weights, rest, {"kind": "base", "step": self.trunk.step})

    def card(
        self, recipe: TrainingRecipe, selected: np.ndarray[Any, np.dtype[np.int64]] | None = None
    ) -> None:
        """Say what the trials of the bench's card train on; all samples where nothing is selected."""
        n = len(self.loader.dataset)  # type: ignore[arg-type]
        everything = np.arange(n, dtype=np.int64)
        mine = everything if selected is None else selected
        self.runner.cards[CARD] = CardData(
            recipe=recipe,
            selected=mine,
            others=np.setdiff1d(everything, mine),
            entropy=(7, self.trunk.step),
            step=self.trunk.step,
        )

    def job(
        self,
        variant: Variant,
        *,
        trial: int = 0,
        start: int = 0,
        end: int = 6,
        top: int | None = None,
        checkpoint: str | None = None,
    ) -> SegmentJob:
        """Make a job that takes one trial from ``start`` to ``end`` resource steps."""
        return SegmentJob(
            card=CARD,
            trial=trial,
            attempt=1,
            variant=variant,
            base=self.base,
            checkpoint=checkpoint or self.base,
            from_resource=start,
            to_resource=end,
            top_resource=top or end,
            per_trunk_step=1.0,
        )

    def train(self, job: SegmentJob, *, slices: float = 1.0) -> SegmentDone:
        """Run a segment to its end, in time slices of so many resource steps."""
        segment = self.runner.open(job)
        while not segment.advance(slices):
            pass
        return segment.finish()

    def weights(self, done: SegmentDone) -> dict[str, Tensor]:
        """Give the raw weights that a segment ended with."""
        return self.checkpoints.load(done.checkpoint)[0]

    def rest(self, done: SegmentDone) -> dict[str, Any]:
        """Give what stands beside the weights of a segment's checkpoint."""
        return self.checkpoints.load(done.checkpoint)[1]


def make_bench(
    folder: Path,
    *,
    model: nn.Module | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    dataset: Any = None,
    precision: Precision = "fp32",
    clip_norm: float | None = None,
    averages: bool = False,
    steps: int = 5,
    seed: int = 11,
) -> Bench:
    """Make a bench: train a trunk for a few steps and store it.

    Args:
        folder: Where checkpoints go.
        model: The network; a small one unless given.
        optimizer: Made of the network; Adam unless given.
        scheduler: Made of the optimizer, stepped every step; none unless given.
        dataset: Training samples ``(features, class)``; a small set unless given.
        precision: Of the trunk's forward pass.
        clip_norm: Of the trunk.
        averages: Whether the trunk keeps averages of its weights.
        steps: Steps that the trunk takes before its snapshot.
        seed: Of weights, batches and splits.
    """
    with forked_rng():
        torch.default_generator.manual_seed(seed)
        network = model if model is not None else small_network()
        made = (optimizer or _adam)(network)
        data = dataset if dataset is not None else small_dataset(96, seed)
        loader = DataLoader(
            data, batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed)
        )
        trunk = Trunk(
            model=network,
            optimizer=made,
            scheduler=None if scheduler is None else scheduler(made),
            step_fn=pair_step(nn.CrossEntropyLoss(), CPU),
            loss_fn=nn.CrossEntropyLoss(),
            device=CPU,
            precision=precision,
            clip_norm=clip_norm,
        )
        if averages:
            trunk.averages = TrajectoryAverages(trainable(network), 100, every=2)
        checkpoints = CheckpointStore(folder / "checkpoints")
        bench = _around(trunk, loader, checkpoints, seed)
        bench.step(steps)
        bench.base = bench.snapshot()
        bench.card(TrainingRecipe(variants=(Variant(name="plain"),)))
    return bench


def _around(trunk: Trunk, loader: DataLoader[Any], checkpoints: CheckpointStore, seed: int) -> Bench:
    held_out = HeldOut(DataLoader(small_dataset(80, seed + 1), batch_size=40), CPU, seed)
    source = SampleSource(loader.dataset, default_collate, CPU)
    ids = np.arange(4 * BATCH, dtype=np.int64)
    refresh = FixedPass(source, ids, batch_size=BATCH, batches=4, seed=seed)
    states = States(trunk, checkpoints, refresh)
    evaluator = Evaluator(
        step_fn=trunk.step_fn,
        batches=held_out.batches,
        per_sample=per_sample_twin(trunk.loss_fn),
        autocast=trunk.autocast,
    )
    evidence = Evidence(evaluator, states, {})
    exact = per_sample_twin(trunk.loss_fn)
    with torch.no_grad():
        loss, outputs, targets = trunk.step_fn(trunk.model, source.batch(ids[:BATCH]))
    exact.check(outputs, targets, loss)
    runner = SpecialistRunner(
        trunk=trunk,
        source=source,
        judge=evidence,
        checkpoints=checkpoints,
        batch_size=BATCH,
        steps_per_epoch=None,
        per_sample=exact,
        cards={},
        safeguards=SafeguardPolicy(),
    )
    return Bench(trunk, runner, checkpoints, "", loader, evidence, evaluator, held_out, refresh)


def identical(a: Any, b: Any) -> bool:
    """Whether nested values are the same bit by bit, tensors included."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _copied(value: Any) -> Any:
    match value:
        case Tensor():
            return value.detach().clone()
        case dict():
            return {key: _copied(item) for key, item in value.items()}
        case list() | tuple():
            return [_copied(item) for item in value]
        case _:
            return value


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02)
