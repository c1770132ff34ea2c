"""The training loop: the user's batches through the user's model, watched at every step and interrupted at none.

Everything that automode does happens between two steps, in this thread, inside :meth:`Observer.boundary`. Where boundaries fall
follows from the batches alone, so that two equal runs act at the same steps on any machine; the clock only decides when the
inbox is looked into, rows are flushed and the bar moves. The loop is a generator, so that a caller can hold it between any
two steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from automode.errors import DataError
from automode.merges.trajectory import TrajectoryAverages
from automode.trainer.ids import RecordedLoader
from automode.trainer.observation_block import Block
from automode.trainer.observer import Observer
from automode.trainer.probe import Probe
from automode.trainer.progress import Console
from automode.trainer.schedule import Schedule
from automode.trainer.steps import Taken
from automode.trainer.trunk import Trunk, trainable
from automode.trainer.user_warning import warn_user
from automode.trainer.validation import Validation, ValidationResult

TICK_SECONDS = 0.2
"""Longest time that people and the disk wait for their turn, the length of one step apart."""


class Train(Protocol):
    """Trains on one batch."""

    def __call__(self, batch: Any, epoch: int) -> Taken:
        """Return what the step came to."""
        ...

    def close(self) -> None:
        """Leave the optimizer as it was."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to train; one of ``max_epochs`` and ``max_steps`` is None.

    Attributes:
        max_epochs: Passes over the loader.
        max_steps: Steps.
        steps_per_epoch: Batches of an epoch; None where the loader has no length.
        validate_every: Epochs between validations; 0: none.
    """

    max_epochs: int | None
    max_steps: int | None
    steps_per_epoch: int | None
    validate_every: int

    @property
    def total(self) -> int | None:
        """Steps of the whole run as asked for; None where that is not known before it ends."""
        if self.max_steps is not None:
            return self.max_steps
        if self.max_epochs is None or self.steps_per_epoch is None:
            return None
        return self.max_epochs * self.steps_per_epoch


@dataclass(slots=True)
class History:
    """What each epoch came to: lists of one entry an epoch, the last epoch possibly cut short.

    ``train_loss`` is the mean over the epoch's applied steps; ``val_loss``, ``val_metric`` are NaN and ``slices`` is
    empty for an epoch without validation.
    """

    epoch: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_metric: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    slices: list[dict[str, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[Any]]:
        """Give the lists by name."""
        return {name: list(getattr(self, name)) for name in self.__slots__}


class Loop:
    """Trains, tells the observer, and ends by itself.

    Args:
        plan: How long to train.
        trunk: What is trained; ``trunk.step`` is moved on.
        loader: The training batches.
        train: One training step.
        probe: Collects what a step shows.
        observer: Hears of it.
        schedule: The learning-rate schedule.
        validation: Evaluates on the validation set, or None.
        console: The progress bar.

    Attributes:
        epoch: The running epoch, from 0; at the end, how many were trained on to their end.
        batches: Batches trained on.
        history: What each epoch came to.
        reason: Why the run ended; empty until it has.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        trunk: Trunk,
        loader: RecordedLoader,
        train: Train,
        probe: Probe,
        observer: Observer,
        schedule: Schedule,
        validation: Validation | None,
        console: Console,
    ) -> None:
        self.epoch = 0
        self.batches = 0
        self.history = History()
        self.reason = ""
        self._plan = plan
        self._trunk = trunk
        self._loader = loader
        self._train = train
        self._probe = probe
        self._observer = observer
        self._schedule = schedule
        self._validation = validation
        self._console = console
        self._clock = time.perf_counter
        self._due = 0.0
        self._validated_at = -1
        self._losses = _Mean()
        self._average = _Averaging(trunk)
        self._warned = False
        self._skipping = False

    def run(self) -> str:
        """Train to the end; returns why it ended."""
        for _ in self.steps():
            pass
        return self.reason

    def steps(self) -> Iterator[int]:
        """Train, one step each time that it is asked for the next; yields the completed steps.

        Raises:
            DataError: The loader gave no batch, or batches that cannot be trained on.
        """
        self._due = self._clock() + TICK_SECONDS
        while not self._over() and self.epoch != self._plan.max_epochs:
            before = self.batches
            complete = yield from self._steps_of_epoch()
            if self.batches == before and complete:
                raise _no_batches(self.epoch)
            self._end_epoch(complete)
            self.epoch += complete
        self.reason = self._why()
        if self._validated_at != self._trunk.step and self.reason != "max_epochs":
            self._validate_last()

    def close(self) -> None:
        """Leave the user's objects as they were."""
        self._train.close()

    def flush(self) -> None:
        """Hand what is still in the probe to the observer; for an orderly end after an exception."""
        for block in self._probe.drain():
            self._observer.block(block)

    def _steps_of_epoch(self) -> Any:
        """Train on one pass of the loader; True when it was a whole one."""
        trunk, observer, schedule, clock = self._trunk, self._observer, self._schedule, self._clock
        train, record, ids_of_batch = self._train, self._probe.record, self._loader.ids_of_batch
        average, epoch, last = self._average, self.epoch, self._plan.steps_per_epoch
        stride = observer.stride
        optimizer = trunk.optimizer
        for seen, batch in enumerate(self._loader, 1):
            if trunk.step >= observer.limit or observer.stop_requested is not None:
                return False
            ids = ids_of_batch()
            taken = train(batch, epoch)
            self.batches += 1
            turn = self.batches % stride == 0
            # Read anew: a state that is loaded brings another list, and a rate may be a tensor that is written to.
            rates = tuple([float(group["lr"]) for group in optimizer.param_groups])
            # Before the optimizer's step, since some optimizers write to the gradients.
            full = record(
                trunk.step + taken.applied,
                taken.loss,
                taken.grad_norm,
                rates,
                taken.applied,
                taken.outputs,
                taken.targets,
                ids,
                taken.metrics,
            )
            if taken.pending:
                optimizer.step()
            if taken.applied:
                trunk.step += 1
                if self._skipping:
                    self._skipping = False
                    observer.stepped()
            if taken.stepped:
                if trunk.averages is not None:
                    average(trunk.averages, trunk.step)
                if schedule.every_step:
                    schedule.after_step()
            elif taken.skipped and observer.guard:
                self._skipping = True
                self._hand_over()
                observer.skipped(trunk.step, taken.skipped)
                turn = True
            if turn or full or observer.busy or clock() >= self._due:
                self._between(turn)
            yield trunk.step
            # At the last batch of an epoch the loader is asked once more, as a plain loop asks it.
            if (trunk.step >= observer.limit or observer.stop_requested is not None) and seen != last:
                return False
        return True

    def _over(self) -> bool:
        return self._trunk.step >= self._observer.limit or self._observer.stop_requested is not None

    def _why(self) -> str:
        if self._observer.stop_requested is not None:
            return self._observer.stop_requested
        if self.epoch == self._plan.max_epochs:
            return "max_epochs"
        if self._trunk.step == self._plan.max_steps:
            return "max_steps"
        return "budget"

    def _hand_over(self) -> None:
        for block in self._probe.drain():
            self._note(block)
            self._observer.block(block)
        self._due = self._clock() + TICK_SECONDS

    def _between(self, turn: bool) -> None:
        """Between two steps: act where it is due; because time has passed, do only what does not touch the run."""
        if not (turn or self._observer.busy):
            self._hand_over()
            if not self._observer.tick(self._trunk.step):
                return
        self._boundary()

    def _boundary(self) -> None:
        """Hand over the rows, then let whatever is due happen."""
        self._hand_over()
        self._observer.boundary(self._trunk.step)
        self._schedule.charge(self.batches, self._observer.charged_steps)

    def _note(self, block: Block) -> None:
        losses = block.rows[:, block.names.index("loss")]
        total = float(losses.sum())
        if block.rows[:, block.names.index("applied")].all():
            self._losses.add(total, len(losses))
        else:
            applied = losses[block.rows[:, block.names.index("applied")] > 0]
            self._losses.add(float(applied.sum()), len(applied))
        # A sum is not finite where a term is not; rarely, where it overflows.
        if not math.isfinite(total) and not self._warned and not self._observer.guard:
            self._warn(block.rows[~np.isfinite(losses), 0])
        self._console.step(self._trunk.step, total=_shown(self._observer.limit), loss=float(losses[-1]))

    def _warn(self, steps: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        if not len(steps):
            return
        self._warned = True
        warn_user(
            f"the training loss is not finite from step {int(steps[0])} on; the run goes on as it was asked to "
            '(automode="act" would keep such steps from the weights)',
            RuntimeWarning,
        )

    def _end_epoch(self, complete: bool) -> None:
        self._boundary()
        if complete:
            self._schedule.after_epoch(self.batches, self._observer.charged_steps)
        every = self._plan.validate_every
        found = self._validate() if complete and every and (self.epoch + 1) % every == 0 else None
        history = self.history
        history.epoch.append(self.epoch)
        history.step.append(self._trunk.step)
        history.train_loss.append(self._losses.take())
        history.learning_rate.append(self._trunk.rates()[0])
        history.val_loss.append(math.nan if found is None else found.loss)
        history.val_metric.append(math.nan if found is None else found.metric)
        history.slices.append({} if found is None else found.slices)

    def _validate(self) -> ValidationResult | None:
        if self._validation is None:
            return None
        found = self._validation.run()
        self._validated_at = self._trunk.step
        self._console.validation(found.loss)
        self._observer.validated(self._trunk.step, found.scores)
        self._schedule.validated(found.loss)
        return found

    def _validate_last(self) -> None:
        """A run that validates and was cut short says how good its end is."""
        if not self._plan.validate_every or not self.history.epoch:
            return
        found = self._validate()
        if found is not None:
            self.history.val_loss[-1] = found.loss
            self.history.val_metric[-1] = found.metric
            self.history.slices[-1] = found.slices


class _Averaging:
    """Feeds the trunk's averages, with the parameters looked up once."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._parameters: dict[str, Any] | None = None

    def __call__(self, averages: TrajectoryAverages, step: int) -> None:
        if self._parameters is None:
            self._parameters = trainable(self._trunk.model)
        averages.update(self._parameters, step)


class _Mean:
    """The mean of what was added since the last look."""

    def __init__(self) -> None:
        self._sum, self._n = 0.0, 0

    def add(self, total: float, count: int) -> None:
        self._sum += total
        self._n += count

    def take(self) -> float:
        mean = self._sum / self._n if self._n else math.nan
        self._sum, self._n = 0.0, 0
        return mean


def _shown(limit: int) -> int | None:
    """The bar's length: none while nobody knows the end."""
    return limit if limit < 1 << 60 else None


def _no_batches(epoch: int) -> DataError:
    if epoch == 0:
        return DataError("the training loader is empty: it gave no batch")
    return DataError(
        f"epoch {epoch + 1} gave no batch: the training loader is an iterator that can be read only once; "
        "pass a DataLoader or a list of batches"
    )
