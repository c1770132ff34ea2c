"""Specialists whose steps a backend may take for several of them at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from automode.backends.base import Fate, SegmentJob, StackableSegment
from automode.planner.variants import ANNEALED_CONTROL
from automode.trainer.random_state import RandomState, forked_rng
from automode.trainer.specialists import TRAIN_PASSES, SpecialistRunner, SpecialistSegment
from automode.trainer.stored_states import Checkpoints
from automode.trainer.trunk import Precision, autocast


class StackableSpecialists:
    """Opens specialists for a backend that stacks.

    Args:
        runner: What they fork from and are judged by.
    """

    def __init__(self, runner: SpecialistRunner) -> None:
        self._runner = runner
        self._checkpoints = _LoadedOnce(runner.checkpoints)

    def open(self, job: SegmentJob) -> SpecialistSegment:
        """Load the job's checkpoint into fresh copies; raises what :meth:`SpecialistRunner.open` raises.

        Where several steps are taken on each batch, a segment cannot be taken apart into steps of a batch each.
        """
        divided = self._runner.trunk.part_rows is not None or job.variant.updates != 1
        made = SpecialistSegment if divided else StackableSpecialist
        return made(replace(self._runner, checkpoints=self._checkpoints), job, self._runner.cards[job.card])


class _LoadedOnce:
    """Checkpoints, the last one loaded kept in memory: a card's trials all start from one.

    Args:
        stored: The durable states.
    """

    def __init__(self, stored: Checkpoints) -> None:
        self._stored = stored
        self._last: tuple[str, tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]] | None = None

    def load(self, digest: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Return (weights, rest, manifest), each call's its own."""
        if self._last is None or self._last[0] != digest:
            weights, rest, manifest = self._stored.load(digest)
            self._last = (digest, (weights, rest, manifest))
        return copy.deepcopy(self._last[1])

    def save(
        self, weights: Mapping[str, Tensor], rest: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> str:
        """Make a state durable; returns its digest."""
        return self._stored.save(weights, rest, manifest)

    def delete(self, digests: Iterable[str]) -> list[str]:
        """Delete checkpoints; returns those that were there."""
        return self._stored.delete(digests)


class StackableSpecialist(SpecialistSegment):
    """A specialist's segment, taken apart into what happens before and after a step's arithmetic."""

    _last_loss = math.nan

    @property
    def job(self) -> SegmentJob:
        """What is being trained."""
        return self._job

    @property
    def model(self) -> nn.Module:
        """The specialist's own network."""
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The specialist's own optimizer."""
        return self._optimizer

    @property
    def precision(self) -> Precision:
        """Arithmetic of the forward pass."""
        own = self._job.variant.precision
        return self._runner.trunk.precision if own == "keep" else own

    @property
    def guarded(self) -> bool:
        """Whether a step is judged by the norm of its gradient."""
        return self._guard.on

    @property
    def done(self) -> bool:
        """Whether no step is left to take."""
        return self._done()

    @property
    def steps_left(self) -> int:
        """Optimizer steps to the rung."""
        return 0 if self._done() else int((self._job.to_resource - self._resource + 1e-9) / self.cost)

    @property
    def batch_key(self) -> Hashable:
        """Trials of a card that train on the same samples and labels walk one plan: card, these and the place name a batch."""
        variant = self._job.variant
        control = variant == ANNEALED_CONTROL
        return (
            self._job.card,
            control,
            variant.labels,
            variant.batches,
            self._job.trial if self._data.parts else None,
            self._steps,
            self._runner.batch_size,
        )

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """The specialist's own random states inside; the parent's are put back after."""
        with forked_rng():
            self._rng.restore()
            yield
            self._rng = RandomState.capture()

    def share_randomness(self, other: StackableSegment) -> None:
        """Go on from the random states of the specialist that drew for both."""
        assert isinstance(other, StackableSpecialist)
        self._rng = other._rng  # noqa: SLF001  # one of its own kind

    def draw(self) -> Any:
        """Return the next batch of the card's plan."""
        return self._drawn()[0]

    def set_rates(self) -> None:
        """Write the coming step's learning rates into the optimizer's groups."""
        self._set_rate()

    def loss_of(self, model: nn.Module, batch: Any, weight: Tensor | None) -> Tensor:
        """Compute the loss of a batch under any weights, as the specialist's own step does.

        A member that weighs nothing keeps the user's own loss, bit by bit, where others beside it weigh.
        """
        trunk = self._runner.trunk
        with autocast(trunk.device, self.precision):
            loss, outputs, targets = trunk.step_fn(model, batch)
            loss = loss.reshape(())
            per_sample = self._runner.per_sample
            if weight is None or per_sample is None:
                return loss
            losses = per_sample.differentiable(outputs, targets)
            selected = torch.arange(losses.shape[0], device=losses.device) < self._plan.selected_rows
            weight = weight.to(losses.dtype)
            weights = torch.where(selected, weight, torch.ones_like(weight))
            return torch.where(weight == 1.0, loss, (losses * weights).sum() / weights.sum())

    def took(self, loss: float, norm: float) -> Fate:
        """Count a step whose gradient was taken at this loss, and say what becomes of it."""
        self._steps += 1
        self._resource += self.cost
        self.charge(1)
        self._last_loss = loss
        return self._fate(loss, norm)

    def moved(self) -> None:
        """Follow up on moved weights: schedule, averages, early stopping."""
        self._follow()
        self._patience.see(self._last_loss)

    def charge(self, steps: int) -> None:
        """Count the sample passes of so many steps."""
        self._passes += steps * self._runner.batch_size * TRAIN_PASSES
