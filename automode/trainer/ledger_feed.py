"""From the outputs of training steps to the sample ledger: kept by reference, then many steps in one call.

Keeping references is safe because nothing is kept whose memory the model still writes to. Autograd itself needs the
outputs until the backward pass, and afterwards each forward pass makes new ones: a last layer that works in place
(``ReLU(inplace=True)``) has done so before the loss sees its output. What writes later is found out: a change through
torch bumps the tensor's version, which is compared before the outputs are used, and a model that returns the same memory
again (a static buffer, a CUDA graph) shows by its address. The visits so lost are left out of the ledger and counted,
and from then on outputs and targets are copied.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from automode.trainer.ids import IdSource
from automode.trainer.per_sample import PerSampleLoss
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.tasks import margins
from automode.trainer.trees import map_tensors, rows_in, signature_of, tensors_in

# Outputs, targets, positions in the loader's dataset, loss, and the versions of outputs and targets. A plain tuple,
# because one is made at every training step.
_Visit = tuple[Any, Any, Sequence[Any], float | Tensor, int, int]

_FLUSH_VISITS, _FLUSH_ROWS = 128, 16384
_shape_of_tensor = operator.attrgetter("shape")
_version_of_tensor = operator.attrgetter("_version")  # no public name


class LedgerFeed:
    """Feeds per-sample losses and margins of training steps to the sample ledger.

    Args:
        per_sample: The loss's per-sample twin.
        id_source: The loader that training iterates, which maps ids.
        ledger: Where visits are entered.
        max_bytes: Bytes of outputs and targets that may be kept.

    Attributes:
        ledger: As given; up to date after :meth:`flush`.
        visits: Steps kept since the last flush.
        max_visits: Steps after which a flush is due.
        overwritten: Samples' visits lost because their outputs or targets were written to.
        muted: Ids of samples that are trained on with another label than the data's; what they lose is not entered.
    """

    def __init__(
        self, per_sample: PerSampleLoss, id_source: IdSource, ledger: SampleLedger, max_bytes: int
    ) -> None:
        self.ledger = ledger
        self.visits: list[_Visit] = []
        self.max_visits = 1
        self.overwritten = 0
        self.muted = np.empty(0, dtype=np.int64)
        self._per_sample, self._id_source, self._max_bytes = per_sample, id_source, max_bytes
        self._reason: str | None = None
        self._fast = False
        self._copies = False
        self._has_margins: bool | None = None

    @property
    def reason(self) -> str | None:
        """Why the ledger is not fed; None while it is."""
        return self._reason or self._id_source.reason or self._per_sample.reason

    @property
    def quick_visits(self) -> list[_Visit] | None:
        """Where steps of plain tensors may be appended as :meth:`keep` does it, until the next flush; None: call that."""
        return self.visits if self._fast else None

    def keep(
        self, outputs: Any, targets: Any, ids: Sequence[Any], value: float | Tensor, loss: float | Tensor
    ) -> None:
        """Keep one step's outputs until the flush.

        Args:
            outputs: What the loss was given.
            targets: Targets of the same samples.
            ids: What the loader's ``ids_of_batch`` gave.
            value: The training loss: a float, or a copy of it on a device.
            loss: The training loss as the user's call gave it.
        """
        try:
            if self._fast and type(outputs) is Tensor and type(targets) is Tensor:
                visit = (outputs.detach(), targets, ids, value, outputs._version, targets._version)  # noqa: SLF001
                self.visits.append(visit)
            elif self.reason is None:
                self._keep_with_care(outputs, targets, ids, value, loss)
        except Exception as error:  # whatever the outputs are, observing them must not end the run
            self._refuse(f"no per-sample losses: {type(error).__name__}: {error}")

    def flush(self) -> None:
        """Enter every visit kept in the ledger."""
        visits, self.visits = self.visits, []
        # Batches may have grown: the next one that is kept is measured again.
        self._fast = False
        if not visits or self.reason is not None:
            return
        try:
            if _are_as_they_were(visits) and self._enter_run(visits):
                return
            self._enter_by_shape(self._unspoilt(visits))
        except Exception as error:  # whatever the outputs are, observing them must not end the run
            self._refuse(f"no per-sample losses: {type(error).__name__}: {error}")

    def state(self) -> dict[str, Any]:
        """Everything, with the steps kept since the last flush: entering them now could round otherwise than later.

        Returns:
            Plain data and tensors, for :meth:`load`.
        """
        last_at = {_address(visit[0]): visit for visit in self.visits}
        ledger = self.ledger.state()
        ledger["columns"] = {name: torch.from_numpy(column) for name, column in ledger["columns"].items()}
        return {
            "ledger": ledger,
            "visits": [_stored(visit, last=last_at[_address(visit[0])] is visit) for visit in self.visits],
            "max_visits": self.max_visits,
            "overwritten": self.overwritten,
            "reason": self._reason,
            "fast": self._fast,
            "copies": self._copies,
            "has_margins": self._has_margins,
            "per_sample": self._per_sample.state(),
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state` gave.

        Args:
            state: As given; its tensors may be on the CPU.
            device: Where outputs and targets belong.

        Raises:
            DataError: The ledger is of another dataset.
        """
        ledger = dict(state["ledger"])
        ledger["columns"] = {name: column.numpy() for name, column in ledger["columns"].items()}
        self.ledger = SampleLedger.from_state(ledger)
        self.visits = [_restored(visit, device) for visit in state["visits"]]
        self.max_visits, self.overwritten = int(state["max_visits"]), int(state["overwritten"])
        self._reason, self._fast = state["reason"], bool(state["fast"])
        self._copies, self._has_margins = bool(state["copies"]), state["has_margins"]
        self._per_sample.load(state["per_sample"])

    def _refuse(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._fast = False
        self.visits = []

    def _keep_with_care(
        self, outputs: Any, targets: Any, ids: Sequence[Any], value: float | Tensor, loss: float | Tensor
    ) -> None:
        """Keep structures and copies, and settle on the first batch what later ones can skip."""
        outputs, targets = map_tensors(Tensor.detach, outputs), map_tensors(Tensor.detach, targets)
        if not self._per_sample.exact:
            if not self._per_sample.check(outputs, targets, loss):
                return
            self._has_margins = self._per_sample.task(outputs, targets) in ("classification", "binary")
        if not self.visits:
            rows, size = rows_in((outputs, targets)) or 1, _bytes_in((outputs, targets)) or 1
            self.max_visits = max(1, min(_FLUSH_VISITS, _FLUSH_ROWS // rows, self._max_bytes // size))
        if self._copies:
            outputs, targets = map_tensors(Tensor.clone, outputs), map_tensors(Tensor.clone, targets)
        self.visits.append((outputs, targets, ids, value, _version(outputs), _version(targets)))
        # The first kept step sets how many more are kept; those go by without a look.
        self._fast = not self._copies

    def _unspoilt(self, visits: list[_Visit]) -> list[_Visit]:
        """Leave out visits whose tensors are not what they were; refuse those of other samples than they came with."""
        kept = []
        # The last of several outputs at one address is the one that its memory still holds.
        last_at = {_address(visit[0]): visit for visit in visits}
        for visit in visits:
            outputs, targets, ids, _, outputs_version, targets_version = visit
            rows = len(ids)
            if rows_in(outputs) != rows or rows_in(targets) != rows:
                self._refuse(
                    f"outputs and targets do not have a row for each of the {rows} samples of a batch"
                )
                return []
            unchanged = _version(outputs) == outputs_version and _version(targets) == targets_version
            if not unchanged or last_at[_address(outputs)] is not visit:
                self.overwritten += rows
                self._copies = True
            elif rows:
                kept.append(visit)
        return kept

    def _enter_by_shape(self, visits: list[_Visit]) -> None:
        for _, run in itertools.groupby(visits, key=_shape_of_rows):
            if self.reason is None:
                self._enter_run(list(run))

    def _enter_run(self, run: list[_Visit]) -> bool:
        """Enter steps whose outputs can be put end to end; False where they cannot."""
        try:
            outputs = map_tensors(lambda *parts: torch.cat(parts), *[visit[0] for visit in run])
            targets = map_tensors(lambda *parts: torch.cat(parts), *[visit[1] for visit in run])
        except RuntimeError:
            return False
        starts = np.zeros(len(run), np.int64)
        np.cumsum([len(visit[2]) for visit in run[:-1]], out=starts[1:])
        losses = _floats([visit[3] for visit in run])
        terms = self._per_sample.terms(outputs, targets)
        if not self._per_sample.agrees(_to_host(terms.tensors()), terms.width, starts, losses):
            for visit, loss in zip(run, losses.tolist(), strict=True):
                if math.isfinite(loss) and not self._per_sample.check(visit[0], visit[1], loss):
                    return True
            terms = self._per_sample.terms(outputs, targets)
        ids = self._id_source.root_ids([visit[2] for visit in run])
        if ids is None:
            return True
        told = slice(None) if not self.muted.size else np.flatnonzero(~np.isin(ids, self.muted))
        if self._has_margins:
            gaps = margins(outputs, targets, probabilities=self._per_sample.probabilities)
            values, gap = _to_host([terms.values, gaps])
            self.ledger.update(ids[told], values[told], gap[told], gap[told] > 0)
        else:
            self.ledger.update(ids[told], _to_host([terms.values])[0][told], None, None)
        return True


def _are_as_they_were(visits: list[_Visit]) -> bool:
    """Tell at once whether all visits are of plain tensors with a row a sample, to which nothing wrote.

    Column by column, so that Python's own loops run over them: this is looked at for every training step.
    """
    outputs, targets, ids, _, outputs_versions, targets_versions = zip(*visits, strict=True)
    if {*map(type, outputs), *map(type, targets)} != {Tensor}:
        return False
    sizes = list(map(len, ids))
    return (
        all(sizes)
        and _rows_of(outputs) == sizes == _rows_of(targets)
        and tuple(map(_version_of_tensor, outputs)) == outputs_versions
        and tuple(map(_version_of_tensor, targets)) == targets_versions
        and len(set(map(Tensor.data_ptr, outputs))) == len(visits)
    )


def _rows_of(tensors: Sequence[Tensor]) -> list[int]:
    """Rows of each, -1 where it has no dimension; a tensor's ``len`` takes four times as long as its shape."""
    return [shape[0] if shape else -1 for shape in map(_shape_of_tensor, tensors)]


def _stored(visit: _Visit, *, last: bool) -> list[Any]:
    """Give a visit as plain data, marked where its tensors are not what they were; ``last``: at its address."""
    outputs, targets, ids, value, outputs_version, targets_version = visit
    spoilt = not last or _version(outputs) != outputs_version or _version(targets) != targets_version
    return [*map_tensors(Tensor.clone, (outputs, targets)), [int(i) for i in ids], value, spoilt]


def _restored(stored: Sequence[Any], device: torch.device) -> _Visit:
    outputs, targets, ids, value, spoilt = stored
    outputs, targets = map_tensors(lambda tensor: tensor.to(device), (outputs, targets))
    # One that was written to before it was stored is left out at the flush, as it would have been.
    return outputs, targets, ids, value, _version(outputs) - spoilt, _version(targets)


def _shape_of_rows(visit: _Visit) -> Any:
    return signature_of(visit[:2])


def _version(tree: Any) -> int:
    """Give a number that grows with every write through torch to the tensors of a structure."""
    return sum(map(_version_of_tensor, tensors_in(tree)))


def _address(tree: Any) -> int:
    return next(tensor.data_ptr() for tensor in tensors_in(tree))


def _bytes_in(tree: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(tree))


def _floats(values: list[float | Tensor]) -> npt.NDArray[np.float64]:
    """Read losses, those on devices in one transfer."""
    on_device = [value for value in values if isinstance(value, Tensor)]
    if not on_device:
        return np.array(values, dtype=np.float64)
    read = iter(torch.stack(on_device).tolist())
    return np.array(
        [next(read) if isinstance(value, Tensor) else value for value in values], dtype=np.float64
    )


def _to_host(tensors: list[Tensor]) -> list[npt.NDArray[np.floating[Any]]]:
    """Bring tensors of one length and device to the CPU in one transfer."""
    if tensors[0].is_cpu:
        return [tensor.numpy() for tensor in tensors]
    return list(torch.stack(tensors).cpu().numpy())
