"""Handing a card to the script that it ran in: ``Trainer.fit`` there runs the card again in place of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from automode.errors import AutomodeError, UsageError
from automode.planner.yaml_text import shown

CARD: Final = "AUTOMODE_EXECUTE_CARD"
REPORT: Final = "AUTOMODE_EXECUTE_REPORT"
"""What the trainer reads; :mod:`automode.trainer.executing` says how."""

_CALL: Final = (
    "import importlib, sys; module, _, name = sys.argv.pop(1).partition(':'); "
    "function = getattr(importlib.import_module(module), name); function()"
)


def execute(session: Path, card: str, target: str, arguments: Sequence[str]) -> bool:
    """Run a script in a process of its own, with the card to run again in its environment; its output is shown as it comes.

    Args:
        session: The session's folder.
        card: The card's whole id.
        target: A script, or ``module:function``, called without arguments.
        arguments: Of the script.

    Returns:
        Whether the outcome was the same.

    Raises:
        UsageError: There is no such script.
        AutomodeError: The script ended without running the card.
    """
    command = _command(target, arguments)
    with tempfile.TemporaryDirectory(prefix="automode-report-") as folder:
        report = Path(folder) / "report.json"
        environment = os.environ | {CARD: f"{session.resolve()}:{card}", REPORT: str(report)}
        click.echo(f"running card {card} again in {shown(target, 200)}")
        done = subprocess.run(command, env=environment, check=False)  # noqa: S603  # the person's own script
        if report.is_file():
            return bool(json.loads(report.read_text(encoding="utf-8"))["same"])
    if done.returncode:
        raise AutomodeError(
            f"{shown(target, 200)} ended with exit code {done.returncode} before the card had run again"
        )
    raise AutomodeError(f"{shown(target, 200)} ended without calling Trainer.fit, so nothing was run again")


def _command(target: str, arguments: Sequence[str]) -> list[str]:
    if Path(target).is_file():
        return [sys.executable, target, *arguments]
    module, colon, function = target.partition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return [sys.executable, "-c", _CALL, target, *arguments]
    raise UsageError(
        f"--execute takes a script, or module:function, and {shown(target, 200)!r} is neither a file nor of that form"
    )
