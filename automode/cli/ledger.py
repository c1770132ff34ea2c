"""The sample ledger on the command line: how each training sample has fared, any slice of it, as a table or a file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import get_args

import click
import numpy as np

from automode.cli.sessions import session_argument
from automode.cli.tables import safe, table
from automode.errors import UsageError
from automode.session import Session
from automode.session.sample_table import FLAGS, SampleTable
from automode.session.table_files import ExportFormat, table_text

SHOWN = 20
"""Rows of the table in a terminal."""

_SUMMED = ("visits", "mean_loss", "last_loss", "ema_loss", "margin", "flips", "forgetting", "gradient_norm")
_LISTED = (
    "visits",
    "mean_loss",
    "ema_loss",
    "margin",
    "flips",
    "forgetting",
    "last_correct",
    "suspect",
    "left_out",
)
_QUANTILES = ("LEAST", "5 %", "25 %", "MEDIAN", "75 %", "95 %", "GREATEST")


@click.command()
@session_argument
@click.option("--slice", "slice_name", metavar="NAME", help="Only the training samples of this slice.")
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help='Only samples that meet it, such as "aum < 0 and visits >= 2"; again for more, all of which must hold.',
)
@click.option(
    "--ids",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Only the samples of this file: an id a line, a CSV with a column sample_id, or a JSON list.",
)
@click.option("--top", type=click.IntRange(min=1), help="So many of greatest --by.")
@click.option("--bottom", type=click.IntRange(min=1), help="So many of lowest --by.")
@click.option("--by", default="mean_loss", help="Column that --top and --bottom go by (default: mean_loss).")
@click.option(
    "--format",
    "file_format",
    type=click.Choice(get_args(ExportFormat)),
    help="All of the samples, in this form.",
)
@click.option(
    "--out",
    metavar="FILE",
    help="Write the samples to this file; its ending names the form unless --format does.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
def ledger(
    session: Path,
    slice_name: str | None,
    where: tuple[str, ...],
    ids: Path | None,
    top: int | None,
    bottom: int | None,
    by: str,
    file_format: str | None,
    out: str | None,
    overwrite: bool,
) -> None:
    """Show or export how each training sample has fared, all of them or a slice.

    Visits, mean, last and average loss, mean margin (AUM), flips and forgetting of every training sample, whether it is a suspect, left
    out or relabelled, and the slices that it belongs to. The ledger is that of the run's end, of the last scan, or of the last
    stored state of the run, whichever is latest; the first line says which.
    """
    if top is not None and bottom is not None:
        raise UsageError("--top and --bottom ask for two things: give one of them")
    with Session.open(session) as opened:
        found = opened.ledger()
    if slice_name is not None:
        found = found.in_slice(slice_name)
    for condition in where:
        found = found.where(condition)
    if ids is not None:
        found = found.only(_ids_in(ids))
    limit = top or bottom
    if limit is not None:
        found = found.top(limit, by, lowest=bottom is not None)
    if out is not None:
        path = found.write(out, file_format, overwrite=overwrite)
        click.echo(f"{len(found)} of {found.total} samples written to {path}, {found.told}")
    elif file_format == "parquet":
        raise UsageError("Parquet is no text: name a file with --out")
    elif file_format is not None:
        click.echo(table_text(found.table(), file_format).rstrip("\r\n"))  # type: ignore[arg-type]
    else:
        _show(found, listed=limit is not None or ids is not None)


def _show(found: SampleTable, *, listed: bool) -> None:
    click.echo(f"{len(found)} of {found.total} samples, {found.told}")
    flags = [f"{name} {int((found.column(name) == 1.0).sum())}" for name in sorted(FLAGS - {"last_correct"})]
    click.echo(", ".join(flags))
    for name, why in {**found.why_no_slice, **found.why_no_column}.items():
        click.echo(safe(f"{name}: not known: {why}"))
    if not len(found):
        return
    click.echo("\n" + _quantiles(found))
    if found.slices:
        click.echo("\n" + _slices(found))
    if listed:
        click.echo("\n" + _rows(found))


def _quantiles(found: SampleTable) -> str:
    rows = []
    for name in _SUMMED:
        values = found.quantiles(name) if name in found.columns else ()
        if values:
            known = int(np.count_nonzero(~np.isnan(found.column(name))))
            rows.append([name, str(known), *(f"{value:.4g}" for value in values)])
    return table(["COLUMN", "SAMPLES", *_QUANTILES], rows, right=range(1, 2 + len(_QUANTILES)))


def _slices(found: SampleTable) -> str:
    rows = []
    for name in sorted(found.slices):
        mine = found.in_slice(name)
        medians = [mine.quantiles(column, (0.5,)) for column in ("mean_loss", "ema_loss", "margin")]
        suspects = int((mine.column("suspect") == 1.0).sum())
        told = [f"{m[0]:.4g}" if m else "?" for m in medians]
        rows.append([name, str(len(mine)), *told, str(suspects)])
    head = ["SLICE", "SAMPLES", "MEDIAN LOSS", "MEDIAN EMA LOSS", "MEDIAN MARGIN", "SUSPECTS"]
    return table(head, rows, right=range(1, len(head)))


def _rows(found: SampleTable) -> str:
    plain = found.table()
    names = ["sample_id", *_LISTED, *(["gradient_norm"] if "gradient_norm" in plain else [])]
    cells = zip(*(plain[name][:SHOWN] for name in names), strict=True)
    rows = [[_cell(value) for value in row] for row in cells]
    text = table([name.upper().replace("_", " ") for name in names], rows, right=range(len(names)))
    more = len(found) - SHOWN
    return text if more <= 0 else f"{text}\n\n{more} more: all of them with --out samples.csv"


def _cell(value: object) -> str:
    match value:
        case None:
            return "?"
        case bool():
            return "yes" if value else "no"
        case int():
            return str(value)
        case _:
            return f"{value:.3g}"


def _ids_in(path: Path) -> list[int]:
    """Read sample ids from a file.

    Raises:
        UsageError: It holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return [
                _whole(item["sample_id"] if isinstance(item, dict) else item) for item in json.loads(text)
            ]
        lines = text.splitlines()
        if lines and "sample_id" in next(csv.reader([lines[0]])):
            return [_whole(row["sample_id"]) for row in csv.DictReader(io.StringIO(text))]
        return [_whole(line) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} holds no sample ids ({type(error).__name__}: {error}): give an id a line, a CSV with a column sample_id, or a JSON list"
        ) from error


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError(f"{value!r} is no id")
    return int(value)
