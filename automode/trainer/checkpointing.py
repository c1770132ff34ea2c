"""Storing a run's state as it goes: now and then, at the best validation, when it is stopped, and when it fails.

A checkpoint is durable first, then recorded in the log, and only then may an older one be deleted. Storing changes nothing of
the run: no random number is drawn, and nothing that is decided depends on when it happened. A disk that refuses is told once;
training goes on and it is tried again at the next turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Protocol, runtime_checkable

from automode.errors import AutomodeError
from automode.session import Session
from automode.session.checkpoints import CheckpointStore
from automode.trainer import run_state
from automode.trainer.cadence import Cadence, cadence_of
from automode.trainer.control import Control
from automode.trainer.loop import Loop
from automode.trainer.run_parts import RunParts
from automode.trainer.stop_signals import StopSignals

Why = Literal["periodic", "best", "signal", "error", "pause", "stop", "asked", "end"]

KIND = "run"
"""Manifest entry of a run's complete state, by which it is told from snapshots."""


@runtime_checkable
class Recording(Protocol):
    """An observer that keeps a log to which a run's states belong."""

    def checkpointed(self, digest: str, step: int, why: str) -> None:
        """Record that a checkpoint is durable."""
        ...

    def state_for_checkpoint(self) -> dict[str, Any]:
        """Say what the observer needs back; plain data."""
        ...

    def not_stored(self, why: str) -> None:
        """Tell that a state could not be stored."""
        ...


def keeper_of(parts: RunParts, loop: Loop, observer: object) -> CheckpointKeeper | None:
    """Make a run's keeper; None where the user wants no checkpoints, or the observer keeps no log of them."""
    every = parts.settings.checkpoint_every
    if every is None or not isinstance(observer, Recording):
        return None
    return CheckpointKeeper(
        parts, loop, observer, cadence=cadence_of(every), keep=parts.settings.keep_checkpoints
    )


class Attending(Protocol):
    """Carries out a person's orders between two steps."""

    signals: StopSignals

    def begin(self) -> bool:
        """Before the first step; tells whether to train."""
        ...

    def attend(self) -> bool:
        """Do what is due; tells whether to train on."""
        ...


def run_attended(loop: Loop, attending: Attending, control: Control) -> None:
    """Run the loop to its end without storing its state."""
    going = attending.begin()
    for _ in loop.steps() if going else ():
        if loop.batches >= control.wake and not attending.attend():
            return


def run_keeping(loop: Loop, keeper: CheckpointKeeper, attending: Attending, control: Control) -> None:
    """Run the loop to its end, storing the state as it goes, stopping for signals, and attending to a person's orders.

    Raises:
        KeyboardInterrupt: SIGINT came.
        SystemExit: SIGTERM came.
    """
    loop.epoch_ended = keeper.after_epoch
    with StopSignals() as signals:
        keeper.heed(signals)
        attending.signals = signals
        try:
            going = attending.begin()
            for _ in loop.steps() if going and signals.received is None else ():
                if loop.batches >= control.wake and not attending.attend():
                    break
                keeper.after_step()
        except Exception:
            # A terminal sends Ctrl-C to a loader's workers too, and without them the next batch may never come.
            if signals.received is None or loop.phase != "between":
                raise
            keeper.stop()
    # Asked once the handlers of before are back, so that no signal falls between the last look and their return.
    if signals.received is not None:
        keeper.stop()


