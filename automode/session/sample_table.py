"""The sample ledger of a session: how each training sample has fared, as of one moment, whole or any slice of it.

A run leaves the ledger in its session at each scan and at its end (``ledger.safetensors``, replaced each time), and inside every
checkpoint of its complete state. Reading takes the later of the two, and says which it was. Reading the file needs no PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from automode.errors import SessionCorruptError, UsageError
from automode.session.sample_filter import column_named, conditions
from automode.session.table_files import write_table

if TYPE_CHECKING:
    from automode.session.session import Session

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Moment = Literal["scan", "end", "checkpoint"]

COLUMNS: Final[Mapping[str, str]] = {
    "sample_id": "position in the dataset under every Subset",
    "visits": "times that it was trained on",
    "mean_loss": "mean training loss",
    "last_loss": "loss at the last visit",
    "ema_loss": "exponential average of the loss, over visits",
    "margin": "mean of the label's score minus the best other score (AUM)",
    "flips": "times that it went from right to wrong or back",
    "forgetting": "times that it went from right to wrong",
    "last_correct": "whether the last visit was right",
    "suspect": "whether the last scan takes its label for a wrong one",
    "left_out": "whether an adopted card has left it out of training",
    "relabelled": "whether an adopted card trains it with another label",
}
"""Columns that every ledger has, in order. What is not known of a sample is NaN, and empty in files."""

ASKED: Final[Mapping[str, str]] = {
    "gradient_norm": "norm of its loss's gradient with respect to the last layer, at the last scan",
    "embedding": "what the last layer is given, at the last scan: columns embedding_0, embedding_1, ...",
}
"""What the policy's ``scan.details`` adds for the samples that a scan reads."""

WHOLE: Final = frozenset({"sample_id", "visits", "flips", "forgetting"})
FLAGS: Final = frozenset({"last_correct", "suspect", "left_out", "relabelled"})
LEVELS: Final = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Quantiles that a summary shows: least, 5 %, quarter, median, three quarters, 95 %, greatest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTable:
    """Samples of the ledger, one row each.

    Attributes:
        step: The trunk's step that it speaks of.
        moment: ``scan`` or ``end`` of the run; ``checkpoint``: out of a stored state of the run.
        columns: Values by name, all float64 of one length (:data:`COLUMNS`, and what ``scan.details`` asked for); NaN where one is
            not known.
        slices: By name, which of the rows belong to it.
        why_no_slice: By name, why the members of a slice of the run are not known.
        why_no_column: By name, why a column that the policy's ``scan.details`` asked for is not there.
        total: Rows of the whole ledger.
        pending: Steps before ``step`` whose visits are not entered yet; only out of a stored state.
    """

    step: int
    moment: Moment
    columns: Mapping[str, Floats] = field(repr=False)
    slices: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict, repr=False)
    why_no_slice: Mapping[str, str] = field(default_factory=dict, repr=False)
    why_no_column: Mapping[str, str] = field(default_factory=dict, repr=False)
    total: int = 0
    pending: int = 0

    def __len__(self) -> int:
        return int(self.columns["sample_id"].size)

    @property
    def ids(self) -> Ids:
        """Sample ids, in the order of the rows."""
        return self.columns["sample_id"].astype(np.int64)

    @property
    def told(self) -> str:
        """The moment in words."""
        match self.moment:
            case "end":
                return f"as of the run's end, step {self.step}"
            case "scan":
                return f"as of the last scan, step {self.step}"
            case _:
                later = f", but for the last {self.pending} steps" if self.pending else ""
                return f"out of the run's stored state of step {self.step}{later}"

    def column(self, name: str) -> Floats:
        """Return one column, by its name or an alias (``aum``, ``count``).

        Raises:
            UsageError: There is none.
        """
        asked = next((known for known in ASKED if name.lower().startswith(known)), None)
        if asked is not None and name.lower() not in self.columns:
            why = self.why_no_column.get(
                asked,
                f"the policy asks for it by scan: {{details: [{asked}]}}, and a scan has to come after that",
            )
            raise UsageError(f"this ledger has no {name}: {why}")
        return self.columns[column_named(name, self.columns)]

    def where(self, text: str) -> Self:
        """Keep the rows that meet all conditions (:mod:`automode.session.sample_filter`).

        Raises:
            UsageError: The text is no condition, or names no column.
        """
        keep = np.ones(len(self), dtype=np.bool_)
        for condition in conditions(text):
            keep &= condition.holds(self.column(condition.column))
        return self._rows(np.flatnonzero(keep))

    def in_slice(self, name: str) -> Self:
        """Keep the rows of a named slice.

        Raises:
            UsageError: There is none of that name, or its training samples are not known.
        """
        if name in self.slices:
            return self._rows(np.flatnonzero(self.slices[name]))
        if name in self.why_no_slice:
            raise UsageError(
                f"the training samples of slice {name!r} are not known: {self.why_no_slice[name]}"
            )
        known = ", ".join(sorted(self.slices)) or "none"
        raise UsageError(f"there is no slice {name!r} in this ledger; it has {known}")

    def only(self, ids: Iterable[int]) -> Self:
        """Keep the rows of these samples, in their order.

        Raises:
            UsageError: A sample is not in the ledger.
        """
        wanted = np.asarray(list(ids), dtype=np.int64)
        row_of = {int(sample): row for row, sample in enumerate(self.ids)}
        missing = [int(i) for i in wanted if int(i) not in row_of]
        if missing:
            raise UsageError(
                f"{len(missing)} samples are not among the {len(self)} of this ledger, {missing[0]} for one; an id is a position in "
                "the dataset under every Subset"
            )
        return self._rows(np.asarray([row_of[int(i)] for i in wanted], dtype=np.int64))

    def top(self, n: int, by: str, *, lowest: bool = False) -> Self:
        """Keep the ``n`` rows of greatest (or lowest) value in a column, the furthest first; ties in the order of ids.

        Raises:
            UsageError: There is no such column.
        """
        values = self.column(by)
        known = np.flatnonzero(~np.isnan(values))
        order = np.argsort(values[known] if lowest else -values[known], kind="stable")
        return self._rows(known[order[:n]])

    def quantiles(self, name: str, levels: Sequence[float] = LEVELS) -> tuple[float, ...]:
        """Return quantiles of a column over the rows that have a value; empty where none has.

        Raises:
            UsageError: There is no such column.
        """
        values = self.column(name)
        values = values[~np.isnan(values)]
        return tuple(np.quantile(values, levels).tolist()) if values.size else ()

    def table(self) -> dict[str, list[Any]]:
        """Return the rows as plain columns: whole numbers, true and false, None where a value is not known; a column a slice."""
        found = {name: _plain(name, values) for name, values in self.columns.items()}
        for name, members in self.slices.items():
            found[f"slice {name}"] = members.tolist()
        return found

    def write(
        self, path: str | os.PathLike[str], file_format: str | None = None, *, overwrite: bool = False
    ) -> Path:
        """Write the rows as CSV, JSON or Parquet; see :func:`automode.session.table_files.write_table`."""
        return write_table(path, self.table(), file_format, overwrite=overwrite)

    def _rows(self, rows: NDArray[np.int64]) -> Self:
        return replace(
            self,
            columns={name: values[rows] for name, values in self.columns.items()},
            slices={name: members[rows] for name, members in self.slices.items()},
        )


