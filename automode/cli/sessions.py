"""Which session, which card: the arguments that most commands share."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from automode.errors import SessionError, UsageError
from automode.planner.card_text import from_yaml
from automode.planner.cards import PlanCard
from automode.planner.yaml_text import shown
from automode.session import CardRow, Session

RUNS: Final = "automode-runs"
"""Where runs put their sessions unless they are told otherwise."""

LAST: Final = "last"
_DATABASE: Final = "session.db"

F = TypeVar("F", bound=Callable[..., Any])


def newest(runs: Path) -> Path:
    """Return the session that was written last.

    Args:
        runs: Folder of sessions: ``<project>/<run>``, or a run directly.

    Raises:
        SessionError: There is none.
    """
    found = [*runs.glob(f"*/{_DATABASE}"), *runs.glob(f"*/*/{_DATABASE}")]
    if not found:
        raise SessionError(f"there is no session under {runs}; give the folder that the run printed")
    return max(found, key=_written).parent


def _written(database: Path) -> tuple[float, str]:
    # While a run writes, the newest rows stand in the write-ahead log beside the database.
    beside = database.with_name(f"{database.name}-wal")
    times = []
    for file in (database, beside):
        with contextlib.suppress(FileNotFoundError):  # the log goes when the run ends, which may be now
            times.append(file.stat().st_mtime)
    return max(times, default=0.0), str(database)


def session_argument(command: F) -> F:
    """Add the argument SESSION: a folder, or ``last`` for the session under ``automode-runs`` that was written last."""
    return click.argument("session", metavar="SESSION", callback=_folder)(command)


def _folder(_context: click.Context, _parameter: click.Parameter, value: str) -> Path:
    # Whether it holds a session is told when it is opened.
    return newest(Path(RUNS)) if value == LAST else Path(value)


def session_named(given: str | None, name: str) -> Path:
    """Return the folder of a session that is given, or else found by its name under ``automode-runs``.

    Args:
        given: A folder, ``last``, or None.
        name: The session's name, where none is given.

    Raises:
        UsageError: None is given, and there is no such session, or several.
    """
    if given is not None:
        return newest(Path(RUNS)) if given == LAST else Path(given)
    runs = Path(RUNS)
    found = [file.parent for file in (*runs.glob(f"*/{_DATABASE}"), *runs.glob(f"*/*/{_DATABASE}"))]
    mine = [folder for folder in found if folder.name == name]
    if len(mine) == 1:
        return mine[0]
    raise UsageError(
        f"{len(mine) or 'no'} session{'s are' if mine else ' is'} called {shown(name)} under {RUNS}; give its folder: "
        "automode apply FILE SESSION"
    )


def card_argument(command: F) -> F:
    """Add the argument CARD."""
    return click.argument("card", metavar="CARD")(command)


def find_card(session: Session, wanted: str) -> CardRow:
    """Return the latest row of a card by its id, or by the beginning of its id where only one fits.

    Raises:
        UsageError: No card fits, or several do.
    """
    rows = session.cards()
    fits = [row for row in rows if row.card_id.startswith(wanted)] if wanted else []
    exact = [row for row in fits if row.card_id == wanted]
    if len(exact or fits) == 1:
        return (exact or fits)[0]
    known = [row.card_id for row in rows]
    if fits:
        raise UsageError(
            f"{len(fits)} cards begin with {wanted!r}: {', '.join(r.card_id for r in fits)}; give more of the id"
        )
    if not known:
        raise UsageError(f"there is no card {wanted!r}: this session has none")
    close = difflib.get_close_matches(wanted, known, n=1)
    guess = f" did you mean {close[0]}?" if close else ""
    raise UsageError(f"there is no card {wanted!r} in this session;{guess} its cards: {', '.join(known)}")


def card_of(row: CardRow) -> PlanCard:
    """Read the card that a row holds."""
    return from_yaml(row.body)
