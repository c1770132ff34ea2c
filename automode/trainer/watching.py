"""``automode.watch``: a loop that a person keeps writing gains a session, plan cards and replay."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from automode.errors import UsageError
from automode.planner.events import Mode
from automode.planner.policy import Policy
from automode.session import CardRow, Session
from automode.trainer.card_callbacks import CardCallback
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.settings import Automode
from automode.trainer.watch_parts import WatchRequest
from automode.trainer.watched_loop import WatchedLoop
from automode.trainer.watched_step import WatchedStep

_watched: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[WatchedLoop]] = (
    weakref.WeakKeyDictionary()
)


class NotClosed(SystemExit):
    """Stands in the log where a loop ended and nobody said so; never raised."""


class Watch:
    """A loop being watched; :func:`watch` makes it. As a context manager it is closed at the block's end.

    Attributes:
        loop: What is told and asked, for whoever drives it otherwise than by :meth:`step` and :meth:`observe`.
    """

    def __init__(self, loop: WatchedLoop) -> None:
        self.loop = loop
        self._step = WatchedStep(loop)
        # At the interpreter's exit too, and without a reference to this object.
        self._finalizer = weakref.finalize(self, _left_open, loop)

    def step(self) -> WatchedStep:
        """Stand around one step: forward, loss, backward, ``optimizer.step()``."""
        return self._step

    def observe(
        self,
        loss: Tensor | float,
        outputs: Any = None,
        targets: Any = None,
        ids: Any = None,
        *,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell a step's loss where there is no ``with watch.step()``: after ``backward()``, before or after ``optimizer.step()``.

        Args:
            loss: As for :meth:`WatchedStep.loss`, and so are the others.
            outputs: Likewise.
            targets: Likewise.
            ids: Likewise.
            metrics: Likewise.

        Raises:
            UsageError: As :meth:`WatchedStep.loss`.
            DataError: Likewise.
        """
        self.loop.tell(loss, outputs, targets, ids, metrics)

    def batches(self) -> Iterator[Any]:
        """Go through the training loader once, as ``for batch in loader`` does, and know which samples each batch holds.

        Raises:
            UsageError: :func:`watch` was given no ``train``.
        """
        if self.loop.parts.probe.keeps_ledger or self.loop.parts.loader.recorded:
            return self.loop.batches()
        raise UsageError("there are no batches to go through: give watch the training loader as train=")

    def validate(self) -> Mapping[str, float]:
        """Judge the model on ``val``, between two steps: nothing of it and no random state is changed.

        Rules that look at held-out data (slices, generalization) hear of it.

        Returns:
            Metrics by name: ``loss``, ``utility``, ``accuracy`` where there are classes, ``slice NAME``.

        Raises:
            UsageError: :func:`watch` was given no ``val``, or a step is going on.
        """
        return self.loop.validate()

    @property
    def should_stop(self) -> bool:
        """Whether the loop should end: a person or a safeguard asked for it, or automode has spent the rest of its compute."""
        return self.loop.why_stop is not None

    @property
    def why_stop(self) -> str | None:
        """The reason of :attr:`should_stop`; None while the loop should go on."""
        return self.loop.why_stop

    @property
    def mode(self) -> Mode:
        """The mode in force."""
        return self.loop.driver.mode

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self.loop.step

    @property
    def path(self) -> Path:
        """The session's folder."""
        return self.loop.parts.session_path

    @property
    def session(self) -> Session:
        """The session, open for reading; a new one each time."""
        return Session.open(self.path)

    @property
    def cards(self) -> list[CardRow]:
        """The latest row of every plan card, in the order in which the cards appeared."""
        with self.session as session:
            return session.cards()

    @property
    def samples(self) -> SampleLedger | None:
        """How each training sample has fared so far; None where :attr:`why_no_samples` says why."""
        return self.loop.parts.probe.ledger if self.why_no_samples is None else None

    @property
    def why_no_samples(self) -> str | None:
        """Why there are no per-sample losses; None while there are, or may yet be."""
        probe = self.loop.parts.probe
        if not probe.keeps_ledger:
            return "per-sample losses need the loss_fn of watch"
        ledger = probe.ledger  # brought up to date, which may find a reason
        if probe.reason is None and probe.rows and ledger is not None and not ledger.n_seen:
            return "no step has told its outputs, targets and ids; watch.batches() knows the ids"
        return probe.reason

    @property
    def compute(self) -> Mapping[str, int]:
        """Sample passes by account; see :attr:`automode.trainer.result.FitResult.compute`."""
        return self.loop.driver.compute

    def close(self) -> None:
        """End the session in order; in act mode a finishing merge is made, judged and, where it is better, put into the model.

        Twice does no harm.

        Raises:
            SessionError: The end of the log could not be written; the model is complete all the same.
        """
        self._finalizer.detach()
        self.loop.close("the loop ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._finalizer.detach()
            self.loop.abort(error)

    def __repr__(self) -> str:
        state = "watching" if self.loop.ended is None else f"ended ({self.loop.ended})"
        return f"Watch({self.steps} steps, {self.mode}, {state}, session {str(self.path)!r})"


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    mode: Automode = "observe",
    loss_fn: Callable[..., Tensor] | None = None,
    train: Iterable[Any] | None = None,
    val: Any = None,
    val_samples: int | None = None,
    scheduler: Any = None,
    scaler: torch.amp.GradScaler | None = None,
    slices: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
    batch_size: int | None = None,
    policy: Policy | str | os.PathLike[str] | None = None,
    project: str = "default",
    run_name: str = "run",
    session_dir: str | os.PathLike[str] = "automode-runs",
    seed: int | None = None,
    console: bool = True,
    on_card: Sequence[CardCallback] = (),
) -> Watch:
    """Watch a loop that you write yourself.

    Nothing of the loop is taken over. In mode ``observe`` losses, weights and random states equal those of the loop without it
    bit by bit. What automode can do from here is in ``docs/watch.md``; what it cannot is refused with the reason.

    Args:
        model: What is trained.
        optimizer: Of the model's parameters; its ``step`` is followed through hooks.
        mode: ``observe``, ``propose``, ``act`` (``True``) or ``off`` (``False``), as :class:`automode.Trainer` has them.
        loss_fn: ``loss_fn(outputs, targets)``, for per-sample losses and for judging on ``val``.
        train: The training loader, for sample ids (:meth:`Watch.batches`) and scans. It is not iterated for anything else.
        val: Held-out batches ``(inputs, targets)``, judged with ``loss_fn``; or a function of (model, ids) that gives the loss of
            each of these samples, lower is better. It is called with the model in evaluation mode and numbers below
            ``val_samples``, and with the same random numbers each time.
        val_samples: How many samples a function knows.
        scheduler: The learning-rate scheduler, which the loop steps; a rate that automode changes is changed in it too.
        scaler: The gradient scaler, so that steps which it leaves out are known as such.
        slices: Named subsets of ``val``, as for :meth:`automode.Trainer.fit`.
        total_steps: Steps of the whole run; ``propose`` and ``act`` plan with it.
        batch_size: Mean samples a step, where ``train`` does not tell; ``propose`` and ``act`` price with it.
        policy: What automode may do: a :class:`automode.Policy`, the name of a preset, or the path of a YAML file.
        project: Folder of the session.
        run_name: Begins the session's folder name.
        session_dir: Where sessions live.
        seed: Of the session's own choices; the loop's generators are left alone. None: drawn, and recorded.
        console: Print cards, events and where the session is.
        on_card: Functions that are called with every card, as :meth:`automode.Trainer.on_card` has them.

    Returns:
        The watch: :meth:`Watch.step` or :meth:`Watch.observe` at each step, :meth:`Watch.close` at the end.

    Raises:
        UsageError: An argument cannot be taken, or the optimizer is watched already.
        DataError: The held-out data cannot be read.
        PolicyError: The policy's file is no policy.
        NotExecutableError: The policy asks for what cannot be done, or the run is asked to resume.
        SessionError: The session cannot be made.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        known = _watched.get(optimizer)
        other = None if known is None else known()
        if other is not None and other.ended is None:
            raise UsageError(
                f"this optimizer is watched already, by the session {other.parts.session_path}; close that watch first"
            )
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        raise UsageError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    request = WatchRequest(
        model=model,
        optimizer=optimizer,
        mode=mode,
        loss_fn=loss_fn,
        train=train,
        val=val,
        val_samples=val_samples,
        scheduler=scheduler,
        slices=slices,
        total_steps=total_steps,
        batch_size=batch_size,
        policy=policy,
        project=project,
        run_name=run_name,
        session_dir=session_dir,
        seed=seed,
        console=console,
        on_card=on_card,
    )
    loop = WatchedLoop(request.parts(), scaler)
    _watched[optimizer] = weakref.ref(loop)
    return Watch(loop)


def _left_open(loop: WatchedLoop) -> None:
    """End the session of a watch that nobody closed, and say what is known of why."""
    # An interpreter that ends because of an exception keeps it here; one that is typed into keeps old ones too.
    error = (
        None if hasattr(sys, "ps1") else getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    )
    if not isinstance(error, BaseException):
        error = NotClosed(
            "the watch was never closed: call close(), or use `with automode.watch(...) as watch`"
        )
    loop.abort(error)
