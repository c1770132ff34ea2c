"""Distillation within a run: what control and specialists say together, taught to one network of the trunk's architecture.

The student trains at once, between two of the trunk's steps, on copies of everything and on batches of a plan of its own:
the user's loader, sampler and random state do not notice. The same command gives the same student, so that one that was
cut off is simply trained again. Its rates stay what the control's are (an annealed student would be better than any control for its
anneal alone), and like every candidate it is judged by the best of its raw weights and its averages.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from automode.errors import MergeError, NotExecutableError
from automode.merges.distill import TRAINING_PASSES, DistillReport, Teacher, distill, ensemble
from automode.merges.moe import Task
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.cards import PlanCard
from automode.planner.commands import Merge
from automode.planner.inputs import Merged, Weights
from automode.planner.recipes import MergeDistill
from automode.trainer.adapting import ADAPTER
from automode.trainer.card_data import CardData
from automode.trainer.evidence import Evidence
from automode.trainer.optimizers import scale_rates
from automode.trainer.random_state import seeded_rng
from automode.trainer.sample_source import BatchPlan, SampleSource
from automode.trainer.states import States
from automode.trainer.stored_states import Checkpoints
from automode.trainer.trunk import Trunk, candidates_of, copy_of, trainable

STUDENT = 0x57D
"""Tells the student's batches and random numbers from the specialists'."""


@dataclass(slots=True, kw_only=True)
class Distiller:
    """Trains students.

    Attributes:
        trunk: The run.
        states: Loads control and specialists.
        checkpoints: Durable states.
        evidence: Scores candidates on val-A.
        source: Training samples by id.
        batch_size: Rows a batch, as specialists train.
        cards: Training data of the running cards.
        task: What outputs mean.
    """

    trunk: Trunk
    states: States
    checkpoints: Checkpoints
    evidence: Evidence
    source: SampleSource
    batch_size: int
    cards: Mapping[str, CardData]
    task: Task

    def distil(self, card: PlanCard, command: Merge, step: int, mixture: nn.Module | None) -> Merged:
        """Train the student of a card, choose among its raw weights and averages, and make it durable.

        Args:
            card: The card.
            command: Names control and specialists.
            step: The trunk's.
            mixture: What teaches; None: the mean of control and specialists.

        Returns:
            The student; of a student that diverged, no finite value and the reason.

        Raises:
            NotExecutableError: The card's training samples are not known, or the model cannot be copied.
        """
        recipe, data = card.merge_recipe, self.cards.get(card.id)
        assert isinstance(recipe, MergeDistill)
        assert command.control is not None
        if data is None:
            raise NotExecutableError(
                f"what card {card.id} trains on is not known, so no student can be trained"
            )
        teacher, loaded = self._teacher(command, mixture)
        start = self._student(command, recipe)
        try:
            report = self._train(start, teacher, recipe, data)
        except MergeError as error:
            spent = loaded + math.ceil(teacher.samples * (TRAINING_PASSES + teacher.passes))
            return self._merged(card, command, step, command.control, math.nan, spent, why=str(error))
        del teacher  # before more copies are made
        candidates = candidates_of(start.model, start.averages)
        choice, value, judged = self.evidence.choose(self.states.shell(), candidates, card.acceptance.metric)
        digest = self.checkpoints.save(
            candidates["raw"],
            {} if start.averages is None else {"averages": start.averages.state_dict()},
            {"kind": "merge", "card": card.id, "method": command.method, "step": step},
        )
        why = f"the student's distance to its teachers went from {report.first_loss:.4g} to {report.last_loss:.4g}"
        weights = Weights(checkpoint=digest, choice=choice)
        return self._merged(card, command, step, weights, value, loaded + report.passes + judged, why=why)

    def _train(
        self, student: _Student, teacher: _Counted, recipe: MergeDistill, data: CardData
    ) -> DistillReport:
        trained, averages = trainable(student.model), student.averages

        def follow(steps: int) -> None:
            if averages is not None:
                averages.update(trained, student.followed + steps, now=steps == recipe.steps)

        seed = int(np.random.SeedSequence([*data.entropy, STUDENT]).generate_state(1)[0])
        with seeded_rng(seed):
            return distill(
                student.model,
                teacher,
                lambda: self._batches(data, recipe.steps),
                steps=recipe.steps,
                teacher_passes=teacher.passes,
                task=self.task,
                temperature=recipe.temperature,
                optimizer=lambda _: student.optimizer,
                anneal=False,
                seed=seed,
                forward=self._forward,
                clip_norm=self.trunk.clip_norm,
                after_step=follow,
            )

    def _merged(
        self,
        card: PlanCard,
        command: Merge,
        step: int,
        weights: Weights,
        value: float,
        passes: float,
        *,
        why: str,
    ) -> Merged:
        return Merged(
            card=card.id,
            method=command.method,
            members=("control", *(f"expert {i + 1}" for i in range(len(command.members)))),
            weights=weights,
            value=value,
            metric=card.acceptance.metric,
            why=why,
            step=step,
            passes=float(passes),
        )

    def _teacher(self, command: Merge, mixture: nn.Module | None) -> tuple[_Counted, float]:
        """Put the teachers in place; returns them, and the sample passes that it took."""
        assert command.control is not None
        if mixture is not None:
            experts, router = len(command.members) + 1, _share_of_the_router(mixture)
            return _Counted(
                ensemble([mixture], task=self.task, forward=self._forward), passes=experts + router
            ), 0.0
        models, loaded = [], 0.0
        for reference in (command.control, *command.members):
            model, _, spent = self.states.model(reference)
            models.append(model)
            loaded += spent
        return _Counted(ensemble(models, task=self.task, forward=self._forward), passes=len(models)), loaded

    def _student(self, command: Merge, recipe: MergeDistill) -> _Student:
        """Make the student of the weights that it starts from, with the control's rates."""
        assert command.control is not None
        start = command.control if recipe.student == "control" else command.members[0]
        state, rest = self.states.load(start)
        _, control, _ = self.checkpoints.load(command.control.checkpoint)
        model, optimizer, _ = copy_of(self.trunk)
        model.load_state_dict(state)
        optimizer.load_state_dict(control["optimizer"])
        if recipe.student == "specialist":
            groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            if rest.get("kind") == type(optimizer).__name__:
                optimizer.load_state_dict(rest["optimizer"])
                for group, kept in zip(optimizer.param_groups, groups, strict=True):
                    group.update(kept)
            elif rest.get("kind") != ADAPTER:  # whose moments are of other parameters; the control's go on
                optimizer.state.clear()
        for group in optimizer.param_groups:
            scale_rates(group, recipe.lr_mul)
        averages = copy.deepcopy(self.trunk.averages)
        if averages is None:
            return _Student(model=model, optimizer=optimizer, averages=None, followed=0)
        averages.load_state_dict(rest["averages"])
        return _Student(
            model=model,
            optimizer=optimizer,
            averages=averages,
            followed=int(rest["averages"]["last_step"]),
        )

    def _batches(self, data: CardData, steps: int) -> Iterator[Any]:
        """Batches of what the card's trials may train on, selected or not, in an order of their own."""
        plan = BatchPlan(
            np.union1d(data.selected, data.others),
            np.empty(0, dtype=np.int64),
            replay=0.0,
            batch_size=self.batch_size,
            entropy=(*data.entropy, STUDENT),
        )
        for k in range(steps):
            yield self.source.batch(plan.ids(k))

    def _forward(self, model: nn.Module, batch: Any) -> Tensor:
        with self.trunk.autocast():
            _, outputs, _ = self.trunk.step_fn(model, batch)
        if not isinstance(outputs, Tensor):
            raise MergeError(
                f"the model answers with a {type(outputs).__name__}, and a student can be taught tensors only: leave the merge out"
            )
        return outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Student:
    """A student before its first step; ``followed`` is the step up to which its averages have followed what it starts from."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: TrajectoryAverages | None
    followed: int


class _Counted:
    """A teacher that counts the samples which it was asked about.

    Args:
        teach: The teacher.
        passes: What an answer costs, in forward passes of one network.
    """

    def __init__(self, teach: Teacher, *, passes: float) -> None:
        self._teach = teach
        self.passes = passes
        self.samples = 0

    def __call__(self, batch: Any) -> Tensor:
        """Teach a batch."""
        answer = self._teach(batch)
        self.samples += int(answer.shape[0])
        return answer


def _share_of_the_router(mixture: nn.Module) -> float:
    gate, parent = mixture.get_submodule("gate"), mixture.get_submodule("experts.0")
    return sum(p.numel() for p in gate.parameters()) / max(1, sum(p.numel() for p in parent.parameters()))
