"""Where a session lives: ``<session_dir>/<project>/<run_name>-<timestamp>-<short id>``."""

from __future__ import annotations

import os
import secrets
import unicodedata
from datetime import UTC, datetime
from pathlib import Path

from automode.errors import SessionError, UsageError
from automode.session.database import storage_errors

MAX_NAME = 48
_WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))]
)
_TRIES = 16


def slug(text: str, *, what: str) -> str:
    """A file name that says what ``text`` says: letters, digits, ``-``, ``_`` and single dots, at most 48 characters.

    Letters of every script are kept; separators, control characters and everything else become ``-``, so that the
    result can leave no folder. Different texts may have the same slug.

    Args:
        text: What the user calls it.
        what: What it is the name of, for the error.

    Raises:
        UsageError: Nothing is left, since there is no letter or digit in it.
    """
    if not isinstance(text, str):
        raise UsageError(f"{what} must be a string, got {type(text).__name__}")
    kept = [c if c.isalnum() or c in "_." else "-" for c in unicodedata.normalize("NFKC", text)]
    name = "".join(kept)
    for run in ("-", "."):
        while run * 2 in name:
            name = name.replace(run * 2, run)
    name = name[:MAX_NAME].strip("-._")
    if not any(c.isalnum() for c in name):
        raise UsageError(f"{what} needs at least one letter or digit to be a folder's name, got {text!r}")
    if name.split(".")[0].casefold() in _WINDOWS_DEVICES:
        name = f"_{name}"
    return name


def new_session_folder(
    session_dir: str | os.PathLike[str], project: str, run_name: str, *, now: datetime | None = None
) -> Path:
    """Make a fresh, empty folder for a session.

    Args:
        session_dir: Where all sessions live; made if it is missing; ``~`` is the home folder.
        project: Becomes a folder.
        run_name: Begins the session's folder name.
        now: The time in the name; None: the present, in UTC.

    Returns:
        The folder. It did not exist before: no folder is ever used twice.

    Raises:
        UsageError: A name without a letter or digit.
        SessionError: The folder cannot be made.
    """
    project_name, run = slug(project, what="project"), slug(run_name, what="run_name")
    stamp = (datetime.now(UTC) if now is None else now).strftime("%Y%m%d-%H%M%S")
    parent = Path(session_dir).expanduser() / project_name
    with storage_errors(parent, "making the session folder"):
        parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            folder = parent / f"{run}-{stamp}-{secrets.token_hex(3)}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    raise SessionError(
        f"no free name for a session in {parent} after {_TRIES} tries; choose another run_name"
    )
