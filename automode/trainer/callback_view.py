"""What a callback is given as ``trainer``: where the run stands, and the few things that may be asked of it.

The names are Lightning's, so that callbacks written for it work; a name that is not here is an error that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from automode.trainer.logger_choice import EVERY
from automode.trainer.observer import BY_CALLBACK
from automode.trainer.run_parts import RunParts


class Stoppable(Protocol):
    """Ends a run at the next step boundary."""

    stop_requested: str | None


class Place(Protocol):
    """Where a loop stands."""

    epoch: int
    batches: int


class RunView:
    """The run, as callbacks see it.

    Args:
        parts: The run.
        stoppable: Takes a wish to stop.
        loggers: The run's loggers.

    Attributes:
        callback_metrics: The latest numbers by name, each a 0-dimensional tensor: ``loss`` (of a step), ``train_loss`` (mean of
            an epoch), ``val_loss``, ``val_metric``, ``val_accuracy`` and every metric.
        loggers: The run's loggers.
        model: The model in training.
    """

    sanity_checking = False
    fast_dev_run = False
    is_global_zero = True
    global_rank = local_rank = node_rank = 0
    world_size = num_devices = num_nodes = 1
    val_check_interval = 1.0
    datamodule = None
    checkpoint_callback = None

    def __init__(self, parts: RunParts, stoppable: Stoppable, loggers: list[Any]) -> None:
        self._parts = parts
        self._stoppable = stoppable
        self._loop: Place | None = None
        self.callback_metrics: dict[str, Tensor] = {}
        self.loggers = loggers
        self.model: nn.Module = parts.trunk.model
        self.state = SimpleNamespace(fn="fit", status="running", stage="train")
        device = parts.trunk.device
        self.strategy = SimpleNamespace(
            root_device=device,
            reduce_boolean_decision=lambda decision, all=True: decision,  # noqa: A006  # Lightning's name for it
            broadcast=lambda value, src=0: value,
            barrier=lambda name=None: None,
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a callback asks for trainer.{name}, which automode's Trainer does not have; it has "
            f"{', '.join(n for n in dir(type(self)) if not n.startswith('_'))} and {', '.join(n for n in vars(self) if n[0] != '_')}"
        )

    def know(self, loop: Place) -> None:
        """Know the loop, from which the place in the run is read."""
        self._loop = loop

    def note(self, numbers: Mapping[str, float]) -> None:
        """Take the latest numbers."""
        for name, value in numbers.items():
            self.callback_metrics[name] = torch.tensor(value)

    @property
    def should_stop(self) -> bool:
        """Whether the run ends at the next step boundary; set it to True to end it."""
        return self._stoppable.stop_requested is not None

    @should_stop.setter
    def should_stop(self, wanted: bool) -> None:
        if wanted and self._stoppable.stop_requested is None:
            self._stoppable.stop_requested = BY_CALLBACK

    @property
    def current_epoch(self) -> int:
        """The running epoch, from 0."""
        return 0 if self._loop is None else self._loop.epoch

    @property
    def global_step(self) -> int:
        """Steps taken."""
        return self._parts.trunk.step

    @property
    def max_epochs(self) -> int | None:
        """Epochs to train, or None."""
        return self._parts.plan.max_epochs

    @property
    def max_steps(self) -> int:
        """Steps to train; -1 where epochs count."""
        return -1 if self._parts.plan.max_steps is None else self._parts.plan.max_steps

    @property
    def num_training_batches(self) -> float:
        """Batches of an epoch; infinite where that is not known."""
        length = self._parts.plan.steps_per_epoch
        return math.inf if length is None else length

    @property
    def check_val_every_n_epoch(self) -> int:
        """Epochs between validations; 0: none."""
        return self._parts.plan.validate_every

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches of an optimizer step."""
        return self._parts.settings.accumulate_grad_batches

    @property
    def log_every_n_steps(self) -> int:
        """Steps from one that loggers get to the next."""
        return self._parts.settings.log_every_n_steps or EVERY

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """The same as ``callback_metrics``."""
        return self.callback_metrics

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @property
    def log_dir(self) -> str:
        """The session's folder."""
        return str(self._parts.session_path)

    @property
    def default_root_dir(self) -> str:
        """Where sessions live."""
        return str(Path(self._parts.settings.session_dir))

    @property
    def callbacks(self) -> list[Any]:
        """Every callback of the run."""
        return list(self._parts.settings.callbacks)

    @property
    def lightning_module(self) -> nn.Module:
        """The model, which need not be a LightningModule."""
        return self.model

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizer, in a list."""
        return [self._parts.trunk.optimizer]

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The scheduler and its interval, in a list; empty where there is none."""
        scheduler, interval = self._parts.trunk.scheduler, self._parts.settings.scheduler_interval
        if scheduler is None:
            return []
        return [SimpleNamespace(scheduler=scheduler, interval=interval, frequency=1, name=None)]

    @property
    def train_dataloader(self) -> Any:
        """The training loader."""
        return self._parts.request.train_loader

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader, or None."""
        return self._parts.request.val_loader

    @property
    def _logger_connector(self) -> Any:
        """Whether this step is one that loggers get, by the name that Lightning's LearningRateMonitor asks for."""
        done = 0 if self._loop is None else self._loop.batches
        return SimpleNamespace(
            should_update_logs=(done + 1) % self.log_every_n_steps == 0 or self.should_stop
        )

    @property
    def fit_loop(self) -> Any:
        """The number of steps taken, by the name that Lightning's monitors ask for."""
        return SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=self.global_step))
