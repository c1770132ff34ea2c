"""The list of samples that are probably mislabelled, for a person to review."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from automode.cli.sessions import session_argument
from automode.cli.tables import safe, table
from automode.errors import UsageError
from automode.session import Session
from automode.session.suspects import Suspects, read_suspects
from automode.session.table_files import ExportFormat, table_text, write_table

SHOWN = 20
"""Rows of the table in a terminal, unless told otherwise."""


@click.command()
@session_argument
@click.option(
    "--format",
    "file_format",
    type=click.Choice(get_args(ExportFormat)),
    help="All of the list, in this form.",
)
@click.option(
    "--out",
    metavar="FILE",
    help="Write the list to this file; its ending names the form unless --format does.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option("--step", type=click.IntRange(min=0), help="Step of the scan (default: the last scan).")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"So many of the most suspect; a table in the terminal shows {SHOWN}.",
)
def suspects(
    session: Path,
    file_format: str | None,
    out: str | None,
    overwrite: bool,
    step: int | None,
    limit: int | None,
) -> None:
    """List the samples that are probably mislabelled, for you to review.

    Each with its mean margin (AUM), mean loss and visits, the label that the data say and how many of its nearest other samples have it, and
    the label that the network says. The session of a run that abstained holds the list too.
    """
    with Session.open(session) as opened:
        found = read_suspects(opened, step)
    columns = {name: values[:limit] for name, values in found.columns.items()}
    if out is not None:
        path = write_table(out, columns, file_format, overwrite=overwrite)
        click.echo(f"{len(columns['sample_id'])} samples written to {path}")
    elif file_format == "parquet":
        raise UsageError("Parquet is no text: name a file with --out")
    elif file_format is not None:
        click.echo(table_text(columns, file_format).rstrip("\r\n"))  # type: ignore[arg-type]
    else:
        _show(found, SHOWN if limit is None else limit)


def _show(found: Suspects, limit: int) -> None:
    click.echo(f"scan of step {found.step}: {found.n} samples, {len(found)} of them suspects")
    click.echo(safe(found.why))
    if found.rule:
        click.echo(safe(f"label_noise {found.rule}"))
    if not len(found):
        return
    head = ["SAMPLE", "MARGIN", "LOSS", "VISITS", "LABEL", "NEAR", "NETWORK SAYS", "NEAR"]
    rows = [
        ["?" if value is None else str(value) if isinstance(value, int) else f"{value:.3g}" for value in row]
        for row in list(zip(*found.columns.values(), strict=True))[:limit]
    ]
    click.echo("")
    click.echo(table(head, rows, right=range(len(head))))
    if len(rows) < len(found):
        click.echo(
            f"\n{len(found) - len(rows)} more: --limit {len(found)}, or all of them with --out suspects.csv"
        )
