"""The norm of the gradients at each step, for little.

On a small model the norm's own calls cost as much as a good part of the step, and thirty steps' norms cost hardly more
than one's. So the gradients of a small model are held by reference and their norms taken together when a block is
closed. That is right only while nothing writes to them: it is done after the first steps have shown that every step makes
new gradients (``zero_grad(set_to_none=True)``, torch's default) and that nothing changes the old ones; a tensor's version
tells. Should a later step break that, the norms lost are NaN, and from then on every norm is taken at once.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

_LOW_PRECISION = frozenset({torch.float16, torch.bfloat16})
_TRIAL_STEPS = 3
_SMALL_BYTES = 1 << 17
_HELD_STEPS = 32
_version = operator.attrgetter("_version")
_gradient = operator.attrgetter("grad")


def grad_norms(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Give the Euclidean norm of each gradient present, without waiting for a device.

    Args:
        parameters: Parameters; those without a gradient are left out.

    Returns:
        One 0-dimensional tensor a gradient; low-precision gradients are summed in float32.
    """
    return _norms([gradient for parameter in parameters if (gradient := parameter.grad) is not None])


def total_norm(norms: Sequence[Tensor]) -> float | Tensor:
    """Combine the norms of parts into the norm of the whole.

    Args:
        norms: 0-dimensional tensors, on the CPU or on devices.

    Returns:
        A float where all are on the CPU, otherwise a 0-dimensional tensor on a device, not waited for.
    """
    if all(norm.is_cpu for norm in norms):
        return math.hypot(*[norm.item() for norm in norms])
    home = next(norm.device for norm in norms if not norm.is_cpu)
    parts = torch.stack([norm.detach().to(home, torch.float32, non_blocking=True) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(parts)
    return total


class TotalNorm:
    """Takes the norm of all gradients at once, for whoever must know it before the optimizer steps.

    Those of a small model are put end to end and have one norm taken; those of a large one are read where they are.

    Args:
        parameters: Parameters whose gradients count.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # A list that is given stays the giver's: what is added to it counts from then on.
        self._parameters = parameters if isinstance(parameters, list) else list(parameters)
        self._known = -1
        self._small = False

    def _choose(self) -> None:
        self._known = len(self._parameters)
        kinds = {(parameter.device.type, parameter.dtype) for parameter in self._parameters}
        wide = kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})
        self._small = wide and sum(parameter.nbytes for parameter in self._parameters) <= _SMALL_BYTES

    def __call__(self) -> float:
        """Take the norm of the gradients as they are now."""
        if len(self._parameters) != self._known:
            self._choose()
        gradients = [gradient for parameter in self._parameters if (gradient := parameter.grad) is not None]
        if self._small and gradients:
            try:
                flat: Tensor = _flatten_dense_tensors(gradients)  # type: ignore[no-untyped-call]
            except RuntimeError:  # one is sparse
                return float(total_norm(_norms(gradients)))
            # A norm, and not the root of a product: that overflows sooner.
            norm: float = torch.linalg.vector_norm(flat).item()
            return norm
        return float(total_norm(_norms(gradients)))


class HeldGradients:
    """Gradients held by reference until their norms are taken together.

    Args:
        parameters: Parameters whose gradients count.
        max_bytes: Bytes of gradients that may be held; a model with more than a 32nd of it a step never holds.
    """

    def __init__(self, parameters: Iterable[Tensor], max_bytes: int = 1 << 20) -> None:
        # A list that is given stays the giver's: what is added to it counts from then on.
        self._all = parameters if isinstance(parameters, list) else list(parameters)
        self._max_bytes = max_bytes
        self._choose()
        self._trial = _TRIAL_STEPS
        self._previous: tuple[list[Tensor], int] | None = None
        self._taken: dict[int, float] = {}
        self._hold_anew()

    def _hold_anew(self) -> None:
        # Side by side and not as a tuple a step: what the garbage collector looks at is the tensors, and no more.
        self._rows: list[int] = []
        self._sizes: list[int] = []
        self._versions: list[int] = []
        self._held: list[Tensor] = []

    def _choose(self) -> None:
        self._known = len(self._all)
        self.parameters = [parameter for parameter in self._all if parameter.requires_grad]
        self._frozen = [parameter for parameter in self._all if not parameter.requires_grad]
        held_bytes = sum(parameter.nbytes for parameter in self.parameters)
        on_cpu = all(parameter.is_cpu and parameter.dtype == torch.float32 for parameter in self.parameters)
        self._may_hold = on_cpu and 0 < held_bytes * 32 <= self._max_bytes

    def take(self, row: int) -> float | Tensor:
        """Take the norm of the gradients as they are now, or hold them.

        Args:
            row: Which step this is, for :meth:`close`.

        Returns:
            The norm, as :func:`total_norm` gives it; NaN where the gradients are held.
        """
        thawed = self._frozen and any(parameter.requires_grad for parameter in self._frozen)
        if thawed or len(self._all) != self._known:
            self._thaw()
        try:  # a comprehension would be a call more
            gradients = list(map(_gradient, self.parameters))
            version = sum(map(_version, gradients))
        except AttributeError:  # one has none
            gradients = [gradient for gradient in gradients if gradient is not None]
            version = sum(map(_version, gradients))
        if not self._may_hold or not gradients:
            return total_norm(_norms(gradients))
        if self._trial:
            self._try(gradients, version)
            return total_norm(_norms(gradients))
        self._rows.append(row)
        self._sizes.append(len(gradients))
        self._versions.append(version)
        self._held += gradients
        if len(self._rows) >= _HELD_STEPS:
            self._take_held()
        return math.nan

    def close(self) -> dict[int, float]:
        """Take the norms of everything held.

        Returns:
            Norm by row of each step held since the last call; NaN where the gradients were written to since.
        """
        if self._rows:
            self._take_held()
        taken, self._taken = self._taken, {}
        return taken

    def _take_held(self) -> None:
        rows, sizes, versions, held = self._rows, self._sizes, self._versions, self._held
        self._hold_anew()
        if sizes.count(len(self.parameters)) == len(sizes):
            # No gradient is missing anywhere, so that every row has as many numbers as the next.
            flat: Tensor = _flatten_dense_tensors(held)  # type: ignore[no-untyped-call]
            norms: list[float] = torch.linalg.vector_norm(flat.view(len(rows), -1), dim=1).tolist()
        else:
            norms = [float(total_norm(_norms(part))) for part in _parts(held, sizes)]
        # Versions only grow: their sum is what it was exactly where each of them is.
        if sum(map(_version, held)) != sum(versions):
            self._may_hold = False
            for index, part in enumerate(_parts(held, sizes)):
                if sum(map(_version, part)) != versions[index]:
                    norms[index] = math.nan
        self._taken.update(zip(rows, norms, strict=True))

    def state(self) -> dict[str, Any]:
        """How norms are taken from here on, as plain data for :meth:`load`; everything held must have been closed."""
        assert not self._rows
        return {
            "may_hold": self._may_hold,
            "trial": self._trial,
            "one_before": self._previous is not None,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take norms as they were taken where :meth:`state` was called: the ways differ in their last bits."""
        self._may_hold, self._trial = bool(state["may_hold"]), int(state["trial"])
        # The gradients of the step before are gone with their process; nothing writes to them any more.
        self._previous = ([], 0) if state["one_before"] else None

    def _thaw(self) -> None:
        """Count those that are trained from now on too; what is held is complete without them."""
        may_hold = self._may_hold
        if self._rows:
            self._take_held()
        self._choose()
        self._may_hold = self._may_hold and may_hold
        self._previous = None

    def _try(self, gradients: list[Tensor], version: int) -> None:
        """See whether the step before left its gradients alone and this one made new ones."""
        if self._previous is not None:
            before, version_before = self._previous
            kept = sum(map(_version, before)) == version_before
            fresh = all(new is not old for new, old in zip(gradients, before, strict=False))
            dense = all(
                gradient.layout is torch.strided and gradient.is_contiguous() for gradient in gradients
            )
            self._may_hold = kept and fresh and dense
            self._trial -= 1
        self._previous = (gradients, version) if self._trial and self._may_hold else None


def _parts(held: list[Tensor], sizes: list[int]) -> Iterator[list[Tensor]]:
    """Give each step's gradients."""
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        yield held[end - size : end]


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    if not gradients:
        return []
    if {gradient.layout for gradient in gradients} != {torch.strided}:
        gradients = [grad.coalesce().values() if grad.is_sparse else grad for grad in gradients]
    if not _LOW_PRECISION.isdisjoint({gradient.dtype for gradient in gradients}):
        return [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    # What torch.nn.utils.get_total_norm calls, without the reduction that follows there.
    return list(torch._foreach_norm(gradients))  # noqa: SLF001  # no public name
