"""Per-sample losses and margins, from outputs that training has computed already.

The training loss stays the user's own call. Beside it stands a *twin* that gives one value per sample from the detached
outputs: the same module or functional with ``reduction="none"``, or, for any other callable, the callable itself
vectorised over single samples. A twin counts as exact while its reduction equals the training loss within 1e-5 of its
size; where no twin is exact there are no per-sample losses, and :attr:`PerSampleLoss.reason` says why. Training never
fails for it.

A sample with several loss elements (a sequence, several targets) has their mean, over the elements that are not ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from automode.errors import DataError
from automode.trainer.loss_meaning import is_meant
from automode.trainer.loss_twins import LossFn, Twin, base_of, class_weights, twins_of
from automode.trainer.random_state import RandomState
from automode.trainer.tasks import Task, scores_are, task_of
from automode.trainer.trees import map_tensors, rows_in, tensors_in

FloatArray = npt.NDArray[np.floating[Any]]

_TOLERANCE = 1e-5
_OF_VALUES = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss,
)  # fmt: skip
_OF_DISTANCES = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss,
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss,
)  # fmt: skip
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_NEEDS = "pass a loss whose mean or sum over samples is the training loss to get per-sample losses"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Loss terms of some samples.

    Attributes:
        values: Loss of each sample [n].
        width: Loss elements per sample, counting ignored ones.
        sums: Sum of each sample's elements [n]; None where it is ``values * width``.
        norms: What each sample adds to the divisor of the mean [n]; None where every element adds one.
    """

    values: Tensor
    width: int
    sums: Tensor | None = None
    norms: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Give the tensors, values first, for one transfer."""
        return (
            [self.values] if self.sums is None or self.norms is None else [self.values, self.sums, self.norms]
        )


class PerSampleLoss:
    """The per-sample twin of a loss function; make it with :func:`per_sample_twin`.

    Attributes:
        how: How values are computed, ``"module"``, ``"function"`` or ``"vmap"``; None until the first check.
        reason: Why there are no per-sample losses; None while there are, or may yet be.
        probabilities: Outputs of a binary task are probabilities and not logits.
    """

    def __init__(self, loss_fn: LossFn) -> None:
        self._twins = list(twins_of(loss_fn))
        self._twin: Twin | None = None
        self._modes: list[str] = []
        self._tolerance = _TOLERANCE
        self.how: str | None = None
        self.reason: str | None = None
        self.probabilities = base_of(loss_fn) in (nn.BCELoss, F.binary_cross_entropy)
        base = base_of(loss_fn)
        self._of_values = base in _OF_VALUES
        of_torch = str(getattr(base, "__module__", "")).startswith("torch.nn")
        self._of_scores = of_torch and base not in _OF_DISTANCES
        self._loss_fn = loss_fn
        self._unknown = None if of_torch else loss_fn  # what its outputs mean has to be asked of it
        self._meant: dict[str, bool] = {}

    @property
    def exact(self) -> bool:
        """Whether a twin was found whose reduction has equalled every training loss checked so far."""
        return self._twin is not None and self.reason is None

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Give the loss of each sample.

        Args:
            outputs: What the model gave, samples along the first dimension.
            targets: Targets of the same samples.

        Returns:
            Float tensor [n] on the device of the outputs, without gradient.

        Raises:
            DataError: There is no exact twin (see :attr:`reason`), or none was looked for with :meth:`check` yet.
        """
        return self.terms(outputs, targets).values

    def terms(self, outputs: Any, targets: Any) -> Terms:
        """Give the loss terms of each sample; see :meth:`__call__`."""
        if self._twin is None or self.reason is not None:
            raise DataError(
                self.reason or "per-sample losses were asked for before a training loss was checked"
            )
        return _terms(self._twin, outputs, targets, weighted=self._modes[0] == "weighted")

    def differentiable(self, outputs: Any, targets: Any) -> Tensor:
        """Give the loss of each sample with its gradient, for weighting samples in a loss of our own.

        Raises:
            DataError: There is no exact twin.
        """
        if self._twin is None or self.reason is not None:
            raise DataError(
                self.reason or "per-sample losses were asked for before a training loss was checked"
            )
        elements: Tensor = self._twin.call(outputs, targets)
        return elements.reshape(elements.shape[0], -1).mean(1)

    def task(self, outputs: Any, targets: Any) -> Task:
        """Tell the kind of task, as :func:`~automode.trainer.tasks.task_of`, with what the loss says about it.

        A squared error on targets that happen to be 0 and 1 is a regression: its outputs are no logits. A loss of scores
        (cross entropy on several labels, or on soft ones) is none: how far logits are from their targets says nothing.
        A loss of the user's own is asked (:mod:`automode.trainer.loss_meaning`), once.
        """
        found = task_of(outputs, targets)
        if found == "binary" and self._of_values:
            found = "regression"
        if found in ("classification", "regression") and self._unknown is not None:
            if found not in self._meant:
                self._meant[found] = self._asked(found, outputs, targets)
            return found if self._meant[found] else "unknown"
        return "unknown" if found == "regression" and self._of_scores else found

    def class_weights(self, targets: Tensor) -> npt.NDArray[np.float64] | None:
        """How much the loss weighs the class of each target [n]; None where it weighs all alike, or does not say."""
        weights = class_weights(self._loss_fn, targets)
        return None if weights is None else np.asarray(weights.double().cpu().numpy(), dtype=np.float64)

    def _asked(self, found: Task, outputs: Tensor, targets: Tensor) -> bool:
        """Ask the user's loss what outputs mean; where it cannot be asked, they mean what they look like."""
        before = RandomState.capture()
        try:
            with torch.no_grad():
                return is_meant(self._ask(), found, _widened(outputs), targets)
        except Exception:  # whatever a user's loss raises on outputs that no network gave
            return True
        finally:
            if not RandomState.capture().same_as(before):
                before.restore()

    def _ask(self) -> Callable[[Tensor, Any], Tensor]:
        """The losses of single samples where they are exact, else that of the batch, by a copy of what may keep state."""
        if self._twin is not None and self.reason is None:
            twin = self._twin
            return lambda outputs, targets: twin.call(outputs, targets).reshape(len(targets), -1).mean(1)
        loss_fn: Any = self._unknown
        whole = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        return lambda outputs, targets: whole(outputs, targets).reshape(1)

    def check(self, outputs: Any, targets: Any, loss: Tensor | float) -> bool:
        """Compare with a training loss, and on the first finite one choose the twin.

        Args:
            outputs: Outputs of one batch; gradients are not tracked.
            targets: Targets of the same batch.
            loss: The user's loss on that batch, a scalar.

        Returns:
            Whether per-sample losses are exact. False for good once they were not.
        """
        if self.reason is not None:
            return False
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                self.reason = (
                    f"the training loss has shape {tuple(loss.shape)}, where a scalar was needed; {_NEEDS}"
                )
                return False
            if loss.dtype in _LOW_PRECISION:
                self._tolerance = max(self._tolerance, 2 * torch.finfo(loss.dtype).eps)
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if self._twin is None:
            if not np.isfinite(value):
                return False
            self._choose(outputs, targets, value)
            return self.exact
        terms = self.terms(outputs, targets)
        if self.agrees(_host(terms), terms.width, np.zeros(1, np.int64), np.array([value])):
            return True
        return self._narrow(outputs, targets, value)

    def agrees(
        self, host: list[FloatArray], width: int, starts: npt.NDArray[np.int64], losses: FloatArray
    ) -> bool:
        """Tell whether the reduction of each of several batches equals its training loss.

        Args:
            host: :meth:`Terms.tensors` of the batches end to end, as arrays.
            width: :attr:`Terms.width`.
            starts: Row at which each batch starts [k].
            losses: Training losses [k]; a non-finite one is not compared.

        Returns:
            Whether all finite ones agree.
        """
        return _agree(self._modes[0], self._tolerance, host, width, starts, losses)

    def state(self) -> dict[str, Any]:
        """What has been settled so far, as plain data for :meth:`load`."""
        return {
            "twin": None if self._twin is None else self._twins.index(self._twin),
            "modes": list(self._modes),
            "tolerance": self._tolerance,
            "reason": self.reason,
            "probabilities": self.probabilities,
            "of_values": self._of_values,
            "meant": dict(self._meant),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave, for the same loss function."""
        twin = state["twin"]
        self._twin = None if twin is None else self._twins[twin]
        self.how = None if self._twin is None else self._twin.how
        self._modes = list(state["modes"])
        self._tolerance = float(state["tolerance"])
        self.reason = state["reason"]
        self.probabilities, self._of_values = bool(state["probabilities"]), bool(state["of_values"])
        self._meant = dict(state.get("meant", {}))  # runs of before have not asked

    def refuse(self, reason: str) -> None:
        """Give up per-sample losses for good; the first reason stays."""
        self.reason = self.reason or reason

    def _choose(self, outputs: Any, targets: Any, loss: float) -> None:
        failures: list[str] = []
        for twin in self._twins:
            self._modes = self._fitting_modes(twin, outputs, targets, loss, failures)
            if self._modes:
                self._twin, self.how = twin, twin.how
                if twin.how == "vmap" and task_of(outputs, targets) == "binary":
                    meant = scores_are(outputs, targets, loss, self._modes[0])
                    self.probabilities, self._of_values = meant == "probabilities", meant == "values"
                return
        self.reason = f"no per-sample losses: {'; '.join(failures)}; {_NEEDS}"

    def _narrow(self, outputs: Any, targets: Any, loss: float) -> bool:
        """On a disagreement, keep the reductions that explain this batch too.

        A first batch of one sample fits a mean and a sum, and one without ignored targets fits a mean that counts them.
        """
        assert self._twin is not None
        failures: list[str] = []
        fitting = self._fitting_modes(self._twin, outputs, targets, loss, failures)
        self._modes = [mode for mode in self._modes if mode in fitting]
        if not self._modes:
            said = "; ".join(failures) or f"they no longer add up to the training loss {loss:.6g}"
            self.refuse(f"no per-sample losses: {said}; {_NEEDS}")
        return bool(self._modes)

    def _fitting_modes(
        self, twin: Twin, outputs: Any, targets: Any, loss: float, failures: list[str]
    ) -> list[str]:
        """Find the reductions of a twin that equal the training loss, or note why there are none."""
        weighable = twin.weigh is not None and isinstance(targets, Tensor) and not targets.is_floating_point()
        before = RandomState.capture()
        try:
            terms = {False: _terms(twin, outputs, targets, weighted=False)}
            if weighable:
                terms[True] = _terms(twin, outputs, targets, weighted=True)
        except Exception as error:  # whatever a user's loss raises here is a reason, no failure of fit
            said = str(error).splitlines() or [""]
            failures.append(f"{twin.how} twin: {type(error).__name__}: {said[0]}")
            return []
        finally:
            drew = not RandomState.capture().same_as(before)
            if drew:
                before.restore()
        if drew:
            failures.append(f"{twin.how} twin: the loss draws random numbers")
            return []
        start, losses = np.zeros(1, np.int64), np.array([loss])
        fitting = []
        for mode in ("mean", *(["weighted"] if weighable else []), "sum", "batchmean"):
            chosen = terms[mode == "weighted"]
            if _agree(mode, self._tolerance, _host(chosen), chosen.width, start, losses):
                fitting.append(mode)
        if not fitting:
            mean = float(terms[False].values.double().mean())
            failures.append(f"{twin.how} twin: its mean is {mean:.6g} and the training loss {loss:.6g}")
        return fitting


def per_sample_twin(loss_fn: LossFn) -> PerSampleLoss:
    """Look for the per-sample twin of a loss.

    Args:
        loss_fn: (outputs, targets) to a scalar loss.

    Returns:
        The twin, not yet checked: :meth:`PerSampleLoss.check` with the first batch decides.
    """
    return PerSampleLoss(loss_fn)


def _terms(twin: Twin, outputs: Any, targets: Any, *, weighted: bool) -> Terms:
    n = rows_in((outputs, targets))
    if n is None:
        raise DataError("outputs and targets do not have one common first dimension of samples")
    with torch.no_grad():
        outputs, targets = map_tensors(_widened, (outputs, targets))
        elements = twin.call(outputs, targets)
        if not isinstance(elements, Tensor) or not elements.ndim or elements.shape[0] != n:
            shape = tuple(elements.shape) if isinstance(elements, Tensor) else type(elements).__qualname__
            raise DataError(f"the unreduced loss has shape {shape} for {n} samples")
        if elements.numel() > max(tensor.numel() for tensor in tensors_in((outputs, targets))):
            raise DataError(f"the loss broadcasts outputs against targets to {tuple(elements.shape)}")
        flat = elements.reshape(n, -1)
        width = flat.shape[1]
        if not weighted or twin.weigh is None:
            return Terms(values=elements if elements.ndim == 1 else flat.mean(1), width=width)
        weight, counted = (part.reshape(n, -1).sum(1) for part in twin.weigh(targets))
        sums = flat.sum(1)
        return Terms(values=sums / counted, width=width, sums=sums, norms=weight.to(sums.dtype))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().float() if tensor.dtype in _LOW_PRECISION else tensor.detach()


def _host(terms: Terms) -> list[FloatArray]:
    return [tensor.double().cpu().numpy() for tensor in terms.tensors()]


def _agree(
    mode: str,
    tolerance: float,
    host: list[FloatArray],
    width: int,
    starts: npt.NDArray[np.int64],
    losses: FloatArray,
) -> bool:
    reduced = _reduce(mode, host, width, starts)
    with np.errstate(invalid="ignore"):
        off = np.abs(reduced - losses) > tolerance * np.abs(losses)
        if off.any():
            # Losses that nearly cancel round by the size of their terms, not of their sum.
            scale = np.abs(_reduce(mode, [np.abs(part) for part in host], width, starts))
            off &= np.abs(reduced - losses) > tolerance * scale
    # A comparison with NaN is False: a finite loss whose terms are not finite disagrees all the same.
    return not ((off | ~np.isfinite(reduced)) & np.isfinite(losses)).any()


def _reduce(mode: str, host: list[FloatArray], width: int, starts: npt.NDArray[np.int64]) -> FloatArray:
    rows = np.diff(np.append(starts, len(host[0])))
    if mode == "weighted":
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.add.reduceat(host[1], starts, dtype=np.float64) / np.add.reduceat(
                host[2], starts, dtype=np.float64
            )
    sums = np.add.reduceat(host[0], starts, dtype=np.float64)
    match mode:
        case "mean":
            return sums / rows
        case "sum":
            return sums * width
        case _:
            return sums * width / rows
