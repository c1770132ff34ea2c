"""The sample ledger: how each training sample has fared, gathered from the training forward passes at no extra pass.

Per sample id it keeps the number of visits, the mean, the last and an exponential average of the loss, the mean margin
(AUM, Pleiss et al. 2020) and how often the sample went from right to wrong (forgetting, Toneva et al. 2019) or back.
Arrays are dense, 33 bytes a sample, indexed by sample id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from automode.errors import DataError, UsageError
from automode.session.table_files import ExportFormat, write_table

Metric = Literal["mean_loss", "last_loss", "ema_loss", "margin"]
METRICS: tuple[Metric, ...] = get_args(Metric)

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

_MOST_SHORT_RUNS = 2
_DTYPES: dict[str, Any] = {
    "count": np.int32,
    "mean_loss": np.float32,
    "last_loss": np.float32,
    "ema_loss": np.float32,
    "margin": np.float32,
    "flips": np.int32,
    "forgetting": np.int32,
    "last_correct": np.bool_,
}


class SampleLedger:
    """What training has shown about each sample.

    Args:
        length: Samples in the root dataset; ids outside are refused. None: grow with the ids seen.
        fingerprint: Fingerprint of the root dataset, without which ids mean nothing.
        ema_decay: Weight of the past in the exponential average, per visit, in [0, 1).

    Attributes:
        has_margins: Margins (and right or wrong) were given; without them ``margin`` has no values.
        skipped: Visits left out because their loss or margin was not finite (an ignored target, a diverged step).
    """

    def __init__(self, length: int | None, *, fingerprint: str | None = None, ema_decay: float = 0.7) -> None:
        if not 0 <= ema_decay < 1:
            raise UsageError(f"ema_decay is {ema_decay}, but must be in [0, 1)")
        self.length = length
        self.fingerprint = fingerprint
        self.ema_decay = ema_decay
        self.has_margins = False
        self.skipped = 0
        self._filled = False
        size = length or 0
        self._columns: dict[str, npt.NDArray[Any]] = {k: np.zeros(size, d) for k, d in _DTYPES.items()}
        self._slot = np.zeros(size, np.int32)

    @property
    def n_seen(self) -> int:
        """Samples visited at least once."""
        return int(np.count_nonzero(self._columns["count"]))

    @property
    def visits(self) -> int:
        """Visits of all samples together."""
        return int(self._columns["count"].sum(dtype=np.int64))

    def seen(self) -> Ids:
        """Give the ids visited at least once, ascending."""
        return np.flatnonzero(self._columns["count"]).astype(np.int64, copy=False)

    def column(self, name: str, ids: Ids | None = None) -> npt.NDArray[Any]:
        """Give one column.

        Args:
            name: ``count``, a :data:`Metric`, ``flips``, ``forgetting`` or ``last_correct``.
            ids: Samples to give it for; None: the whole array by id.

        Returns:
            A copy; losses and margins of samples never visited, and margins where none were given, are NaN.

        Raises:
            UsageError: No such column.
        """
        if name not in self._columns:
            raise UsageError(f"the sample ledger has no column {name!r}; it has {', '.join(self._columns)}")
        where: Any = slice(None) if ids is None else ids
        values = np.array(self._columns[name][where])
        if values.dtype == np.float32:
            unknown = self._columns["count"][where] == 0
            values[unknown if name != "margin" or self.has_margins else slice(None)] = np.nan
        return values

    def update(self, ids: Ids, losses: Floats, margins: Floats | None, correct: Flags | None) -> None:
        """Enter visits, in order; an id may occur more than once.

        Args:
            ids: Sample ids [n].
            losses: Loss at each visit [n].
            margins: Margin at each visit [n], or None for tasks without one. Given always or never.
            correct: Whether each visit was right [n]; None exactly when ``margins`` is.

        Raises:
            DataError: An id is outside the dataset, or margins come and go.
        """
        came = margins is not None
        if came != (correct is not None) or (self._filled and came != self.has_margins):
            raise DataError(
                "margins and correctness must both be given at every update of a ledger, or at none"
            )
        if not len(ids):
            return
        self._make_room(int(ids.min()), int(ids.max()))
        usable = np.isfinite(losses) if margins is None else np.isfinite(losses) & np.isfinite(margins)
        if not usable.all():
            self.skipped += int(np.count_nonzero(~usable))
            ids, losses = ids[usable], losses[usable]
            margins = None if margins is None else margins[usable]
            correct = None if correct is None else correct[usable]
            if not len(ids):
                return
        self.has_margins, self._filled = came, True
        short_runs = 0
        while len(ids) and short_runs < _MOST_SHORT_RUNS:
            # A shuffled epoch repeats nothing, so that runs of distinct ids are long, save one cut by an epoch's end.
            run = self._distinct_run(ids)
            self._enter_distinct(*_taken(slice(run), ids, losses, margins, correct))
            short_runs += run * 8 < len(ids)
            ids, losses, margins, correct = _taken(slice(run, None), ids, losses, margins, correct)
        if len(ids):
            self._enter_grouped(ids, losses, margins, correct)

    def quantiles(self) -> dict[Metric, tuple[float, ...]]:
        """Give 101 quantiles (0 %, 1 % ... 100 %) of each metric over the samples seen.

        Returns:
            By metric; ``margin`` only where there are margins. Empty while nothing was seen.
        """
        ids = self.seen()
        if not len(ids):
            return {}
        levels = np.linspace(0.0, 1.0, 101)
        return {
            metric: tuple(np.quantile(self._columns[metric][ids].astype(np.float64), levels).tolist())
            for metric in METRICS
            if metric != "margin" or self.has_margins
        }

    def ids_in_quantile(self, metric: Metric, lo: float, hi: float) -> Ids:
        """Give the samples whose rank by a metric lies between two quantiles.

        Args:
            metric: What to rank by, ascending; equal values rank by id.
            lo: Lower quantile in [0, 1], included.
            hi: Upper quantile in [0, 1], above ``lo``; excluded, so that adjoining ranges share no sample.

        Returns:
            Ids, ascending: those of the n seen whose rank r has ``lo <= r / n < hi``.

        Raises:
            UsageError: Unknown metric, or quantiles out of order.
            DataError: Margins are asked for and there are none.
        """
        if metric not in METRICS:
            raise UsageError(f"the metric is {metric!r}, but must be one of {', '.join(METRICS)}")
        if not 0 <= lo < hi <= 1:
            raise UsageError(f"the quantiles are {lo} to {hi}, but must satisfy 0 <= from < to <= 1")
        if metric == "margin" and not self.has_margins:
            raise DataError("this task has no margins, so samples cannot be ranked by them")
        ids = self.seen()
        order = np.argsort(self._columns[metric][ids], kind="stable")
        first, last = (int(np.ceil(round(share * len(ids), 9))) for share in (lo, hi))
        return np.sort(ids[order[first:last]])

    def state(self) -> dict[str, Any]:
        """Give everything, as plain values and numpy arrays, for :meth:`from_state`."""
        return {
            "length": self.length,
            "fingerprint": self.fingerprint,
            "ema_decay": self.ema_decay,
            "has_margins": self.has_margins,
            "skipped": self.skipped,
            "columns": {name: column.copy() for name, column in self._columns.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> SampleLedger:
        """Make a ledger from :meth:`state`.

        Raises:
            DataError: Columns are missing, or not of one length and the right type.
        """
        ledger = cls(state["length"], fingerprint=state["fingerprint"], ema_decay=state["ema_decay"])
        ledger.has_margins, ledger.skipped = bool(state["has_margins"]), int(state["skipped"])
        columns = state["columns"]
        sizes = {np.shape(column) for column in columns.values()}
        if set(columns) != set(_DTYPES) or len(sizes) != 1 or len(size := sizes.pop()) != 1:
            raise DataError(f"a ledger state needs the columns {', '.join(_DTYPES)}, all of one length")
        if ledger.length is not None and size[0] != ledger.length:
            raise DataError(
                f"a ledger state of {size[0]} samples cannot be one of a dataset of {ledger.length}"
            )
        for name, dtype in _DTYPES.items():
            column = np.array(columns[name])
            if column.dtype != dtype:
                raise DataError(
                    f"column {name} of a ledger state is {column.dtype}, but must be {np.dtype(dtype)}"
                )
            ledger._columns[name] = column
        ledger._slot = np.zeros(size[0], np.int32)
        ledger._filled = bool(ledger._columns["count"].any())
        return ledger

    def _make_room(self, low: int, high: int) -> None:
        size = len(self._slot)
        if low < 0 or (self.length is not None and high >= self.length):
            bound = "" if self.length is None else f", outside a dataset of {self.length} samples"
            raise DataError(f"sample ids from {low} to {high} came{bound or '; they must not be negative'}")
        if high < size:
            return
        grown = max(high + 1, 2 * size)
        for name, column in self._columns.items():
            self._columns[name] = np.concatenate([column, np.zeros(grown - size, column.dtype)])
        self._slot = np.zeros(grown, np.int32)

    def _distinct_run(self, ids: Ids) -> int:
        """Give how many ids are known to come before the first one that occurred already."""
        # No run is longer than there are ids.
        ids = ids[: len(self._slot)]
        # Written back to front, each id's slot ends up with its first place.
        places = np.arange(len(ids), dtype=np.int32)
        self._slot[ids[::-1]] = places[::-1]
        repeats = self._slot[ids] != places
        first = int(repeats.argmax())
        return first if repeats[first] else len(ids)

    def _enter_grouped(self, ids: Ids, losses: Floats, margins: Floats | None, correct: Flags | None) -> None:
        """Enter visits with many repeats: each id's visits in order, in closed form."""
        columns = self._columns
        order = np.argsort(ids, kind="stable")
        ranked = ids[order]
        starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
        unique = ranked[starts]
        times = np.diff(np.append(starts, len(ids)))
        ends = starts + times - 1
        seen = columns["count"][unique]
        count = seen + times
        columns["count"][unique] = count
        loss = losses[order].astype(np.float64)
        columns["last_loss"][unique] = loss[ends]
        columns["mean_loss"][unique] = (
            columns["mean_loss"][unique] * seen + np.add.reduceat(loss, starts)
        ) / count
        # The average after visits x_1 .. x_m is d^m e + (1 - d) sum d^(m-i) x_i; the first visit of all sets e.
        age = np.repeat(ends, times) - np.arange(len(ids))
        weight = (1 - self.ema_decay) * np.power(self.ema_decay, age)
        fresh = seen == 0
        weight[starts[fresh]] = np.power(self.ema_decay, age[starts[fresh]])
        kept = np.power(self.ema_decay, times) * columns["ema_loss"][unique]
        columns["ema_loss"][unique] = np.add.reduceat(weight * loss, starts) + np.where(fresh, 0.0, kept)
        if margins is None or correct is None:
            return
        total = np.add.reduceat(margins[order], starts, dtype=np.float64)
        columns["margin"][unique] = (columns["margin"][unique] * seen + total) / count
        now = correct[order]
        was = np.concatenate([[False], now[:-1]])
        was[starts] = columns["last_correct"][unique]
        flipped = was != now
        flipped[starts] &= ~fresh
        columns["flips"][unique] += np.add.reduceat(flipped, starts, dtype=np.int32)
        columns["forgetting"][unique] += np.add.reduceat(flipped & was, starts, dtype=np.int32)
        columns["last_correct"][unique] = now[ends]

    def _enter_distinct(
        self, ids: Ids, losses: Floats, margins: Floats | None, correct: Flags | None
    ) -> None:
        """Enter visits of distinct ids."""
        columns = self._columns
        count = columns["count"][ids]
        count += 1
        columns["count"][ids] = count
        share = np.reciprocal(count, dtype=np.float32)
        mean = columns["mean_loss"][ids]
        mean += (losses - mean) * share
        columns["mean_loss"][ids] = mean
        columns["last_loss"][ids] = losses
        # A first visit sets the average.
        ema = columns["ema_loss"][ids]
        weight = np.where(count == 1, np.float32(1), np.float32(1 - self.ema_decay))
        ema += (losses - ema) * weight
        columns["ema_loss"][ids] = ema
        if margins is None or correct is None:
            return
        margin = columns["margin"][ids]
        margin += (margins - margin) * share
        columns["margin"][ids] = margin
        was = columns["last_correct"][ids]
        columns["last_correct"][ids] = correct
        flipped = (was != correct) & (count > 1)
        columns["flips"][ids[flipped]] += 1
        columns["forgetting"][ids[flipped & was]] += 1


