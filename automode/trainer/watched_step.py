"""One step of a watched loop as a context manager, and the row that most steps come to in one piece.

What is done at a step is little, and most of its price is in calling: see :mod:`automode.trainer.stretches`. So the row of the step that
most loops take most of the time is written in one function (:func:`quick_row`): one loss on the CPU, one parameter group, no gradient
scaler, nothing guarded, clipped or averaged. It writes what :meth:`WatchedLoop.end` writes, in the same order, and leaves to that
whatever is otherwise. What it relies on is looked up anew wherever rows are handed over, for only there can it change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from automode.errors import UsageError
from automode.trainer.given_ids import root_ids_of

if TYPE_CHECKING:
    from automode.trainer.watched_loop import WatchedLoop


class WatchedStep:
    """One step of a watched loop, as a context manager; :meth:`Watch.step` gives it.

    An exception that leaves the block ends the session, which says so, and goes on its way.
    """

    __slots__ = ("_loop",)

    def __init__(self, loop: WatchedLoop) -> None:
        self._loop = loop

    def __enter__(self) -> Self:
        loop = self._loop
        if loop.row is None or loop.in_block or loop.losses:
            loop.begin()
        else:
            loop.in_block, loop.hooks.stepped = True, None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = self._loop
        if error is not None:
            loop.abort(error)
        elif loop.row is None or not loop.row():
            loop.end()

    def loss(
        self,
        loss: Tensor | float,
        outputs: Any = None,
        targets: Any = None,
        ids: Any = None,
        *,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell the step's loss; of a step that adds up several batches, the loss of each.

        Args:
            loss: What the optimizer minimises: a number, or a tensor with one element. Of one batch of several, its own loss
                before it is divided by their number; the row holds their mean.
            outputs: What the loss was given, samples along the first dimension; with ``targets``, sample ids and the
                ``loss_fn`` of :func:`watch` they give per-sample losses.
            targets: Targets of the same samples.
            ids: Positions of the samples in the dataset under every ``Subset``; :meth:`Watch.batches` gives them by itself.
            metrics: More numbers of this step by name, each a column of the session's frame.

        Raises:
            UsageError: The loss is no scalar, or a metric has a name that automode writes itself.
            DataError: A metric is not a number.
        """
        loop = self._loop
        if loop.row is None or not loop.in_block or metrics or type(loss) is not Tensor or loss.ndim:
            loop.tell(loss, outputs, targets, ids, metrics)
        elif not loss.is_floating_point():
            loop.tell(loss, outputs, targets, ids)
        else:
            loop.losses.append(loss)
            if outputs is not None:
                loop.seen.append((outputs, targets, loop.ids if ids is None else root_ids_of(ids)))

    @property
    def skipped(self) -> str:
        """Why the optimizer's step in the block that runs was dropped (its gradients are None then); empty where it was not."""
        return self._loop.skipped

    @property
    def stop(self) -> bool:
        """Whether the loop should end after this step."""
        return self._loop.why_stop is not None


def quick_row(loop: WatchedLoop) -> Callable[[], bool] | None:
    """What ends a block and writes its row, until rows are handed over.

    Args:
        loop: Whose rows they are.

    Returns:
        A function that returns False, with nothing done, where the block has to be ended by :meth:`WatchedLoop.end`; None: all of them.
    """
    trunk, probe, hooks, driver = loop.parts.trunk, loop.parts.probe, loop.hooks, loop.driver
    if (
        loop.scaled
        or loop.skipping
        or driver.guard
        or driver.busy
        or trunk.clip_norm is not None
        or trunk.averages is not None
        or trunk.device.type != "cpu"
        or len(trunk.optimizer.param_groups) != 1
    ):
        return None
    opened, feed, clock, stride = probe.opened(1), probe.feed, probe.clock, loop.stride
    hooks.held = probe

    def row() -> bool:
        losses, norm, seen = loop.losses, hooks.norm, loop.seen
        if (
            len(losses) != 1
            or type(norm) is not float
            or hooks.steps != loop.counted + 1
            or hooks.due
            or loop.metrics
            or opened.plain != 1
            or len(hooks.rates) != 1
            or type(losses[0]) is not Tensor
            or not losses[0].is_cpu
        ):
            return False
        loop.in_block, hooks.stepped = False, loop.stepped
        loss = losses[0]
        value, now = loss.item(), clock()
        losses.clear()
        step = trunk.step + 1
        opened.values.extend((step, now, value, norm, hooks.rates[0], 1.0, 0.0))
        opened.count += 1
        probe.rows += 1
        full = False
        if seen:
            outputs, targets, ids = seen[0]
            seen.clear()
            if feed is not None and ids is not None:
                feed.keep(outputs, targets, ids, value, loss)
                full = len(feed.visits) >= feed.max_visits
        loop.counted = hooks.steps
        loop.rows = rows = loop.rows + 1
        hooks.began, hooks.norm = False, None
        trunk.step = step
        if rows % stride == 0:
            loop.boundary()
        elif full or now >= loop.due:
            loop.between(full)
        return True

    return row


def number_of(loss: Any) -> Tensor | float:
    """Take a loss that is a number, or leave a tensor as it is.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(loss, Tensor):
        return loss
    try:
        return float(loss)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(
            f"the loss is a {type(loss).__name__}, but must be a number or a tensor with one element"
        ) from None
