"""What ``fit`` was given: checked before anything is touched, and put where training happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from automode.errors import DataError, UsageError
from automode.trainer.closures import needs_closure
from automode.trainer.schedule import check_schedule
from automode.trainer.settings import Settings
from automode.trainer.user_warning import warn_user


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """The arguments of ``fit``; see :meth:`automode.trainer.trainer.Trainer.fit` for each."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Callable[..., Tensor]
    train_loader: Iterable[Any]
    val_loader: Iterable[Any] | None = None
    test_loader: Iterable[Any] | None = None
    scheduler: Any = None
    slices: Mapping[str, Any] | None = None

    def check(self, settings: Settings, *, own_step: bool, holds_out: bool = False) -> None:
        """Refuse what cannot be trained.

        Args:
            settings: The Trainer's.
            own_step: The user wrote the training step.
            holds_out: The policy lets samples of the training data take the place of a validation loader.

        Raises:
            UsageError: An argument is of the wrong kind, or one that is needed is missing.
            DataError: The training loader is empty.
        """
        _kind("model", self.model, nn.Module)
        _kind("optimizer", self.optimizer, torch.optim.Optimizer)
        if not callable(self.loss_fn):
            raise UsageError(
                f"loss_fn must be callable as loss_fn(outputs, targets), got {_name(self.loss_fn)}"
            )
        self._check_loaders(settings, holds_out=holds_out)
        self._check_parameters()
        self._check_step(settings, own_step=own_step)
        validates = (holds_out or self.val_loader is not None) and settings.val_every_n_epochs > 0
        check_schedule(self.scheduler, self.optimizer, settings.scheduler_interval, validates=validates)
        if settings.scheduler_interval == "manual" and self.scheduler is not None and not own_step:
            raise UsageError(
                'scheduler_interval="manual" leaves the scheduler to your own training step, and there is none; '
                'use "epoch" or "step"'
            )
        if self.slices is not None:
            _kind("slices", self.slices, Mapping)
            if self.slices and self.val_loader is None and not holds_out:
                raise UsageError("slices are subsets of the validation set; pass val_loader too")

    def _check_loaders(self, settings: Settings, *, holds_out: bool) -> None:
        for name in ("train_loader", "val_loader", "test_loader"):
            loader = getattr(self, name)
            if loader is None and name != "train_loader":
                continue
            if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
                raise UsageError(
                    f"{name} must be a DataLoader or another iterable of batches, got {_name(loader)}"
                )
        if isinstance(self.val_loader, Iterator):
            raise UsageError(
                "val_loader is an iterator, which can be read only once, and held-out data are read again and again; pass a DataLoader "
                "or a list of batches"
            )
        if settings.val_every_n_epochs and self.val_loader is None and not holds_out:
            raise UsageError(
                f"val_every_n_epochs={settings.val_every_n_epochs} needs a val_loader; pass one to fit, or 0 to the Trainer"
            )
        if settings.do_test_after and self.test_loader is None:
            raise UsageError("do_test_after=True needs a test_loader; pass one to fit")
        if length_of(self.train_loader) == 0:
            raise DataError(_empty(self.train_loader))

    def _check_step(self, settings: Settings, *, own_step: bool) -> None:
        accumulates = settings.accumulate_grad_batches > 1
        if own_step:
            if accumulates:
                raise UsageError(
                    f"accumulate_grad_batches={settings.accumulate_grad_batches} is for the default step, and yours steps the "
                    "optimizer itself; accumulate there, or leave the argument out"
                )
            return
        if not needs_closure(self.optimizer):
            return
        kind = type(self.optimizer).__name__
        if accumulates:
            raise UsageError(
                f"{kind} evaluates the loss several times a step, so gradients of other batches cannot be added up for it; "
                "leave accumulate_grad_batches out and make the batches larger"
            )
        if settings.precision == "fp16":
            raise UsageError(
                f'{kind} steps by a closure, which gradient scaling cannot drive; use precision="bf16" or "fp32"'
            )

    def _check_parameters(self) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        given = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not own & {id(parameter) for parameter in given}:
            raise UsageError(
                "the optimizer holds none of the model's parameters, so training would change nothing; "
                "build it from model.parameters() of the model passed to fit"
            )
        if not any(parameter.requires_grad for parameter in given):
            raise UsageError("no parameter of the optimizer requires a gradient, so nothing can be trained")

    def place(self, device: torch.device) -> None:
        """Move model, loss and optimizer state to the device, in place; nothing happens where they are there."""
        if all(tensor.device == device for tensor in (*self.model.parameters(), *self.model.buffers())):
            return
        self.model.to(device)
        if isinstance(self.loss_fn, nn.Module):
            self.loss_fn.to(device)
        if self.optimizer.state:
            self.optimizer.load_state_dict(self.optimizer.state_dict())

    def warn(self) -> None:
        """Point out what is probably a mistake, and is left as it is."""
        if not any(module.training for module in self.model.modules()):
            warn_user(
                "every module of the model is in evaluation mode (dropout off, fixed batch-norm statistics) and is trained "
                "so; call model.train() before fit if that is not what you want"
            )


def length_of(loader: Any) -> int | None:
    """Number of batches of a loader, or None where it does not know."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _kind(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise UsageError(f"{name} must be a {kind.__module__}.{kind.__qualname__}, got {_name(value)}")


def _name(value: object) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def _empty(loader: Any) -> str:
    if isinstance(loader, DataLoader) and loader.drop_last and loader.batch_size is not None:
        samples = length_of(loader.dataset)
        if samples:
            return (
                f"the training loader is empty: {samples} samples do not fill one batch of {loader.batch_size}, "
                "and drop_last=True drops the rest"
            )
    return "the training loader is empty: it has 0 batches"
