"""Where a run's scalars go besides its session: CSV, TensorBoard, and every logger that Lightning's trainer takes.

Loggers are called when a block of rows is handed over and when an epoch is over, never at a step; random numbers that they
draw leave no trace. One that fails is warned of once, is tried again the next time, and never ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from automode.session.csv_log import CsvLog
from automode.session.event_log import EventLog
from automode.trainer.logger_choice import EVERY
from automode.trainer.observation_block import Block
from automode.trainer.random_state import forked_rng
from automode.trainer.run_parts import RunParts
from automode.trainer.user_warning import tell_user

_NOT_LOGGED = frozenset({"step", "time", "applied", "finite"})
_Own = (CsvLog, EventLog)


class Loggers:
    """The loggers of a run.

    Args:
        given: Names and loggers.
        every: Steps from one that is logged to the next; None: every step by CSV and TensorBoard, each 50th by others.
        folder: The session's.

    Attributes:
        all: The loggers, those made by name once :meth:`begin` has been called.
    """

    def __init__(self, given: Sequence[Any], every: int | None, folder: Path) -> None:
        self._given = given
        self._every = every
        self._folder = folder
        self.all: list[Any] = []
        self._failed: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._given)

    def begin(self, parameters: Mapping[str, Any], *, step: int, row: int) -> None:
        """Open what is named, and tell the others what the run is.

        Args:
            parameters: What the run is made of.
            step: Steps taken, by a run that is taken up again.
            row: Rows recorded, likewise.
        """
        for one in self._given:
            if isinstance(one, str):
                self._attempt(one, self._open, one, step, row)
            else:
                self.all.append(one)
                if callable(getattr(one, "log_hyperparams", None)):
                    self._attempt(one, one.log_hyperparams, dict(parameters))

    def block(self, block: Block) -> None:
        """Log the rows of a block."""
        places = [i for i, name in enumerate(block.names) if name not in _NOT_LOGGED]
        names = [block.names[i] for i in places]
        at = block.names.index("step")
        for one in self.all:
            every = self._every or (1 if isinstance(one, _Own) else EVERY)
            first = -(block.first_row + 1) % every
            chosen = block.rows[first::every]
            if not len(chosen):
                continue
            steps = [int(step) for step in chosen[:, at]]
            values: list[list[float]] = chosen[:, places].tolist()
            if isinstance(one, CsvLog):
                for number, row in enumerate(values):
                    row.append(float(block.first_row + first + number * every))
                self._attempt(one, one.log_block, [*names, "row"], values, steps)
            elif isinstance(one, EventLog):
                self._attempt(one, one.log_block, names, values, steps)
            else:
                for step, row in zip(steps, values, strict=True):
                    self._attempt(one, one.log_metrics, dict(zip(names, row, strict=True)), step=step)

    def epoch(self, numbers: Mapping[str, float]) -> None:
        """Log what an epoch came to; what it has no number of is left out."""
        step = int(numbers["step"])
        known = {name: value for name, value in numbers.items() if name != "step" and not math.isnan(value)}
        for one in self.all:
            self._attempt(one, one.log_metrics, dict(known), step=step)
            if callable(getattr(one, "save", None)):
                self._attempt(one, one.save)

    def end(self, status: str) -> None:
        """Finish.

        Args:
            status: ``success``, ``failed`` or ``interrupted``.
        """
        for one in self.all:
            if isinstance(one, _Own):
                self._attempt(one, one.close)
            elif callable(getattr(one, "finalize", None)):
                self._attempt(one, one.finalize, status)
        self.all.clear()

    def leave(self) -> None:
        """Close the files of those made by name; the user's own loggers are gone on with."""
        for one in self.all:
            if isinstance(one, _Own):
                self._attempt(one, one.close)
        self.all.clear()

    def _open(self, name: str, step: int, row: int) -> None:
        if name == "csv":
            self.all.append(CsvLog(self._folder / "metrics.csv", after_step=step, after_row=row))
        else:
            self.all.append(EventLog(self._folder / "tensorboard", after_step=step if row else None))

    def _attempt(self, one: Any, call: Callable[..., object], *given: Any, **named: Any) -> None:
        try:
            with forked_rng():
                call(*given, **named)
        except Exception as error:  # whatever a logger of the user's does, training goes on
            if id(one) not in self._failed:
                self._failed.add(id(one))
                name = repr(one) if isinstance(one, str) else type(one).__name__
                tell_user(f"the logger {name} failed ({type(error).__name__}: {error}); training goes on")


def parameters_of(parts: RunParts) -> dict[str, Any]:
    """What a run is made of, for loggers: numbers and text."""
    trunk, settings = parts.trunk, parts.settings
    return {
        "project": settings.project,
        "run_name": settings.run_name,
        "max_epochs": parts.plan.max_epochs,
        "max_steps": parts.plan.max_steps,
        "automode": settings.mode,
        "precision": settings.precision,
        "clip_norm": settings.clip_norm,
        "accumulate_grad_batches": settings.accumulate_grad_batches,
        "seed": parts.seed,
        "model": type(trunk.model).__name__,
        "optimizer": type(trunk.optimizer).__name__,
        "learning_rate": trunk.rates()[0],
        "scheduler": None if trunk.scheduler is None else type(trunk.scheduler).__name__,
        "batch_size": getattr(parts.request.train_loader, "batch_size", None),
        "session": parts.session_path.name,
    }