def _taken(
    where: slice, ids: Ids, losses: Floats, margins: Floats | None, correct: Flags | None
) -> tuple[Ids, Floats, Floats | None, Flags | None]:
    return (
        ids[where],
        losses[where],
        None if margins is None else margins[where],
        None if correct is None else correct[where],
    )


def export_samples(
    ledger: SampleLedger,
    path: str | os.PathLike[str],
    ids: Ids,
    file_format: ExportFormat | None = None,
    *,
    extra: Mapping[str, Sequence[Any]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the ledger's rows of some samples to a file, for people and other tools to read.

    Args:
        ledger: The ledger.
        path: File to write; its folder must exist.
        ids: Samples, one row each, in this order.
        file_format: ``csv``, ``json`` (a list of objects) or ``parquet`` (needs pyarrow). None: by the file's ending.
        extra: More columns by name, one value a sample (a label, a cluster).
        overwrite: Whether an existing file may be replaced.

    Returns:
        The path written. What is unknown (a sample never seen) is empty in CSV and null elsewhere.

    Raises:
        UsageError: Unknown format, the file exists, or an extra column has another length.
        NotExecutableError: Parquet without pyarrow.
    """
    table: dict[str, list[Any]] = {"sample_id": ids.tolist()}
    for name in _DTYPES:
        table[name] = [None if value != value else value for value in ledger.column(name, ids).tolist()]
    for name, values in (extra or {}).items():
        if len(values) != len(ids) or name in table:
            raise UsageError(f"the extra column {name!r} needs {len(ids)} values and a name of its own")
        table[name] = list(values)
    return write_table(path, table, file_format, overwrite=overwrite)
