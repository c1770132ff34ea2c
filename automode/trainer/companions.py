"""What goes along with a loop and decides nothing of it: callbacks, and the table of what each epoch came to.

A run in which nobody listens pays nothing for it at a step: its training step and its steps are handed through as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

from automode.trainer.callback_view import RunView
from automode.trainer.callbacks import Callbacks
from automode.trainer.epoch_table import EpochTable
from automode.trainer.loggers import Loggers, parameters_of
from automode.trainer.observation_block import Block
from automode.trainer.run_metrics import RunMetrics
from automode.trainer.run_parts import RunParts
from automode.trainer.steps import Taken
from automode.trainer.validation import ValidationResult


class Listened(Protocol):
    """Trains on one batch; see :class:`automode.trainer.loop.Train`."""

    def __call__(self, batch: Any, epoch: int) -> Taken:
        """Return what the step came to."""
        ...

    def close(self) -> None:
        """Leave the optimizer as it was."""
        ...

    @property
    def began(self) -> bool:
        """Whether the optimizer has begun to write."""
        ...

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides the trunk."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        ...


class ListenedStep:
    """A training step that says when it begins, and remembers what it came to.

    Args:
        inner: The step.
        starts: Called with each batch before it is trained on.
        shown: Called with the outputs and targets of each step that was not kept from the weights.

    Attributes:
        batch: The batch of the latest step.
        taken: What it came to.
    """

    def __init__(
        self, inner: Listened, starts: Callable[[Any], None], shown: Callable[[Any, Any], None]
    ) -> None:
        self._inner = inner
        self._shown = shown
        self._starts = starts
        self.batch: Any = None
        self.taken: Taken | None = None
        self.close, self.state, self.load = inner.close, inner.state, inner.load

    @property
    def began(self) -> bool:
        """As of the step."""
        return self._inner.began

    def __call__(self, batch: Any, epoch: int) -> Taken:
        """Train on one batch."""
        self._starts(batch)
        self.batch = batch
        taken = self.taken = self._inner(batch, epoch)
        if taken.applied:
            self._shown(taken.outputs, taken.targets)
        return taken


class Companions:
    """Callbacks and the table of epochs, as the loop calls them.

    Args:
        callbacks: The user's.
        view: What they are given of the run.
        table: What each epoch came to, for the session.
        parts: The run.
        metrics: The user's.
        loggers: Where scalars go besides the session.

    Attributes:
        numbers: The user's metrics of the latest epoch, by name.
        see: Shown outputs and targets of held-out batches; None: nobody looks.
        block: Called with each block of rows; None: nobody listens.
    """

    def __init__(
        self,
        callbacks: Callbacks,
        view: RunView,
        table: EpochTable,
        parts: RunParts,
        metrics: RunMetrics,
        loggers: Loggers,
    ) -> None:
        self._callbacks = callbacks
        self._view = view
        self._table = table
        self._cursor = parts.cursor
        self._metrics = metrics
        self._loggers = loggers
        self._parts = parts
        if loggers:
            table.wrote = loggers.epoch
        self.numbers: dict[str, float] = {}
        self.see: Callable[[Any, Any], None] | None = metrics.held_out if metrics else None
        self._step: ListenedStep | None = None
        self._handles: list[Any] = []
        for hook in callbacks.of("on_before_optimizer_step"):
            self._handles.append(parts.trunk.optimizer.register_step_pre_hook(_before_step(hook, view)))
        self.block: Callable[[Block], None] | None = self._block if callbacks.all or loggers else None

    # The run.

    def begin(self) -> None:
        """``fit`` begins."""
        self._call("setup", "fit")

    def start(self) -> None:
        """Everything is in its place, what was stored is put back, and the first step is next."""
        step, row = self._parts.trunk.step, self._parts.probe.rows
        self._loggers.begin(parameters_of(self._parts), step=step, row=row)
        self._call("on_fit_start")
        self._call("on_train_start")

    def end(self) -> None:
        """The last step was taken, and everything is validated."""
        self._table.write()
        self._call("on_train_end")
        self._call("on_fit_end")
        self._closing()

    def failed(self, error: BaseException) -> None:
        """An exception leaves ``fit``; one of a callback's own is noted on it."""
        try:
            self._table.write()
            self._call("on_exception", error)
            self._loggers.end("failed" if isinstance(error, Exception) else "interrupted")
            self._closing()
        except Exception as second:
            error.add_note(f"what goes along with the run failed as well: {type(second).__name__}: {second}")

    def close(self) -> None:
        """Leave the user's objects as they were."""
        for handle in self._handles:
            handle.remove()
        self._call("teardown", "fit")

    def left(self) -> None:
        """The run goes on from another state, with companions of its own."""
        self._loggers.leave()

    def finished(self) -> None:
        """The run is over, its test included."""
        self._loggers.end("success")

    def tests(self) -> None:
        """The test set is about to be read."""
        self._call("on_test_start")
        self._call("on_test_epoch_start")

    def tested(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The test came to this; returns it with the user's metrics."""
        found = {**metrics, **(self._metrics.take_held_out("") if self._metrics else {})}
        numbers = {f"test_{name}": value for name, value in found.items()}
        self._show(numbers)
        self._loggers.epoch({"step": float(self._parts.trunk.step), **numbers})
        self._call("on_test_epoch_end")
        self._call("on_test_end")
        return found

    # The loop.

    def listening(self, train: Listened) -> Listened:
        """Give the training step, with an ear on it where somebody wants to hear of every batch."""
        called = self._callbacks.of("on_train_batch_start") or self._callbacks.of("on_train_batch_end")
        if not (called or self._metrics):
            return train
        self._step = ListenedStep(train, self._batch_start, self._metrics.trained)
        return self._step

    def heard(self, steps: Generator[int, None, bool]) -> Generator[int, None, bool]:
        """Give the steps of an epoch; the end of each is heard of where somebody wants to."""
        if self._step is None or not self._callbacks.of("on_train_batch_end"):
            return steps
        return self._ends(steps, self._step)

    def _ends(self, steps: Generator[int, None, bool], heard: ListenedStep) -> Generator[int, None, bool]:
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return bool(end.value)
            assert heard.taken is not None
            outputs = {"loss": heard.taken.loss}
            self._call("on_train_batch_end", outputs, heard.batch, self._cursor.read - 1)
            yield step

    def epoch_begins(self, *, anew: bool) -> None:
        """An epoch begins, or (``anew`` False) the rest of one that was cut."""
        self._table.begins()
        if anew:
            self._call("on_train_epoch_start")

    def epoch_trained(self, train_loss: float) -> None:
        """The last batch of an epoch, or of the run, was trained on."""
        self.numbers = self._metrics.take_trained()
        self._table.trained(train_loss)
        self._table.note(self.numbers)
        self._show({"train_loss": train_loss, **self.numbers})

    def validation_begins(self) -> None:
        """The validation set is about to be read."""
        self._call("on_validation_start")
        self._call("on_validation_epoch_start")

    def validated(self, found: ValidationResult) -> None:
        """Validation came to this."""
        numbers = {"val_loss": found.loss, "val_metric": found.metric}
        numbers |= {f"val_{name}": value for name, value in found.metrics.items()}
        if self._metrics:
            own = self._metrics.take_held_out("val_")
            self.numbers |= own
            numbers |= own
        self._table.note(numbers)
        self._show(numbers)
        self._call("on_validation_epoch_end")
        self._call("on_validation_end")

    def epoch_over(self, learning_rate: float) -> None:
        """An epoch is over, its validation included."""
        self._table.over(learning_rate)
        self._call("on_train_epoch_end")

    # A run that is cut, and taken up again.

    def state(self) -> dict[str, Any]:
        """What is kept with the run's state, for :meth:`load`."""
        return {
            "callbacks": self._callbacks.state(),
            "table": self._table.state(),
            "metrics": self._metrics.state(),
            "numbers": dict(self.numbers),
        }

    def lost(self) -> list[str]:
        """What could not be kept when :meth:`state` was called last, in words."""
        return [*self._callbacks.lost(), *self._metrics.lost()]

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Put back what :meth:`state` gave; returns what could not be, in words."""
        self._table.load(state["table"])
        self.numbers = dict(state["numbers"])
        return [*self._callbacks.load(state["callbacks"]), *self._metrics.load(state["metrics"])]

    def _closing(self) -> None:
        if self._parts.closing is not None:
            self._parts.closing()

    def _call(self, hook: str, *given: Any) -> None:
        self._callbacks.call(hook, self._view, self._view.model, *given)

    def _show(self, numbers: Mapping[str, float]) -> None:
        """Let callbacks see numbers; where there are none, nobody has the view."""
        if self._callbacks.all:
            self._view.note(numbers)

    def _batch_start(self, batch: Any) -> None:
        self._call("on_train_batch_start", batch, self._cursor.read)

    def _block(self, block: Block) -> None:
        self._loggers.block(block)
        self._show({"loss": float(block.rows[-1, block.names.index("loss")])})


def _before_step(hook: Callable[..., Any], view: RunView) -> Callable[..., None]:
    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        hook(view, view.model, optimizer)

    return before
