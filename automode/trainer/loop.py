"""The training loop: the user's batches through the user's model, watched at every step and interrupted at none.

Everything that automode does happens between two steps, in this thread, inside :meth:`Observer.boundary`. Where boundaries fall
follows from the batches alone, so that two equal runs act at the same steps on any machine; the clock only decides when the
inbox is looked into, rows are flushed and the bar moves. The loop is a generator, so that a caller can hold it between any
two steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from automode.errors import DataError
from automode.merges.trajectory import TrajectoryAverages
from automode.trainer.companions import Companions
from automode.trainer.data_cursor import DataCursor
from automode.trainer.history import History, Mean
from automode.trainer.observation_block import Block
from automode.trainer.observer import Observer
from automode.trainer.plan import Plan
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

    @property
    def began(self) -> bool:
        """Whether the optimizer has begun to write in the step that runs, or ran last."""
        ...

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides the trunk; plain data, for :meth:`load`."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        ...


class Loop:
    """Trains, tells the observer, and ends by itself.

    Args:
        plan: How long to train.
        trunk: What is trained; ``trunk.step`` is moved on.
        cursor: The training batches, and the place in them.
        train: One training step.
        probe: Collects what a step shows.
        observer: Hears of it.
        schedule: The learning-rate schedule.
        validation: Evaluates on the validation set, or None.
        console: The progress bar.
        companions: Callbacks, and the table of epochs.

    Attributes:
        epoch: The running epoch, from 0; at the end, how many were trained on to their end.
        batches: Batches trained on.
        plan: How long to train; may be replaced between two steps.
        train: As given.
        history: What each epoch came to.
        reason: Why the run ended; empty until it has.
        cursor: As given.
        phase: What is going on, for whoever has to know whether the state is that of a step boundary: ``between`` steps (also
            while a batch is waited for), ``forward`` (the training step runs), or ``update`` (the weights are written).
        epoch_ended: Called when an epoch, with its validation, is over.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        trunk: Trunk,
        cursor: DataCursor,
        train: Train,
        probe: Probe,
        observer: Observer,
        schedule: Schedule,
        validation: Validation | None,
        console: Console,
        companions: Companions,
    ) -> None:
        self.epoch = 0
        self.batches = 0
        self.history = History()
        self.reason = ""
        self.plan = plan
        self._trunk = trunk
        self.cursor = cursor
        self.phase = "between"
        self.epoch_ended: Callable[[], None] = _nothing
        self.train = train
        self._probe = probe
        self._observer = observer
        self._schedule = schedule
        self._validation = validation
        self._console = console
        self.companions = companions
        self._clock = time.perf_counter
        self._due = 0.0
        self._validated_at = -1
        self._losses = Mean()
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
        self.cursor.go_on()
        cut = self.cursor.read > 0
        while cut or (not self.over and self.epoch != self.plan.max_epochs):
            short = cut and self.over and self.cursor.read != self.plan.steps_per_epoch
            cut = False
            complete = False if short else (yield from self.companions.heard(self._steps_of_epoch()))
            if complete and not self.cursor.read:
                raise _no_batches(self.epoch)
            self._end_epoch(complete)
            self.epoch += complete
            if complete:
                self.cursor.ended()
                self.epoch_ended()
        self.reason = self._why()
        if self._validated_at != self._trunk.step and self.reason != "max_epochs":
            self._validate_last()

    def state(self) -> dict[str, Any]:
        """Where the loop stands between two steps: plain data and tensors, for :meth:`load`."""
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "history": self.history.as_dict(),
            "mean": self._losses.state(),
            "validated_at": self._validated_at,
            "warned": self._warned,
            "skipping": self._skipping,
            "schedule": self._schedule.state(),
            "train": self.train.state(),
            "cursor": self.cursor.state(),
            "companions": self.companions.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave; the cursor has been taken up already."""
        self.epoch, self.batches = int(state["epoch"]), int(state["batches"])
        self.history = History.from_dict(state["history"])
        self._losses.load(state["mean"])
        self._validated_at = int(state["validated_at"])
        self._warned, self._skipping = bool(state["warned"]), bool(state["skipping"])
        self._schedule.load(state["schedule"])
        self.train.load(state["train"])
        if "companions" in state:
            for what in self.companions.load(state["companions"]):
                warn_user(f"resume: {what}")

    def close(self) -> None:
        """Leave the user's objects as they were."""
        self.train.close()
        self.companions.close()

    def flush(self) -> None:
        """Hand what is still in the probe to the observer."""
        self._hand_over()

    def _steps_of_epoch(self) -> Any:
        """Train on one pass of the loader; True when it was a whole one."""
        trunk, observer, schedule, clock = self._trunk, self._observer, self._schedule, self._clock
        train, record, cursor = self.train, self._probe.record, self.cursor
        ids_of_batch = cursor.loader.ids_of_batch
        average, epoch, last = self._average, self.epoch, self.plan.steps_per_epoch
        stride = observer.stride
        self.companions.epoch_begins(anew=not cursor.read)
        optimizer = trunk.optimizer
        for batch in cursor.batches():
            if trunk.step >= observer.limit or observer.stop_requested is not None:
                return False
            kept, ids = trunk.curated(batch, ids_of_batch())
            self.phase = "forward"
            taken = train(kept, epoch)
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
            self.phase = "update"
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
            cursor.read += 1
            self.phase = "between"
            if taken.skipped and observer.guard:
                self._skipping = True
                self._hand_over()
                observer.skipped(trunk.step, taken.skipped)
                turn = True
            if turn or full or observer.busy or clock() >= self._due:
                self._between(turn)
            yield trunk.step
            # At the last batch of an epoch the loader is asked once more, as a plain loop asks it.
            if (trunk.step >= observer.limit or observer.stop_requested is not None) and cursor.read != last:
                return False
        return True

    @property
    def writing(self) -> bool:
        """Whether the training step that runs has begun to write to the weights."""
        return self.phase == "forward" and self.train.began

    @property
    def over(self) -> bool:
        """Whether no further step may be taken, as far as that is known before the loader is asked again."""
        return self._trunk.step >= self._observer.limit or self._observer.stop_requested is not None

    def _why(self) -> str:
        if self._observer.stop_requested is not None:
            return self._observer.stop_requested
        if self.epoch == self.plan.max_epochs:
            return "max_epochs"
        if self._trunk.step == self.plan.max_steps:
            return "max_steps"
        return "budget"

    def _hand_over(self) -> None:
        for block in self._probe.drain():
            self._note(block)
            if self.companions.block is not None:
                self.companions.block(block)
            self._observer.block(block)
        self._due = self._clock() + TICK_SECONDS

    def _between(self, turn: bool) -> None:
        """Between two steps: act where it is due; because time has passed, do only what does not touch the run."""
        if not (turn or self._observer.busy):
            self._hand_over()
            if not self._observer.tick(self._trunk.step):
                return
        self.boundary()

    def boundary(self) -> None:
        """Hand over the rows, then let whatever is due happen; between two steps."""
        self._hand_over()
        self._trunk.follow()  # a callback may have added parameters
        self._observer.boundary(self._trunk.step)
        self._schedule.charge(self.batches, self._observer.charged_steps)

    def _note(self, block: Block) -> None:
        losses = block.rows[:, block.names.index("loss")]
        total = float(losses.sum())
        self._losses.add(losses[block.rows[:, block.names.index("applied")] > 0])
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
        self.boundary()
        if complete:
            self._schedule.after_epoch(self.batches, self._observer.charged_steps)
        every = self.plan.validate_every
        train_loss, history = self._losses.take(), self.history
        self.companions.epoch_trained(train_loss)
        found = self._validate() if complete and every and (self.epoch + 1) % every == 0 else None
        history.epoch.append(self.epoch)
        history.step.append(self._trunk.step)
        history.train_loss.append(train_loss)
        history.learning_rate.append(self._trunk.rates()[0])
        history.val_loss.append(math.nan if found is None else found.loss)
        history.val_metric.append(math.nan if found is None else found.metric)
        history.slices.append({} if found is None else found.slices)
        history.note(self.companions.numbers)
        self.companions.epoch_over(history.learning_rate[-1])

    def _validate(self) -> ValidationResult | None:
        if self._validation is None:
            return None
        self.companions.validation_begins()
        found = self._validation.run(self.companions.see)
        self._validated_at = self._trunk.step
        self._console.validation(found.loss)
        self._observer.validated(self._trunk.step, found.scores)
        self._schedule.validated(found.loss)
        self.companions.validated(found)
        return found

    def _validate_last(self) -> None:
        """A run that validates and was cut short says how good its end is."""
        if not self.plan.validate_every or not self.history.epoch:
            return
        found = self._validate()
        if found is not None:
            self.history.val_loss[-1] = found.loss
            self.history.val_metric[-1] = found.metric
            self.history.slices[-1] = found.slices
            self.history.note(self.companions.numbers)


class _Averaging:
    """Feeds the trunk's averages, with the parameters looked up once."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._parameters: dict[str, Any] | None = None

    def __call__(self, averages: TrajectoryAverages, step: int) -> None:
        if self._parameters is None:
            self._parameters = trainable(self._trunk.model)
        averages.update(self._parameters, step)


def _shown(limit: int) -> int | None:
    """The bar's length: none while nobody knows the end."""
    return limit if limit < 1 << 60 else None


def _nothing() -> None:
    """Nobody wants to know."""


def _no_batches(epoch: int) -> DataError:
    if epoch == 0:
        return DataError("the training loader is empty: it gave no batch")
    return DataError(
        f"epoch {epoch + 1} gave no batch: the training loader is an iterator that can be read only once; "
        "pass a DataLoader or a list of batches"
    )
