"""One training step: the default for ``(inputs, targets)`` batches, and the user's own in its place.

Either leaves every decision to the user: nothing is clipped, scaled or skipped that was not asked for. Only with the
guard of act mode on does a step whose loss or gradient is not finite not reach the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from automode.errors import DataError, UsageError
from automode.merges.batches import move
from automode.trainer.batch_parts import Divided, Made, whole_of
from automode.trainer.flat_optimizers import FlatAdam
from automode.trainer.gradient_norms import TotalNorm, grad_norms
from automode.trainer.leaps import Leaps, unfit
from automode.trainer.step_hooks import Guarded, StepHooks
from automode.trainer.trees import is_plain
from automode.trainer.trunk import StepFn, Trunk

TrainingStep = Callable[[Any, dict[str, Any]], Mapping[str, Any]]
"""The user's own step: batch and state to metrics."""

STATE_KEYS = ("model", "optimizer", "loss_fn", "device", "autocast", "scaler", "scheduler", "step", "epoch")
"""What the state of a user's own step holds."""

OVERFLOWED = "the gradient overflowed in fp16; the scaler lowered its scale"
"""Why a scaler kept a step from the weights."""

_RESERVED = frozenset({"row", "attempt", "step", "time", "grad_norm", "applied", "finite", "samples"})


class Taken(NamedTuple):
    """What one training step came to.

    Attributes:
        loss: The training loss.
        grad_norm: Norm of all gradients before clipping, or those of the single gradients; None: read it off the
            parameters.
        applied: False where an optimizer step was due and did not happen.
        stepped: Whether the optimizer steps; in an accumulating step it does so now and then.
        pending: The optimizer step is still to be made, once the gradients have been looked at.
        outputs: What the loss was given, or None.
        targets: Targets of the same samples.
        metrics: More numbers by name.
        skipped: Why the guard kept the step from the weights; empty where it did not.
    """

    loss: Tensor | float
    grad_norm: float | Tensor | Sequence[Tensor] | None
    applied: bool
    stepped: bool
    pending: bool
    outputs: Any
    targets: Any
    metrics: Mapping[str, Any] | None
    skipped: str


