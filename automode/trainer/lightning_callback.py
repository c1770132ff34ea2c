"""Lightning's loop, watched: a callback that tells a :class:`~automode.trainer.watched_loop.WatchedLoop` what the Trainer does.

Lightning is imported here and nowhere else, so that who does not use it does not load it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from automode.errors import NotExecutableError, UsageError
from automode.planner.policy import Policy
from automode.trainer.card_callbacks import CardCallback
from automode.trainer.settings import Automode
from automode.trainer.user_warning import warn_user
from automode.trainer.watching import Watch, watch

_NO_LOSS = (
    "training_step returned no loss, so that automode has nothing to observe in this run; return the loss, or a mapping with the "
    "entry `loss`"
)


class AutomodeCallback(Callback):
    """Watches the training of a LightningModule, as :func:`automode.watch` watches a hand-written loop.

    Put it among ``lightning.Trainer(callbacks=[...])``. With ``mode="observe"`` the run equals the one without it bit by bit. A
    step is a batch, also where gradients accumulate over several. Automatic and manual optimization are followed alike; of several
    optimizers, the one that is named. What can be done from here is in ``docs/watch.md``; what cannot is refused with the reason.

    ``training_step`` may return a mapping: ``loss``, and ``outputs``, ``targets`` and ``ids`` (positions in the dataset), which with
    ``loss_fn`` give per-sample losses. In manual optimization it has to return the loss to be observed.

    Args:
        mode: As for :func:`automode.watch`, and so is everything that is not explained here.
        optimizer: Which of several optimizers is watched, from 0.
        loss_fn: Likewise; ``val`` is judged by ``loss_fn(module(inputs), targets)``.
        train: Likewise; Lightning's own loader is never iterated.
        val: Likewise; looked at after each of Lightning's validations too. Lightning's own validation data are not taken.
        val_samples: Likewise.
        slices: Likewise.
        total_steps: Batches of the whole run; None: as Lightning knows them.
        batch_size: None: that of Lightning's loader.
        policy: Likewise.
        project: Likewise.
        run_name: Likewise.
        session_dir: Likewise.
        seed: Likewise.
        console: Likewise.
        on_card: Likewise.

    Attributes:
        watch: The watch of the run that goes on, or went on last; None before the first.
    """

    def __init__(
        self,
        mode: Automode = "observe",
        *,
        optimizer: int = 0,
        loss_fn: Callable[..., Tensor] | None = None,
        train: Any = None,
        val: Any = None,
        val_samples: int | None = None,
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
    ) -> None:
        super().__init__()
        self.watch: Watch | None = None
        self._optimizer = optimizer
        self._watched: torch.optim.Optimizer | None = None
        self._told = False
        self._given: dict[str, Any] = {
            "mode": mode,
            "loss_fn": loss_fn,
            "train": train,
            "val": val,
            "val_samples": val_samples,
            "slices": slices,
            "total_steps": total_steps,
            "batch_size": batch_size,
            "policy": policy,
            "project": project,
            "run_name": run_name,
            "session_dir": session_dir,
            "seed": seed,
            "console": console,
            "on_card": on_card,
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches nothing: the session that is open stays with this one."""
        return {**self.__dict__, "watch": None, "_watched": None}

    # The run.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the session.

        Raises:
            UsageError: As :func:`automode.watch`, and where there is no such optimizer.
            NotExecutableError: More than observing is asked for in a run of several processes.
        """
        if trainer.world_size > 1:
            if self._given["mode"] not in (False, "off", "observe"):
                raise NotExecutableError(
                    f'this run has {trainer.world_size} processes, and automode acts in one alone; use mode="observe", which watches '
                    "the first of them"
                )
            if not trainer.is_global_zero:
                return
        optimizers = trainer.optimizers
        if not 0 <= self._optimizer < len(optimizers):
            raise UsageError(
                f"optimizer={self._optimizer} was asked for, and configure_optimizers gave {len(optimizers)}, counted from 0"
            )
        self._watched, self._told = optimizers[self._optimizer], False
        given = dict(self._given)
        if given["total_steps"] is None:
            given["total_steps"] = _batches_ahead(trainer)
        if given["batch_size"] is None and given["train"] is None:
            given["batch_size"] = _batch_size(trainer)
        schedulers = [
            c.scheduler for c in trainer.lr_scheduler_configs if _drives(c.scheduler, self._watched)
        ]
        plugin = trainer.precision_plugin
        self.watch = watch(
            pl_module,
            self._watched,
            scheduler=schedulers[0] if len(schedulers) == 1 else None,
            scaler=getattr(plugin, "scaler", None),
            **given,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the session in order."""
        if self.watch is not None:
            self.watch.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the session and say why."""
        if self.watch is not None:
            self.watch.loop.abort(exception)

    # A step.

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a row."""
        # A batch that was begun and cut short (a hook returned -1) has no end.
        if self.watch is not None and not self.watch.loop.in_block:
            self.watch.loop.begin()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradients, before Lightning clips them."""
        if self.watch is not None and optimizer is self._watched:
            self.watch.loop.ready()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the row, and let happen what is due between two steps."""
        if self.watch is None:
            return
        loop = self.watch.loop
        found = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
        loss = found.get("loss")
        if loss is not None:
            # Lightning hands out the loss divided by the batches that it accumulates over.
            whole = loss * trainer.accumulate_grad_batches if pl_module.automatic_optimization else loss
            loop.tell(whole, found.get("outputs"), found.get("targets"), found.get("ids"))
        elif not self._told and not pl_module.automatic_optimization:
            self._told = True
            warn_user(_NO_LOSS)
        loop.end(unseen=loss is None)
        if self.watch.should_stop:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the held-out data that automode was given, while the module is trained."""
        if self.watch is None or self.watch.loop.ended is not None or trainer.sanity_checking:
            return
        if self._given["val"] is not None:
            self.watch.validate()


def _batches_ahead(trainer: pl.Trainer) -> int | None:
    """Batches that are left to train on; None where Lightning does not know either."""
    per_epoch = trainer.num_training_batches
    ends = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(per_epoch):
        ends.append((trainer.max_epochs - trainer.current_epoch) * int(per_epoch))
    if trainer.max_steps >= 0:
        ends.append((trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
    return max(1, min(ends)) if ends else None


def _batch_size(trainer: pl.Trainer) -> int | None:
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return size if isinstance(size, int) else None


def _drives(scheduler: Any, optimizer: torch.optim.Optimizer) -> bool:
    return getattr(scheduler, "optimizer", None) is optimizer
