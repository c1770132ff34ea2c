"""Specialists away from the training process: all that they need of a run, as one object that a worker can have.

The factory is made once, before the first step, from copies: what it holds is what never changes while the run goes on.
What does change (the card's samples, clipping, frozen layers) travels with each job, and everything that is trained comes
from the job's checkpoint. So a worker's specialist is the one that the training process would have trained itself, bit by
bit where both compute on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from automode.backends.base import Segment, SegmentJob
from automode.errors import NotExecutableError
from automode.merges.batches import training_flags_kept
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.policy import SafeguardPolicy
from automode.session.checkpoints import CheckpointStore
from automode.trainer.arithmetic import Arithmetic
from automode.trainer.card_data import CardData
from automode.trainer.evaluation import Evaluator
from automode.trainer.evidence import Evidence
from automode.trainer.heldout import HeldOut
from automode.trainer.per_sample import PerSampleLoss, per_sample_twin
from automode.trainer.random_state import forked_rng
from automode.trainer.sample_source import FixedPass, SampleSource
from automode.trainer.specialists import SpecialistRunner
from automode.trainer.states import States
from automode.trainer.steps import pair_step
from automode.trainer.tasks import Task
from automode.trainer.trunk import Precision, StepFn, Trunk, copy_of, trainable

MakeStep = Callable[[Callable[..., Tensor], torch.device], StepFn]
"""Loss and device to the forward pass, as :func:`automode.trainer.steps.pair_step`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardBrief:
    """What a worker must know for a job beside its checkpoint.

    Attributes:
        data: What the card's trials train on.
        clip_norm: Largest gradient norm of the trunk, as it is now.
        part_rows: Rows of the parts that the trunk's batches are trained on in, as it is now; None: they are not divided.
        frozen: Names of the parameters that the trunk does not train, as it is now.
    """

    data: CardData
    clip_norm: float | None
    part_rows: int | None
    frozen: frozenset[str]


class CardBriefs:
    """Gives each job's brief, in the training process.

    Args:
        runner: Knows the running cards and the trunk.
    """

    def __init__(self, runner: SpecialistRunner) -> None:
        self._runner = runner

    def __call__(self, job: SegmentJob) -> CardBrief:
        """Say what the job's worker must know."""
        trunk = self._runner.trunk
        return CardBrief(
            data=self._runner.cards[job.card],
            clip_norm=trunk.clip_norm,
            part_rows=trunk.part_rows,
            frozen=frozenset(name for name, p in trunk.model.named_parameters() if not p.requires_grad),
        )