def read_ledger(session: Session) -> SampleTable:
    """Read the ledger of a session: the later of what a scan or the run's end left, and its last stored state.

    Raises:
        UsageError: The session holds none.
        SessionCorruptError: It is damaged.
    """
    from automode.session.ledger_file import read_file, read_state

    told, stored = read_file(session.path), None
    rows = [record.body for record in session.events(kind="checkpointed")]
    if rows and (told is None or rows[-1]["step"] > told.step):
        stored = read_state(session.path, rows[-1]["checkpoint"], int(rows[-1]["step"]), told)
    found = stored or told
    if found is None:
        raise UsageError(f"session {session.path.name} holds no sample ledger: {_why_none(session)}")
    return found


def _why_none(session: Session) -> str:
    for record in session.events(kind="session_started"):
        run = record.body["run"]
        if not run["has_ids"]:
            return f"its batches have no sample ids ({run['why_no_ids'] or 'this loader gives none'})"
        if not run["exact_losses"]:
            return f"it has no exact per-sample losses ({run['why_inexact'] or 'none were found'})"
    return "it has neither been scanned nor ended nor stored its state yet"


def _plain(name: str, values: Floats) -> list[Any]:
    if name in WHOLE:
        return [None if value != value else int(value) for value in values.tolist()]
    if name in FLAGS:
        return [None if value != value else bool(value) for value in values.tolist()]
    return [None if value != value else value for value in values.tolist()]


def check_columns(columns: Mapping[str, NDArray[Any]], where: Path) -> dict[str, Floats]:
    """Return columns as float64 in the order of :data:`COLUMNS`, others behind.

    Raises:
        SessionCorruptError: One is missing, or they are not of one length.
    """
    missing = [name for name in COLUMNS if name not in columns]
    sizes = {np.shape(values) for values in columns.values()}
    if missing or len(sizes) != 1 or len(next(iter(sizes))) != 1:
        lacks = f"lacks {', '.join(missing)}" if missing else "has columns of several lengths"
        raise SessionCorruptError(f"{where} is no sample ledger: it {lacks}")
    more = sorted((name for name in columns if name not in COLUMNS), key=_in_order)
    order = [*COLUMNS, *more]
    return {name: np.asarray(columns[name], dtype=np.float64) for name in order}


def _in_order(name: str) -> tuple[bool, int, str]:
    """Single columns first, those of an embedding by number."""
    head, _, number = name.rpartition("_")
    return (head == "embedding", int(number) if number.isdigit() else 0, name)