class CheckpointKeeper:
    """Stores the run's state when it is due, and deletes what newer ones have replaced.

    Args:
        parts: The run.
        loop: Where it stands.
        observer: Records what is stored.
        cadence: How often.
        keep: Checkpoints kept, the best apart; at least 1.
        clock: Seconds.
    """

    def __init__(
        self,
        parts: RunParts,
        loop: Loop,
        observer: Recording,
        *,
        cadence: Cadence,
        keep: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = parts
        self._loop = loop
        self._observer = observer
        self._cadence = cadence
        self._keep = keep
        self._clock = clock
        self._store = CheckpointStore(parts.session_path / "checkpoints")
        self._kept: list[str] = []
        self._best: tuple[str, float] | None = None
        self._signals = StopSignals()
        self._warned = False
        self._last_seq = 0
        self._stored_last: tuple[int, str] | None = None
        self._first = self._at_step = loop.batches
        self._at_time = clock()

    def know(self, stored: Sequence[tuple[str, str]], best: float | None) -> None:
        """Go on with what earlier attempts of this session have stored.

        Args:
            stored: (digest, why) of what is recorded and still there, oldest first.
            best: The validation metric of the best so far.
        """
        for digest, why in stored:
            if why == "asked":
                continue  # a person's, to stay
            if why == "best" and best is not None:
                if self._best is not None:
                    self._kept.append(self._best[0])
                self._best = (digest, best)
            else:
                self._kept.append(digest)

    @property
    def best_metric(self) -> float | None:
        """The validation metric of the best checkpoint."""
        return None if self._best is None else self._best[1]

    def heed(self, signals: StopSignals) -> None:
        """Stop at the next step boundary where one of these has come."""
        self._signals = signals

    def after_step(self) -> None:
        """Store the state if a signal, the run's end, the number of steps or the time asks for it.

        Raises:
            KeyboardInterrupt: SIGINT came; the state is stored.
            SystemExit: SIGTERM came; likewise.
        """
        if self._signals.received is not None:
            self.stop()
        elif self._loop.over:
            self.save_once("end")
        elif self._cadence.unit == "steps":
            if self._loop.batches - self._at_step >= self._cadence.amount:
                self.save("periodic")
        elif self._cadence.unit == "seconds" and self._clock() - self._at_time >= self._cadence.amount:
            self.save("periodic")

    def stop(self) -> NoReturn:
        """Store the state, and end the run as the signal asks.

        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM came.
        """
        digest = self.save("signal")
        step, path = self._parts.trunk.step, self._parts.session_path
        if digest is None:
            text = f"stopped at step {step}; its state could not be stored"
        else:
            text = f"stopped at step {step}, whose state is stored; go on with: automode resume {path}"
        self._parts.console.event(text)
        self._signals.leave(text)

    def rescue(self, error: BaseException) -> None:
        """Store the state of the last step boundary after an error, if it is still that; else tell why not, on the error."""
        loop, step = self._loop, self._parts.trunk.step
        if loop.batches in (self._at_step, self._first):
            return
        if loop.phase == "update" or loop.writing:
            error.add_note(
                f"no checkpoint of step {step}: the error came while the weights were being written; an earlier one may be there"
            )
            return
        try:
            digest = self.save("error", [_why_not_exact(self._parts, loop)])
        except Exception as second:
            error.add_note(f"no checkpoint of step {step}: {type(second).__name__}: {second}")
            return
        if digest is not None:
            error.add_note(
                f"the state of step {step} is stored; go on with: automode resume {self._parts.session_path}"
            )

    def after_epoch(self) -> None:
        """Store the state if the epoch's number asks for it, or its validation is the best so far."""
        history = self._loop.history
        metric = history.val_metric[-1] if history.val_metric else float("nan")
        if metric == metric and (self._best is None or metric > self._best[1]):
            replaced = self._best
            self._best = ("", metric)
            digest = self.save("best")
            self._best = replaced if digest is None else (digest, metric)
            if digest is not None and replaced is not None:
                self._kept.insert(0, replaced[0])
                self._tidy()
        elif self._cadence.unit == "epochs" and self._loop.epoch % int(self._cadence.amount) == 0:
            self.save("periodic")
        if self._signals.received is not None:
            self.stop()

    def save(self, why: Why, doubts: list[str] | None = None) -> str | None:
        """Store the state as it is now, record it, and delete what it replaces.

        Args:
            why: What for.
            doubts: Why this state in particular is not exact.

        Returns:
            Its digest; None where it could not be stored, which has been told.
        """
        self._at_step, self._at_time = self._loop.batches, self._clock()
        try:
            digest = self._stored(why, doubts or [])
        except (
            Exception
        ) as error:  # whatever the user's objects do when they are asked for their state: training goes on
            what = str(error) if isinstance(error, AutomodeError) else f"{type(error).__name__}: {error}"
            self._tell(f"the state at step {self._parts.trunk.step} could not be stored: {what}")
            return None
        if not self._recorded(digest):
            self._tell(f"checkpoint {digest[:19]} is stored, but the session could not record it")
            return None
        self._warned = False
        self._stored_last = (self._loop.batches, digest)
        if why not in ("best", "asked"):
            self._kept.append(digest)
        self._tidy()
        return digest

    @property
    def at_this_step(self) -> str | None:
        """The stored state of this very step; None where it is not stored."""
        stored = self._stored_last
        return stored[1] if stored is not None and stored[0] == self._loop.batches else None

    def save_once(self, why: Why) -> str | None:
        """Store the state unless that of this very step is stored."""
        return self.at_this_step or self.save(why)

    def _stored(self, why: Why, doubts: list[str]) -> str:
        loop, trunk = self._loop, self._parts.trunk
        loop.flush()
        weights, rest = run_state.take(self._parts, loop)
        lost = rest["loop"]["train"].get("lost", [])
        kept_by = [f"state[{name!r}] of the training step cannot be stored" for name in lost]
        doubts = [*loop.cursor.doubts(loop.epoch), *kept_by, *loop.companions.lost(), *doubts]
        rest["driver"] = self._observer.state_for_checkpoint()
        rest["doubts"] = doubts
        rest["best"] = self.best_metric
        manifest = {
            "kind": KIND,
            "why": why,
            "step": trunk.step,
            "epoch": loop.epoch,
            "batch": loop.cursor.read,
            "rows": self._parts.probe.rows,
            "resume": "approximate" if doubts else "exact",
            "doubts": doubts,
        }
        digest = self._store.save(weights, rest, manifest)
        self._observer.checkpointed(digest, trunk.step, why)
        return digest

    def _recorded(self, digest: str) -> bool:
        with Session.open(self._parts.session_path) as session:
            for record in session.events("checkpointed", after=self._last_seq):
                self._last_seq = record.seq
                if record.body["checkpoint"] == digest:
                    return True
        return False

    def _tidy(self) -> None:
        surplus, self._kept = self._kept[: -self._keep], self._kept[-self._keep :]
        if not surplus:
            return
        try:
            self._store.delete(surplus)
        except AutomodeError as error:
            self._kept = [*surplus, *self._kept]
            self._tell(f"old checkpoints could not be deleted: {error}")

    def _tell(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._observer.not_stored(text)


def _why_not_exact(parts: RunParts, loop: Loop) -> str:
    """Say what an error between two steps may have moved already."""
    if loop.phase == "between":
        return "the error may have come after random numbers were drawn for the next batch"
    moved = ["random numbers"]
    if any(True for _ in parts.trunk.model.buffers()):
        moved.append("the model's buffers")
    if parts.own_step is not None or parts.settings.accumulate_grad_batches > 1:
        moved.append("gradients that the training step accumulates")
    return f"the step that failed may have moved {', '.join(moved)}"
