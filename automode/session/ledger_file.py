"""Where a session keeps its sample ledger: one file, replaced as the run goes on, and inside the run's stored states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from automode.errors import SessionCorruptError, SessionError
from automode.session.database import storage_errors
from automode.session.durable_files import replace_synced
from automode.session.sample_table import COLUMNS, Moment, SampleTable, check_columns

LEDGER_NAME: Final = "ledger.safetensors"
FORMAT: Final = "automode-ledger/1"

_SLICE: Final = "slice/"
_FROM_TRAINING: Final = (
    "mean_loss",
    "last_loss",
    "ema_loss",
    "margin",
    "flips",
    "forgetting",
    "last_correct",
)


def write_file(folder: Path, table: SampleTable) -> Path:
    """Put a ledger in the place of the one before, whole or not at all.

    Args:
        folder: The session's.
        table: The whole ledger.

    Returns:
        The file.

    Raises:
        SessionError: The disk refused; the file of before stands.
    """
    from safetensors.numpy import save

    arrays = {name: _packed(name, values) for name, values in table.columns.items()}
    arrays |= {_SLICE + name: members.astype(np.bool_) for name, members in table.slices.items()}
    about = {
        "format": FORMAT,
        "step": str(table.step),
        "moment": table.moment,
        "why_no_slice": json.dumps(dict(table.why_no_slice)),
        "why_no_column": json.dumps(dict(table.why_no_column)),
    }
    path = folder / LEDGER_NAME
    with storage_errors(folder, "storing the sample ledger"):
        replace_synced(path, save(arrays, metadata=about))
    return path


def read_file(folder: Path) -> SampleTable | None:
    """Read what :func:`write_file` wrote; None where there is nothing.

    Raises:
        SessionCorruptError: The file is damaged.
        SessionError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / LEDGER_NAME
    if not path.is_file():
        return None
    try:
        with storage_errors(folder, "reading the sample ledger"), safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return _unpacked(path, about, arrays)
    except (SafetensorError, KeyError, ValueError) as error:
        raise SessionCorruptError(f"{path} is no sample ledger: {error}") from error


def forget_later(folder: Path, step: int) -> None:
    """Remove the file where it speaks of a later step than the one that the run goes on from: that story was left.

    Raises:
        SessionError: The disk refused.
    """
    try:
        told = read_file(folder)
        keep = told is None or told.step <= step
    except SessionCorruptError:
        keep = False
    if not keep:
        with storage_errors(folder, "removing a sample ledger of later steps"):
            (folder / LEDGER_NAME).unlink(missing_ok=True)


def read_state(folder: Path, digest: str, step: int, told: SampleTable | None) -> SampleTable | None:
    """Read the ledger out of a stored state of the run; None where that state is gone, or holds none.

    Args:
        folder: The session's.
        digest: The checkpoint's.
        step: The trunk's step at it.
        told: The last ledger that was written as a file: it knows suspects and slices.

    Raises:
        SessionCorruptError: The checkpoint is damaged.
    """
    from automode.session.checkpoints import CheckpointStore  # needs PyTorch, which the file does not

    try:
        _, rest, _ = CheckpointStore(folder / "checkpoints").load(digest)
    except SessionCorruptError:
        raise
    except SessionError:
        return None
    feed = rest.get("probe", {}).get("feed")
    if feed is None:
        return None
    stored = {name: column.numpy() for name, column in feed["ledger"]["columns"].items()}
    count = stored["count"].astype(np.float64)
    ids = np.flatnonzero(count) if told is None else np.union1d(np.flatnonzero(count), told.ids)
    columns = ledger_columns(stored, ids, has_margins=bool(feed["ledger"]["has_margins"]))
    curated = {"left_out": rest.get("excluded"), "relabelled": rest.get("relabelled")}
    for name, value in curated.items():
        listed = np.empty(0) if value is None else value.numpy()
        columns[name] = np.isin(ids, listed if listed.ndim == 1 else listed[:, 0]).astype(np.float64)
    slices: dict[str, NDArray[np.bool_]] = {}
    if told is not None:
        known = np.isin(ids, told.ids)
        columns["suspect"][known] = told.column("suspect")
        for name, members in told.slices.items():
            slices[name] = np.zeros(ids.size, dtype=np.bool_)
            slices[name][known] = members
    return SampleTable(
        step=step,
        moment="checkpoint",
        columns=columns,
        slices=slices,
        why_no_slice={} if told is None else told.why_no_slice,
        total=int(ids.size),
        pending=len(feed["visits"]),
    )


def ledger_columns(
    stored: Mapping[str, NDArray[Any]], ids: NDArray[np.int64], *, has_margins: bool
) -> dict[str, NDArray[np.float64]]:
    """Return the columns of :data:`COLUMNS` for some samples, from the run's arrays by sample id.

    Args:
        stored: ``count`` and the metrics, dense, indexed by id.
        ids: Ascending.
        has_margins: Whether there are margins, and right and wrong.
    """
    inside = ids[ids < stored["count"].size]
    columns = {name: np.full(ids.size, np.nan) for name in COLUMNS}
    columns["sample_id"] = ids.astype(np.float64)
    columns["visits"] = np.zeros(ids.size)
    rows = slice(0, inside.size)  # ids ascend, so that those beyond the arrays come last
    columns["visits"][rows] = stored["count"][inside]
    seen = columns["visits"] > 0
    for name in _FROM_TRAINING:
        if has_margins or name.endswith("_loss"):
            columns[name][rows] = stored[name][inside]
            columns[name][~seen] = np.nan
    for name in ("left_out", "relabelled"):
        columns[name] = np.zeros(ids.size)
    return columns


def _packed(name: str, values: NDArray[np.float64]) -> NDArray[Any]:
    """Losses were single precision in the run; ids need more."""
    return values if name == "sample_id" else values.astype(np.float32)


def _unpacked(path: Path, about: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> SampleTable:
    if about.get("format") != FORMAT:
        raise SessionCorruptError(
            f"{path} has format {about.get('format')!r}, and this version reads {FORMAT}"
        )
    moment = about["moment"]
    if moment not in ("scan", "end"):
        raise SessionCorruptError(f"{path} is no sample ledger: it is of {moment!r}")
    columns = check_columns({n: v for n, v in arrays.items() if not n.startswith(_SLICE)}, path)
    slices = {n.removeprefix(_SLICE): v for n, v in arrays.items() if n.startswith(_SLICE)}
    if any(v.shape != columns["sample_id"].shape or v.dtype != np.bool_ for v in slices.values()):
        raise SessionCorruptError(f"{path} is no sample ledger: a slice does not fit its rows")
    return SampleTable(
        step=int(about["step"]),
        moment=cast("Moment", moment),
        columns=columns,
        slices={name: slices[name] for name in sorted(slices)},
        why_no_slice=json.loads(about["why_no_slice"]),
        why_no_column=json.loads(about["why_no_column"]),
        total=int(columns["sample_id"].size),
    )
