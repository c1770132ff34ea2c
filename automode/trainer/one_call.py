"""The whole of it in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from automode.trainer.result import FitResult
from automode.trainer.trainer import Trainer


def quickstart(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[..., Tensor],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    test_loader: Iterable[Any] | None = None,
    project: str = "default",
    run_name: str = "run",
    max_epochs: int | None = None,
    do_test_after: bool = False,
    scheduler: Any = None,
    slices: Any = None,
    **trainer_kwargs: Any,
) -> FitResult:
    """Make a :class:`Trainer` and fit.

    Validates after every epoch where there is a validation loader, unless ``val_every_n_epochs`` says otherwise.

    Args:
        model: As for :meth:`Trainer.fit`.
        optimizer: As for :meth:`Trainer.fit`.
        loss_fn: As for :meth:`Trainer.fit`.
        train_loader: As for :meth:`Trainer.fit`.
        val_loader: As for :meth:`Trainer.fit`.
        test_loader: As for :meth:`Trainer.fit`.
        project: As for :class:`Trainer`.
        run_name: As for :class:`Trainer`.
        max_epochs: As for :class:`Trainer`.
        do_test_after: As for :class:`Trainer`.
        scheduler: As for :meth:`Trainer.fit`.
        slices: As for :meth:`Trainer.fit`.
        trainer_kwargs: Every other argument of :class:`Trainer`.

    Returns:
        The finished run.

    Raises:
        UsageError: As :class:`Trainer` and :meth:`Trainer.fit`.
        DataError: As :meth:`Trainer.fit`.
    """
    trainer_kwargs.setdefault("val_every_n_epochs", 0 if val_loader is None else 1)
    trainer = Trainer(
        project=project,
        run_name=run_name,
        max_epochs=max_epochs,
        do_test_after=do_test_after,
        **trainer_kwargs,
    )
    return trainer.fit(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        train_loader=train_loader,
        val_loader=val_loader,
        test_loader=test_loader,
        scheduler=scheduler,
        slices=slices,
    )
