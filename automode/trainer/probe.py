"""The probe: the one place where training's tensors become floats.

A step costs the loop a few references: :meth:`Probe.record` reads a scalar or two and keeps the detached outputs and
targets. :meth:`Probe.drain` turns a block of steps into rows of floats, with one transfer from an accelerator. Per-sample
losses and margins are taken for many steps in one call, later still, and entered in the sample ledger
(:mod:`automode.trainer.ledger_feed`, where it stands why keeping references is safe). Reading :attr:`Probe.ledger` brings
it up to date first, so that what it says does not depend on timing.

Observing changes nothing: no random number is drawn, no tensor of the user's is written, and a problem with per-sample
losses ends them with a reason (:attr:`Probe.reason`) and not the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from automode.errors import DataError
from automode.trainer.gradient_norms import HeldGradients, total_norm
from automode.trainer.ids import IdSource
from automode.trainer.ledger_feed import LedgerFeed
from automode.trainer.observation_block import Block, OpenRows
from automode.trainer.per_sample import PerSampleLoss
from automode.trainer.sample_ledger import SampleLedger


class Probe:
    """Collects what a training loop shows, and turns it into floats block by block.

    Args:
        parameters: Parameters whose gradients count for the norm.
        per_sample: The loss's per-sample twin; None: no per-sample losses.
        id_source: The loader that training iterates, which maps ids; None: no sample ids.
        ledger: Where visits are entered; None: nowhere.
        capacity: Rows after which a block is full.
        max_bytes: Bytes of outputs and targets kept after which they are used.
        clock: Gives the time of a row, in seconds.

    Attributes:
        rows: Rows recorded since the start, drained or not.
        clock: As given.
        take: Takes the norm of the gradients of a row, by its number; NaN where they are held until the drain.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        per_sample: PerSampleLoss | None = None,
        id_source: IdSource | None = None,
        ledger: SampleLedger | None = None,
        *,
        capacity: int = 256,
        max_bytes: int = 4 << 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.rows = 0
        self._gradients = HeldGradients(parameters)
        self.take = self._gradients.take
        self._feed: LedgerFeed | None = None
        if per_sample is not None and id_source is not None and ledger is not None:
            self._feed = LedgerFeed(per_sample, id_source, ledger, max_bytes)
        self._capacity, self.clock = capacity, clock
        self._open = OpenRows()

    @property
    def reason(self) -> str | None:
        """Why the sample ledger is not fed; None while it is."""
        return "per-sample losses were not asked for" if self._feed is None else self._feed.reason

    @property
    def feed(self) -> LedgerFeed | None:
        """Where outputs and targets are kept for the ledger; None where there is none."""
        return self._feed

    def opened(self, rates: int) -> OpenRows:
        """Where rows without metrics may be appended, until the next :meth:`drain`; whoever does counts them in :attr:`rows` too.

        Args:
            rates: Learning rates of a row.
        """
        self._open.shape(rates)
        return self._open

    @property
    def overwritten(self) -> int:
        """Samples' visits left out of the ledger because the model wrote to their outputs before they were used."""
        return 0 if self._feed is None else self._feed.overwritten

    @property
    def keeps_ledger(self) -> bool:
        """Whether there is a sample ledger; asking does not bring it up to date."""
        return self._feed is not None

    @property
    def ledger(self) -> SampleLedger | None:
        """The sample ledger, brought up to date with every step recorded."""
        if self._feed is None:
            return None
        self._feed.flush()
        return self._feed.ledger

    def mute(self, ids: npt.NDArray[np.int64]) -> None:
        """Enter no more of what these samples lose: the ledger speaks of the labels that the data have, and they have others.

        Args:
            ids: Root ids; they take the place of those of the last call.
        """
        if self._feed is None or np.array_equal(ids, self._feed.muted):
            return
        self._feed.flush()
        self._feed.muted = ids

    def record(
        self,
        step: int,
        loss: Tensor | float,
        grad_norm: float | Tensor | Sequence[Tensor] | None,
        lr: tuple[float, ...],
        applied: bool,
        outputs: Any = None,
        targets: Any = None,
        ids: Sequence[Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> bool:
        """Note one attempted step; call it after the backward pass and before gradients are reset.

        Args:
            step: Completed optimizer steps, this one included if it was applied.
            loss: The training loss, a scalar.
            grad_norm: Norm of all gradients, or those of the single ones (``grad_norms``); None: take it from the
                parameters, which is cheapest.
            lr: Learning rate of each parameter group.
            applied: Whether the optimizer stepped.
            outputs: What the loss was given, samples along the first dimension; None: no per-sample losses here.
            targets: Targets of the same samples.
            ids: What the loader's ``ids_of_batch`` gave.
            metrics: Numbers or one-element tensors by name; another set of names starts a new block.

        Returns:
            Whether the block is full and :meth:`drain` is due.

        Raises:
            DataError: A metric is not a number.
        """
        now = self.clock()
        opened = self._open
        # The two quick cases stand first: a CPU scalar is read in less time than it takes to keep it.
        if type(loss) is Tensor and loss.is_cpu:
            value: float | Tensor = loss.item()
        else:
            value = self._number(loss)
        norm = self.take(self.rows) if grad_norm is None else self._norm(grad_norm)
        if type(norm) is not float:
            norm = self._number(norm)
        if not metrics and opened.plain == len(lr) and type(value) is float and type(norm) is float:
            opened.values.extend((step, now, value, norm, *lr, applied, 0.0))
            opened.count += 1
        else:
            opened.add((step, now, value, norm), lr, applied, self._metrics(metrics) if metrics else {})
        self.rows += 1
        feed = self._feed
        if feed is None or ids is None or outputs is None:
            return opened.count >= self._capacity
        feed.keep(outputs, targets, ids, value, loss)
        return opened.count >= self._capacity or len(feed.visits) >= feed.max_visits

    def gradients(self) -> float | Tensor:
        """Take the gradients' norm of the step that :meth:`record` is called for next, to be given to it: NaN where they are held."""
        return self.take(self.rows)

    def visit(self, outputs: Any, targets: Any, ids: Sequence[Any] | None, loss: Tensor | float) -> None:
        """Note a part of the step that :meth:`record` is called for next: one of several batches that it adds up.

        Args:
            outputs: As for :meth:`record`, and so are the others.
            targets: Likewise.
            ids: Likewise.
            loss: The loss of this part.
        """
        if self._feed is not None and ids is not None and outputs is not None:
            self._feed.keep(outputs, targets, ids, self._number(loss), loss)

    def drain(self) -> list[Block]:
        """Turn everything recorded since the last drain into floats.

        Returns:
            Blocks in order: none where nothing was recorded, more than one where the names of metrics changed.
        """
        opened = self._open
        if not opened.count:
            return []
        blocks = opened.take(self.rows - opened.count, self._gradients.close())
        feed = self._feed
        # Never because time has passed: how visits are grouped shows in the ledger's last digits, and equal runs are to be equal.
        if feed is not None and len(feed.visits) >= feed.max_visits:
            feed.flush()
        return blocks

    def state(self) -> dict[str, Any]:
        """Everything but rows: those must have been drained. Plain data and tensors, for :meth:`load`."""
        assert not self._open.count
        return {
            "rows": self.rows,
            "gradients": self._gradients.state(),
            "feed": None if self._feed is None else self._feed.state(),
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state` gave.

        Args:
            state: As given; its tensors may be on the CPU.
            device: Where the run trains.

        Raises:
            DataError: The sample ledger is of another dataset.
        """
        self.rows = int(state["rows"])
        self._gradients.load(state["gradients"])
        if self._feed is not None and state["feed"] is not None:
            self._feed.load(state["feed"], device)

    def _number(self, scalar: Any) -> float | Tensor:
        """Read a number; of a scalar on a device take a copy, which the drain reads together with others."""
        if not isinstance(scalar, Tensor):
            return float(scalar)
        if scalar.is_cpu:
            return float(scalar.item())
        # A copy, since the user may go on adding to the tensor.
        return scalar.detach().reshape(()).to(torch.float64, copy=True)

    def _norm(self, norm: float | Tensor | Sequence[Tensor]) -> float | Tensor:
        return total_norm(norm) if isinstance(norm, Sequence) else norm

    def _metrics(self, metrics: Mapping[str, Any]) -> dict[str, float | Tensor]:
        values = {}
        for name, value in metrics.items():
            try:
                values[name] = self._number(value)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise DataError(
                    f"the metric {name!r} is {what}, but must be a number or a tensor of one element"
                ) from error
        return values