class Scaler(torch.amp.GradScaler):
    """A gradient scaler that counts how often a step was asked of it."""

    def __init__(self, device: str, *, enabled: bool) -> None:
        super().__init__(device, enabled=enabled)
        self.asked = 0

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step unless a gradient overflowed; see torch."""
        self.asked += 1
        return super().step(optimizer, *args, **kwargs)


def pair_step(loss_fn: Callable[..., Tensor], device: torch.device) -> StepFn:
    """Make the default forward pass: model and ``(inputs, targets)`` to loss, outputs and targets.

    Args:
        loss_fn: (outputs, targets) to a scalar.
        device: Where batches go.

    Returns:
        The function. It raises DataError for a batch that is no pair, and for a loss that is no scalar tensor.
    """
    moves = device.type != "cpu"

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Any, Any]:
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            raise _no_pair(batch)
        inputs, targets = move(batch, device) if moves else batch
        outputs = model(inputs)
        loss = loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise _no_scalar(loss)
        return loss, outputs, targets

    if not moves:
        step.paired_with = loss_fn  # type: ignore[attr-defined]  # for paired_loss
    return step


def paired_loss(step_fn: StepFn) -> Callable[..., Tensor] | None:
    """The loss function of a :func:`pair_step` whose batches stay where they are; None: it is another forward pass."""
    return getattr(step_fn, "paired_with", None)


class DefaultStep:
    """zero_grad, forward, loss, backward, norm (and clipping where asked for), optimizer step.

    Args:
        trunk: What is trained.
        scaler: Scales the loss of fp16; disabled otherwise.
        guarded: Says whether the guard is on.
        leap: With the guard on, a gradient norm of over so many times the largest before keeps a step from the weights; None: it does not.

    Attributes:
        began: Whether the optimizer has begun to write in this step; a pending one has not.
        leaps: Says which steps must not reach the weights.
        plain: Whether nothing is scaled and nothing cast.
    """

    def __init__(self, trunk: Trunk, scaler: Scaler, guarded: Guarded, leap: float | None = None) -> None:
        self._trunk = trunk
        self._scaler = scaler
        self._guarded = guarded
        self.leaps = Leaps(leap)
        self.plain = trunk.precision == "fp32" and not scaler.is_enabled()
        self._clipped = list(trunk.model.parameters())  # an adopted trial may bring clipping along
        self._flat = trunk.optimizer if isinstance(trunk.optimizer, FlatAdam) else None
        self._total_norm = TotalNorm(trunk.parameters)
        self._divided = Divided()
        self._applied = 0
        self.began = False
        self._hook = trunk.optimizer.register_step_post_hook(self._after) if scaler.is_enabled() else None

    def close(self) -> None:
        """Take the hook off the optimizer."""
        if self._hook is not None:
            self._hook.remove()

    def state(self) -> dict[str, Any]:
        """The scaler's state, for :meth:`load`."""
        return {"scaler": self._scaler.state_dict(), "leaps": self.leaps.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        if state["scaler"]:  # empty where the run did not scale when it was cut
            self._scaler.load_state_dict(state["scaler"])
        if "leaps" in state:  # runs of before know none
            self.leaps.load(state["leaps"])

    def __call__(self, batch: Any, epoch: int) -> Taken:
        """Train on one batch, in the parts that the trunk divides it into."""
        self.began = False
        if self._trunk.part_rows is None:
            return self._part(batch)
        return self._in_parts(self._divided(batch, self._trunk.part_rows))

    def _in_parts(self, parts: list[Any]) -> Taken:
        """Take a step on each part; the first that must not reach the weights ends the batch, which is skipped where nothing came before it."""
        assert self._hook is None  # no card that divides batches is carried out where gradients are scaled
        made: list[Made] = []
        largest = 0.0
        for part in parts:
            taken = self._part(part)
            if len(parts) == 1 or (taken.skipped and not made):
                return taken
            if taken.skipped:
                break
            norm = self._total_norm() if taken.grad_norm is None else taken.grad_norm
            assert isinstance(norm, float | Tensor)
            largest = max(largest, float(norm))
            self.began = True
            self._trunk.optimizer.step()
            made.append((taken.loss, taken.outputs, taken.targets))
        loss, outputs, targets = whole_of(made, self._trunk.loss_fn)
        if taken.skipped:  # the ledger knows the batch by all of its samples
            outputs, targets = None, None
        return Taken(loss, largest, True, True, False, outputs, targets, None, taken.skipped)

    def _part(self, batch: Any) -> Taken:
        trunk = self._trunk
        optimizer = trunk.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self.plain:
            loss, outputs, targets = trunk.step_fn(trunk.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            with trunk.autocast():
                loss, outputs, targets = trunk.step_fn(trunk.model, batch)
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self._scaler.unscale_(optimizer)
        norm: Any = None
        largest = trunk.clip_norm
        if trunk.cap_norm is not None:
            largest = trunk.cap_norm if largest is None else min(largest, trunk.cap_norm)
        if largest is not None:
            norm = torch.nn.utils.clip_grad_norm_(self._clipped, largest)
        elif self._flat is not None:
            norm = self._flat.gradient_norm()
        if self._hook is not None:
            return self._scaled(loss, norm, outputs, targets)
        if self._guarded.guard:
            norm, why = self._judged(loss, norm, clipped=largest is not None)
            if why:
                return Taken(loss, norm, False, False, False, outputs, targets, None, why)
        return Taken(loss, norm, True, True, True, outputs, targets, None, "")

    def norm_of(self, *, guard: bool) -> Callable[[], float | Tensor] | None:
        """What takes the gradients' norm in a step that is not clipped; None: it may be taken later.

        Args:
            guard: Whether the guard is on.
        """
        if self._flat is not None:
            return self._flat.gradient_norm
        return self._total_norm if guard else None

    def _scaled(self, loss: Tensor, norm: Any, outputs: Any, targets: Any) -> Taken:
        """Leave it to the scaler whether to step: it must see an overflow to lower its scale."""
        if norm is None:
            norm = grad_norms(self._trunk.parameters)
        before = self._applied
        self.began = True
        self._scaler.step(self._trunk.optimizer)
        self._scaler.update()
        applied = self._applied > before
        why = "" if applied else OVERFLOWED
        return Taken(loss, norm, applied, applied, False, outputs, targets, None, why)

    def _judged(self, loss: Tensor, norm: Tensor | None, *, clipped: bool) -> tuple[float, str]:
        """Tell the gradient norm, and why the step must not be made (empty: it may). A leap that was clipped is none any more."""
        total = float(self._total_norm() if norm is None else norm)
        if clipped:
            return total, unfit(loss.item(), total)
        return total, self.leaps.unfit(loss.item(), total, self._trunk.step)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._applied += 1


class OwnStep:
    """The user's own training step, watched through the optimizer's hooks.

    What it returns is a mapping: ``loss`` is the loss, ``outputs`` and ``targets`` (what the loss was given, one row a
    sample) take part in per-sample signals, every other entry is a number that becomes a column of the session's frame.

    A batch counts as a step, also where the optimizer steps only every few batches. With the guard on, gradients that
    are not finite are dropped when the optimizer is about to step, which makes that step a no-op; the user's code runs
    on as it stands.

    Args:
        function: Batch and state to metrics.
        trunk: What is trained.
        scaler: Scales the loss of fp16; a disabled one passes everything through.
        guarded: Says whether the guard is on.
    """

    def __init__(self, function: TrainingStep, trunk: Trunk, scaler: Scaler, guarded: Guarded) -> None:
        self._function = function
        self._trunk = trunk
        self._scaler = scaler
        self._names: tuple[str, ...] = ()
        self._hooks = StepHooks(trunk, guarded)
        context: AbstractContextManager[Any] = trunk.autocast()
        self._state: dict[str, Any] = {
            "model": trunk.model,
            "optimizer": trunk.optimizer,
            "loss_fn": trunk.loss_fn,
            "device": trunk.device,
            "autocast": context,
            "scaler": scaler,
            "scheduler": trunk.scheduler,
            "step": 0,
            "epoch": 0,
        }

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        self._hooks.close()

    @property
    def began(self) -> bool:
        """Whether the optimizer has begun to write in this step."""
        return self._hooks.began

    def state(self) -> dict[str, Any]:
        """The scaler's state, and what the user's own step keeps in its ``state``, for :meth:`load`."""
        own = {name: value for name, value in self._state.items() if name not in STATE_KEYS}
        kept = {name: value for name, value in own.items() if is_plain(value)}
        return {"scaler": self._scaler.state_dict(), "kept": kept, "lost": [n for n in own if n not in kept]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        if state["scaler"]:  # empty where the run did not scale when it was cut
            self._scaler.load_state_dict(state["scaler"])
        self._state.update(state["kept"])

    def __call__(self, batch: Any, epoch: int) -> Taken:
        """Train on one batch as the user does."""
        hooks = self._hooks
        hooks.begin()
        steps, asked = hooks.steps, self._scaler.asked
        state = self._state
        state["step"], state["epoch"] = self._trunk.step, epoch
        result = self._function(batch, state)
        if not isinstance(result, Mapping) or "loss" not in result:
            raise _no_loss(result)
        stepped = hooks.steps > steps and not hooks.skipped
        missed = bool(hooks.skipped) or (self._scaler.asked > asked and not stepped)
        metrics = {
            name: value for name, value in result.items() if name not in ("loss", "outputs", "targets")
        }
        if metrics and tuple(metrics) != self._names:
            self._names = checked_names(tuple(metrics))
        return Taken(
            loss=_detached(result["loss"]),
            grad_norm=self._unscaled() if hooks.norm is None else hooks.norm,
            applied=not missed,
            stepped=stepped,
            pending=False,
            outputs=result.get("outputs"),
            targets=result.get("targets"),
            metrics=metrics or None,
            skipped=hooks.skipped,
        )

    def _unscaled(self) -> float | list[Tensor]:
        """Norms of what has accumulated so far."""
        norms = grad_norms(self._trunk.parameters)
        if not self._scaler.is_enabled():
            return norms
        scale = self._scaler.get_scale()
        return [norm / scale for norm in norms]


def _detached(loss: Any) -> Tensor | float:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise _no_scalar(loss)
        return loss.detach()
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise _no_scalar(loss) from None


def checked_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a step's metrics.

    Raises:
        UsageError: One is no name, or that of a column which automode writes.
    """
    for name in names:
        if not isinstance(name, str) or not name:
            raise UsageError(f"the training step names a metric {name!r}; names are non-empty strings")
        if name in _RESERVED or name.startswith("lr_"):
            raise UsageError(
                f"the training step returns a metric {name!r}, which is a column that automode writes; choose another name"
            )
    return names


def _no_loss(result: Any) -> UsageError:
    came = f"keys {sorted(map(str, result))}" if isinstance(result, Mapping) else f"a {type(result).__name__}"
    return UsageError(
        f"the training step returned {came}; it must return a mapping with the entry `loss`, "
        'as in return {"loss": loss.detach()}'
    )


def _no_scalar(loss: Any) -> DataError:
    came = (
        f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    )
    return DataError(
        f"the loss is {came}, but must be a tensor with one element; reduce it with .mean() or .sum()"
    )


def _no_pair(batch: Any) -> DataError:
    match batch:
        case Mapping():
            came = f"a {type(batch).__name__} with the keys {', '.join(map(repr, list(batch)[:8]))}"
        case list() | tuple():
            came = f"a {type(batch).__name__} of {len(batch)}"
        case _:
            came = f"a {type(batch).__name__}"
    return DataError(
        f"the loader yields {came}; the default step trains on (inputs, targets). For another shape of batch write "
        "the step yourself: @trainer.training_step on a function of (batch, state) that returns {'loss': loss}"
    )
