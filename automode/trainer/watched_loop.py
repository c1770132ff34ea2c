"""Our half of a loop that a person keeps writing: rows out of its steps, and whatever is due between two of them.

A row is one ``with watch.step()`` block, or one ``observe``. It is complete when the block ends, or when the optimizer has
stepped and the loss is known, whichever order they come in; only then, between two steps, may anything be done to the run.
Everything that can wait is done at boundaries that follow from the number of rows alone, as in :mod:`automode.trainer.loop`.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from automode.errors import UsageError
from automode.trainer.agenda import ROWS_SECONDS, TICK_SECONDS
from automode.trainer.assembly import open_driver
from automode.trainer.given_ids import root_ids_of
from automode.trainer.gradient_norms import grad_norms, total_norm
from automode.trainer.random_state import forked_rng
from automode.trainer.recording_sampler import RecordedIterator
from automode.trainer.run_parts import RunParts
from automode.trainer.step_hooks import Norm, StepHooks
from automode.trainer.steps import OVERFLOWED, checked_names
from automode.trainer.trunk import trainable
from automode.trainer.user_warning import tell_user
from automode.trainer.watch_orders import WatchedOrders
from automode.trainer.watched_step import number_of, quick_row

_ENDED_BY_ERROR = "an exception has ended the session {path} at step {step}, so nothing is watched any more; the loop goes on as it is written"


class WatchedLoop:
    """Follows a loop through its optimizer's hooks and what it is told.

    Args:
        parts: The run.
        scaler: The loop's gradient scaler, or None.

    Attributes:
        parts: As given.
        driver: Decides and acts.
        ended: Why the session ended; None while it goes on.
        hooks: The optimizer's.
        scaled: Whether there is a scaler.
        skipping: Whether the guard left out the step before.
        in_block: Whether a block has begun and not ended.
        losses: Those told of the row that is open.
        seen: Outputs, targets and ids told with them.
        metrics: More numbers of that row.
        ids: Of the batch that :meth:`batches` gave last.
        rows: How many are complete.
        counted: Steps of the optimizer that these came from.
        stride: Rows from one boundary to the next.
        due: When the clock lets rows be handed over.
        row: Ends a block and writes its row where that is a plain one; None: :meth:`end` does.
    """

    def __init__(self, parts: RunParts, scaler: Any) -> None:
        self.parts = parts
        self._parameters = trainable(parts.trunk.model)
        self.driver = open_driver(parts)
        self.ended: str | None = None
        self._trunk, self._probe = parts.trunk, parts.probe
        self._scaler = scaler
        self._orders = WatchedOrders(parts, self.driver)
        self.scaled = scaler is not None
        self.hooks = StepHooks(self._trunk, self.driver, take=self._probe.gradients, clips=True)
        self.hooks.loss, self.hooks.stepped = self._loss_so_far, self.stepped
        self.row: Callable[[], bool] | None = None
        self._total = parts.plan.total
        self._process = os.getpid()
        self.clock = time.perf_counter
        self.due = self._rows_due = self.clock() + TICK_SECONDS
        self._failed = self._told = self._looked = self.skipping = self.in_block = False
        self.stride = self.driver.stride
        self.rows = self.counted = 0
        self.ids: Any = None
        self._pass: object = None
        self.losses: list[Any] = []
        self.seen: list[tuple[Any, Any, Any]] = []
        self.metrics: dict[str, Any] = {}
        self._names: tuple[str, ...] = ()

    # What the loop asks.

    @property
    def step(self) -> int:
        """Rows that reached the weights, or did not miss them: steps in the sense of ``total_steps``."""
        return self._trunk.step

    @property
    def why_stop(self) -> str | None:
        """Why the loop should end now; None while it should go on."""
        driver = self.driver
        if driver.stop_requested is not None:
            return driver.stop_requested
        if self._total is not None and driver.limit < self._total and self._trunk.step >= driver.limit:
            return "budget"
        return None

    @property
    def skipped(self) -> str:
        """Why the optimizer's step in the block that runs was dropped; empty where it was not."""
        return self.hooks.skipped

    # What the loop tells.

    def ready(self) -> None:
        """Know that the gradients are there, where the optimizer makes them itself by calling a closure."""
        if self.ended is None:
            self.hooks.ready()

    def begin(self) -> None:
        """Know that a block begins."""
        if self.ended is not None and self._is_over():
            return
        if self.in_block:
            raise UsageError(
                "a step begins inside of another one; end one `with watch.step()` before the next"
            )
        if self.losses:
            self._complete()  # of an `observe` before
        self.in_block = True
        self.hooks.stepped = None
        if not self._looked:
            self._looked = True
            self.row = quick_row(self)

    def end(self, *, unseen: bool = False) -> None:
        """Know that the block is over.

        Args:
            unseen: Whether it may have stepped without a loss that was told.

        Raises:
            UsageError: It has, and may not.
        """
        if self.ended is not None:
            return
        self.in_block, self.hooks.stepped = False, self.stepped
        if self.losses:
            self._complete()
        elif self.hooks.steps > self.counted:
            self.counted = self.hooks.steps
            self.hooks.begin()
            if unseen:
                return
            raise UsageError(
                "the optimizer stepped in this block, and its loss was not told; call s.loss(loss) before the block ends"
            )

    def tell(
        self,
        loss: Tensor | float,
        outputs: Any = None,
        targets: Any = None,
        ids: Any = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a loss, in a block or without one."""
        if self.ended is not None and self._is_over():
            return
        if not self.in_block and self.losses:
            self._complete()  # the optimizer did not step on the loss before: it accumulates
        if type(loss) is not Tensor:
            loss = number_of(loss)
        elif loss.numel() != 1 or loss.is_complex():
            raise UsageError(
                f"the loss is a tensor of shape {tuple(loss.shape)} ({loss.dtype}), but must have one element, a real number; reduce "
                "it with .mean() or .sum()"
            )
        self.losses.append(loss)
        if outputs is not None:
            self.seen.append((outputs, targets, self.ids if ids is None else root_ids_of(ids)))
        if metrics:
            if not isinstance(metrics, Mapping):
                raise UsageError(
                    f"metrics must be a mapping of names to numbers, got {type(metrics).__name__}"
                )
            if tuple(metrics) != self._names:
                self._names = checked_names(tuple(metrics))
            self.metrics |= metrics
        if self.in_block:
            return
        if self.hooks.steps > self.counted:
            self._complete()
        elif self._scaler is None:
            self.hooks.norm = self._probe.gradients()

    def batches(self) -> Iterator[Any]:
        """Give the batches of the training loader, and remember which samples each holds."""
        loader, pass_ = self.parts.loader, object()
        self._pass = pass_
        try:
            passed = iter(loader)
            recorded = passed if type(passed) is RecordedIterator else None
            if recorded is not None:
                recorded.packs = self._probe.feed is not None
            for batch in passed if recorded is None else recorded.batches:
                if self._pass is not pass_:
                    raise UsageError(
                        "batches() was begun again before this pass had ended, so that nobody knows whose samples a step is shown; "
                        "go through the loader itself beside it"
                    )
                self.ids = loader.ids_of_batch() if recorded is None else recorded.noted()
                yield batch
        finally:
            if (
                self._pass is pass_
            ):  # also where the loop was left early: what comes then is none of these samples
                self.ids = None

    def validate(self) -> Mapping[str, float]:
        """Look at the held-out data once; the metrics by name."""
        validation = self.parts.validation
        if validation is None:
            raise UsageError("there is nothing to validate on; give watch a val=")
        if self.in_block:
            raise UsageError("validate between two steps, and not inside of `with watch.step()`")
        with self._undisturbed():
            found = validation.run()
        if self.ended is None:
            self.hand_over()
            self.driver.validated(self._trunk.step, found.scores)
        return {**found.metrics, **{f"slice {name}": value for name, value in found.slices.items()}}

    # The end.

    def close(self, why: str) -> None:
        """End the session in order: what waits for the end is done, finishing merges among it. Twice does no harm."""
        if self.ended is not None or os.getpid() != self._process:
            return
        try:
            if self.losses:
                self.in_block = False
                self._complete()
            self.boundary()
        except BaseException as error:
            self.abort(error)
            raise
        self.ended = why
        self.hooks.close()
        try:
            with self._undisturbed(), forked_rng():
                self.driver.finish(self.step, self.driver.stop_requested or why, early=bool(self._total))
            self.parts.console.event(f"session: {self.parts.session_path}")
        finally:
            self.parts.console.close()

    def abort(self, error: BaseException) -> None:
        """End the session because of an exception, which is left alone but for a note where something else fails too."""
        if self.ended is not None or os.getpid() != self._process:
            return
        self.in_block = False
        try:
            if self.losses and self.hooks.steps > self.counted:
                self._note()
            self.hand_over()
        except Exception as second:
            error.add_note(f"the last rows could not be recorded: {type(second).__name__}: {second}")
        self.ended = f"{type(error).__name__}: {error}"
        self._failed = True
        self.hooks.close()
        with forked_rng():
            self.driver.abort(self._trunk.step, error)
        self.parts.console.close()

    def _is_over(self) -> bool:
        """Whether to let a loop go on whose session has ended: one that was closed is not told anything any more."""
        if not self._failed:
            raise UsageError(
                f"this watch was closed at step {self._trunk.step}; make another one to watch on"
            )
        if not self._told:
            self._told = True
            tell_user(
                _ENDED_BY_ERROR.format(path=self.parts.session_path, step=self._trunk.step), RuntimeWarning
            )
        return True

    # A row.

    def _loss_so_far(self) -> float | None:
        if not self.losses:
            return None
        loss = self._loss()
        return loss.item() if isinstance(loss, Tensor) else loss

    def stepped(self) -> None:
        """Know that the optimizer has stepped outside of a block."""
        if self.losses:
            self._complete()

    def _loss(self) -> Tensor | float:
        losses = self.losses
        if len(losses) == 1:
            return losses[0]  # type: ignore[no-any-return]
        return torch.stack([torch.as_tensor(loss).detach().double().reshape(()) for loss in losses]).mean()

    def _complete(self) -> None:
        """Note the row, and let happen what is due after it."""
        full, why = self._note()
        turn = self.rows % self.stride == 0
        driver = self.driver
        if why and driver.guard:
            self.skipping = True
            self.hand_over()
            driver.skipped(self._trunk.step, why)
            turn = True
        if turn or driver.busy:
            self.boundary()
        elif full or self.clock() >= self.due:
            self.between(full)

    def _note(self) -> tuple[bool, str]:
        """Write the row down. Returns whether rows are to be handed over, and why the step was left out."""
        hooks, trunk, probe = self.hooks, self._trunk, self._probe
        stepped, why, norm = hooks.steps > self.counted, hooks.skipped, hooks.norm
        if hooks.due:
            why = why or OVERFLOWED
        elif norm is None:
            norm, why = self._accumulated()
        rates = hooks.rates if stepped else trunk.rates()
        applied = not why
        losses, seen, metrics = self.losses, self.seen, self.metrics
        loss = losses[0] if len(losses) == 1 else self._loss()
        self.losses, self.seen, self.metrics = [], [], {}
        outputs = targets = ids = None
        if len(seen) == 1 == len(losses):
            outputs, targets, ids = seen[0]
        elif len(seen) == len(losses):
            for part, visit in zip(losses, seen, strict=True):
                probe.visit(*visit, part)
        full = probe.record(
            trunk.step + applied, loss, norm, rates, applied, outputs, targets, ids, metrics or None
        )
        self.counted = hooks.steps
        self.rows += 1
        hooks.begin()
        if applied:
            trunk.step += 1
            if self.skipping:
                self.skipping = False
                self.driver.stepped()
        if stepped and applied and trunk.averages is not None:
            trunk.averages.update(self._parameters, trunk.step)
        return full, why

    def _accumulated(self) -> tuple[Norm, str]:
        """Take the norm where the optimizer did not step: gradients accumulate, or the scaler found that they overflowed."""
        if self._scaler is None:
            return self._probe.gradients(), ""
        norm = float(total_norm(grad_norms(self._trunk.parameters)))
        scale = float(self._scaler.get_scale())
        return norm / scale, "" if math.isfinite(norm) else OVERFLOWED

    # Between two steps.

    def between(self, full: bool) -> None:
        """Because time has passed, hand over the rows that are due (``full``: all); act only where somebody asks for it."""
        now = self.clock()
        if full or now >= self._rows_due:
            self.hand_over()
        self.due = now + TICK_SECONDS
        if self.driver.tick(self._trunk.step) or self._orders:
            self.boundary()

    def hand_over(self) -> None:
        """Hand the rows to the driver; what holds for the next is looked up anew."""
        self.row, self.hooks.held, self._looked = None, None, False
        self.parts.loader.order_up()
        for block in self._probe.drain():
            self.driver.block(block)
        now = self.clock()
        self.due, self._rows_due = now + TICK_SECONDS, now + ROWS_SECONDS

    def boundary(self) -> None:
        """Let whatever is due happen."""
        with self._undisturbed():
            self.hand_over()
            self.driver.boundary(self._trunk.step)
            self._orders.follow()

    def _undisturbed(self) -> AbstractContextManager[Any]:
        """Whatever context the loop's step stands in must not reach what is done between two steps."""
        stack = contextlib.ExitStack()
        device = self._trunk.device.type
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        return stack