@dataclass(frozen=True, slots=True)
class WorkerRunner:
    """Opens a worker's segments.

    Attributes:
        runner: Trains from the worker's own copies.
    """

    runner: SpecialistRunner

    def open(self, job: SegmentJob, brief: CardBrief) -> Segment:
        """Bring the copies up to date, and load the job's checkpoint.

        Raises:
            NotExecutableError: The variant asks for what this run does not have.
        """
        runner = self.runner
        runner.cards.clear()
        runner.cards[job.card] = brief.data
        runner.trunk.clip_norm, runner.trunk.part_rows = brief.clip_norm, brief.part_rows
        for name, parameter in runner.trunk.model.named_parameters():
            parameter.requires_grad_(name not in brief.frozen)
        return runner.open(job)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialistFactory:
    """Makes a worker's runner; make the factory itself with :func:`specialist_factory`.

    It can be sent to another process where the user's model, optimizer, scheduler, loss, dataset and collate function can be
    pickled, which takes names at the top level of modules; a forked process may inherit any.

    Attributes:
        model: A copy of the network, on the CPU.
        optimizer: A copy over the copy's parameters, without state.
        scheduler: A copy that drives it, or None.
        averages: Planned steps and cadence of the trunk's averages, or None.
        loss_fn: The user's loss.
        make_step: Makes the forward pass.
        device: Where to train.
        precision: Arithmetic of the trunk's forward pass.
        source: Training samples by id.
        held_out: Held-out samples; val-A judges rungs.
        refresh: Training batches for norm statistics.
        task: Kind of task.
        delta: Scale of the Huber loss, where the task has one.
        batch_size: Rows a batch.
        steps_per_epoch: For schedules that step once an epoch, or None.
        weighted: Whether per-sample losses are exact, so that a variant may weight them.
        arithmetic: How the training process computes.
        checkpoints: The session's checkpoints.
        safeguards: Which steps a trial leaves out.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    averages: tuple[int, int] | None
    loss_fn: Callable[..., Tensor]
    make_step: MakeStep
    device: torch.device
    precision: Precision
    source: SampleSource
    held_out: HeldOut
    refresh: FixedPass
    task: Task | None
    delta: float | None
    batch_size: int
    steps_per_epoch: int | None
    weighted: bool
    arithmetic: Arithmetic
    checkpoints: str
    safeguards: SafeguardPolicy

    def __call__(self, checkpoints: str | None) -> WorkerRunner:
        """Make the runner, and see that it can read a batch and compute its loss.

        Args:
            checkpoints: Folder of the checkpoints on this machine; None: the session's own.

        Raises:
            NotExecutableError: Per-sample losses are not exact here, although they were in the training process.
        """
        self.arithmetic.apply()
        trunk = self._trunk()
        store = CheckpointStore(checkpoints or self.checkpoints)
        evaluator = Evaluator(
            step_fn=trunk.step_fn,
            batches=self.held_out.batches,
            n_a=self.held_out.n_a,
            per_sample=per_sample_twin(self.loss_fn),
            autocast=trunk.autocast,
            delta=self.delta,
            task=self.task,
        )
        runner = SpecialistRunner(
            trunk=trunk,
            source=self.source,
            judge=Evidence(evaluator, States(trunk, store, self.refresh), {}),
            checkpoints=store,
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            per_sample=self._rehearse(trunk),
            cards={},
            safeguards=self.safeguards,
        )
        return WorkerRunner(runner)

    def _trunk(self) -> Trunk:
        trunk = Trunk(
            model=self.model.to(self.device),
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            step_fn=self.make_step(self.loss_fn, self.device),
            loss_fn=self.loss_fn,
            device=self.device,
            precision=self.precision,
        )
        if self.averages is not None:
            planned, every = self.averages
            trunk.averages = TrajectoryAverages(trainable(trunk.model), planned, every=every)
        return trunk

    def _rehearse(self, trunk: Trunk) -> PerSampleLoss | None:
        """Read a training batch and compute its loss, so that what cannot work is known before the first job."""
        per_sample = per_sample_twin(self.loss_fn)
        with forked_rng(), training_flags_kept(trunk.model), torch.no_grad():
            trunk.model.eval()
            for batch in self.refresh():
                with trunk.autocast():
                    loss, outputs, targets = trunk.step_fn(trunk.model, batch)
                if self.weighted and not per_sample.check(outputs, targets, loss):
                    raise NotExecutableError(
                        f"per-sample losses are exact in the training process and not here: {per_sample.reason}"
                    )
                break
        return per_sample if self.weighted else None


def specialist_factory(
    runner: SpecialistRunner,
    evaluator: Evaluator,
    *,
    held_out: HeldOut,
    refresh: FixedPass,
    checkpoints: str | PathLike[str],
    make_step: MakeStep = pair_step,
) -> SpecialistFactory:
    """Copy what a worker needs of a run; the run itself is left as it is.

    Args:
        runner: The run's own.
        evaluator: Scores the run's networks; its task and scale are fixed here if they were not.
        held_out: What it reads.
        refresh: Training batches for norm statistics, as the run's own states use.
        checkpoints: Folder of the session's checkpoints.
        make_step: Made the trunk's ``step_fn``.

    Raises:
        NotExecutableError: Model, optimizer or scheduler cannot be copied.
        DataError: val-A holds no sample.
    """
    trunk = runner.trunk
    evaluator.settle(trunk.model)
    model, optimizer, scheduler = copy_of(trunk)
    optimizer.state.clear()
    averages = trunk.averages
    return SpecialistFactory(
        model=model.cpu(),
        optimizer=optimizer,
        scheduler=scheduler,
        averages=None if averages is None else (averages.planned_steps, averages.every),
        loss_fn=trunk.loss_fn,
        make_step=make_step,
        device=trunk.device,
        precision=trunk.precision,
        source=runner.source,
        held_out=held_out,
        refresh=refresh,
        task=evaluator.task,
        delta=evaluator.delta,
        batch_size=runner.batch_size,
        steps_per_epoch=runner.steps_per_epoch,
        weighted=runner.per_sample is not None and runner.per_sample.exact,
        arithmetic=Arithmetic.capture(),
        checkpoints=str(Path(checkpoints).absolute()),
        safeguards=runner.safeguards,
    )
