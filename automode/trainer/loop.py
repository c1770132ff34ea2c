"""The training loop: the user's batches through the user's model, watched at every step and interrupted at none.

Everything that automode does happens between two steps, in this thread, inside :meth:`Observer.boundary`. Where boundaries fall
follows from the batches alone, so that two equal runs act at the same steps on any machine; the clock only decides when the
inbox is looked into, rows are flushed and the bar moves. The loop is a generator, so that a caller can hold it between any
two steps.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from automode.errors import DataError
from automode.merges.trajectory import TrajectoryAverages
from automode.trainer.agenda import ROWS_SECONDS, TICK_SECONDS
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
from automode.trainer.stretches import stretch
from automode.trainer.trunk import Trunk, trainable
from automode.trainer.user_warning import warn_user
from automode.trainer.validation import Validation, ValidationResult


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
        trunk: As given, and so are ``probe``, ``observer`` and ``schedule``.
        clock: Seconds.
        due: When the clock lets rows be handed over.
        anew: Whether rows have been handed over since the running stretch of steps began: anything may have changed since.
        skipping: Whether the last step was kept from the weights.
        average: Feeds the trunk's averages.
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
        self.trunk = trunk
        self.cursor = cursor
        self.phase = "between"
        self.epoch_ended: Callable[[], None] = _nothing
        self.train = train
        self.probe = probe
        self.observer = observer
        self.schedule = schedule
        self._validation = validation
        self._console = console
        self.companions = companions
        self.clock = time.perf_counter
        self.due = 0.0
        self._rows_due = 0.0
        self._validated_at = -1
        self._losses = Mean()
        self.average = _Averaging(trunk)
        self._warned = False
        self.skipping = False
        self.anew = True

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
        now = self.clock()
        self.due, self._rows_due = now + TICK_SECONDS, now + ROWS_SECONDS
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
        if self._validated_at != self.trunk.step and self.reason != "max_epochs":
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
            "skipping": self.skipping,
            "schedule": self.schedule.state(),
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
        self._warned, self.skipping = bool(state["warned"]), bool(state["skipping"])
        self.schedule.load(state["schedule"])
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

    def _steps_of_epoch(self) -> Generator[int, None, bool]:
        """Train on one pass of the loader; True when it was a whole one."""
        self.companions.epoch_begins(anew=not self.cursor.read)
        batches, whole = self.cursor.batches(), None
        while whole is None:
            whole = yield from stretch(self, batches)
        return whole

    def noted(self, taken: Taken, ids: Sequence[Any] | None) -> None:
        """Record a step, make the optimizer's where that is still to be made, and let happen what is due after it."""
        trunk, observer = self.trunk, self.observer
        turn = self.batches % observer.stride == 0
        # Read anew: a state that is loaded brings another list, and a rate may be a tensor that is written to.
        rates = tuple([float(group["lr"]) for group in trunk.optimizer.param_groups])
        # Before the optimizer's step, since some optimizers write to the gradients.
        full = self.probe.record(
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
            trunk.optimizer.step()
        if taken.applied:
            trunk.step += 1
            if self.skipping:
                self.skipping = False
                observer.stepped()
        if taken.stepped:
            self.stepped()
        self.cursor.read += 1
        self.phase = "between"
        if taken.skipped and observer.guard:
            self.skipping = True
            self._hand_over()
            observer.skipped(trunk.step, taken.skipped)
            turn = True
        if turn or full or observer.busy or self.clock() >= self.due:
            self.between(turn, full)

    def stepped(self) -> None:
        """Let follow what follows each step of the optimizer."""
        if self.trunk.averages is not None:
            self.average(self.trunk.averages, self.trunk.step)
        if self.schedule.every_step:
            self.schedule.after_step()

    @property
    def writing(self) -> bool:
        """Whether the training step that runs has begun to write to the weights."""
        return self.phase == "forward" and self.train.began

    @property
    def over(self) -> bool:
        """Whether no further step may be taken, as far as that is known before the loader is asked again."""
        return self.trunk.step >= self.observer.limit or self.observer.stop_requested is not None

    def _why(self) -> str:
        if self.observer.stop_requested is not None:
            return self.observer.stop_requested
        if self.epoch == self.plan.max_epochs:
            return "max_epochs"
        if self.trunk.step == self.plan.max_steps:
            return "max_steps"
        return "budget"

    def _hand_over(self) -> None:
        for block in self.probe.drain():
            self._note(block)
            if self.companions.block is not None:
                self.companions.block(block)
            self.observer.block(block)
        now = self.clock()
        self.due, self._rows_due = now + TICK_SECONDS, now + ROWS_SECONDS
        self.anew = True

    def between(self, turn: bool, full: bool) -> None:
        """Between two steps: act where it is due; because time has passed, do only what does not touch the run.

        Args:
            turn: Whether a boundary is due.
            full: Whether rows are to be handed over, whatever the time.
        """
        if not (turn or self.observer.busy):
            now = self.clock()
            if full or now >= self._rows_due:
                self._hand_over()
            self.due = now + TICK_SECONDS
            if not self.observer.tick(self.trunk.step):
                self.anew = self.anew or self.observer.busy
                return
        self.boundary()

    def boundary(self) -> None:
        """Hand over the rows, then let whatever is due happen; between two steps."""
        self._hand_over()
        self.trunk.follow()  # a callback may have added parameters
        self.observer.boundary(self.trunk.step)
        self.schedule.charge(self.batches, self.observer.charged_steps)

    def _note(self, block: Block) -> None:
        # Plain floats: a block is short, and each numpy function is called out of a cold cache.
        losses: list[float] = block.rows[:, block.names.index("loss")].tolist()
        applied: list[float] = block.rows[:, block.names.index("applied")].tolist()
        self._losses.add(losses if all(applied) else list(itertools.compress(losses, applied)))
        if not all(map(math.isfinite, losses)) and not self._warned and not self.observer.guard:
            self._warn(block, next(i for i, loss in enumerate(losses) if not math.isfinite(loss)))
        self._console.step(self.trunk.step, total=_shown(self.observer.limit), loss=losses[-1])

    def _warn(self, block: Block, row: int) -> None:
        self._warned = True
        warn_user(
            f"the training loss is not finite from step {int(block.rows[row, 0])} on; the run goes on as it was asked to "
            '(automode="act" would keep such steps from the weights)',
            RuntimeWarning,
        )

    def _end_epoch(self, complete: bool) -> None:
        self.boundary()
        if complete:
            self.schedule.after_epoch(self.batches, self.observer.charged_steps)
        every = self.plan.validate_every
        train_loss, history = self._losses.take(), self.history
        self.companions.epoch_trained(train_loss)
        found = self._validate() if complete and every and (self.epoch + 1) % every == 0 else None
        history.epoch.append(self.epoch)
        history.step.append(self.trunk.step)
        history.train_loss.append(train_loss)
        history.learning_rate.append(self.trunk.rates()[0])
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
        self._validated_at = self.trunk.step
        self._console.validation(found.loss)
        self.observer.validated(self.trunk.step, found.scores)
        self.schedule.validated(found.loss)
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
        self.trunk = trunk
        self._parameters: dict[str, Any] | None = None

    def __call__(self, averages: TrajectoryAverages, step: int) -> None:
        if self._parameters is None:
            self._parameters = trainable(self.trunk.model)
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
