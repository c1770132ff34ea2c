"""What a session says about being taken up again: whether it has ended, from which records it can go on, by which command."""

from __future__ import annotations

from typing import Any

from automode.session.records import Record
from automode.session.session import Session

ENVIRONMENT = "AUTOMODE_RESUME"
"""Names the session that ``automode resume`` takes up; heeded once, by the fit of the same project and run name."""

_CHECKPOINTED, _ENDED = "checkpointed", "run_ended"


def is_finished(session: Session) -> bool:
    """Tell whether a run has come to its end: then its final weights are stored, and nobody had stopped it early."""
    ended = [record.body for record in session.events(_ENDED)]
    return any(body.get("weights") is not None and not body.get("early") for body in ended)


def checkpointed(session: Session) -> list[Record]:
    """The records of stored run states that still count, oldest first; the states themselves may have been deleted since."""
    return list(session.events(_CHECKPOINTED))


def ever_checkpointed(session: Session) -> list[Record]:
    """The same, with those that a resumption has superseded."""
    return list(session.events(_CHECKPOINTED, include_superseded=True))


def command_of(header: dict[str, Any]) -> tuple[list[str], str] | None:
    """The command line that a session was begun with, and the folder that it was run in; None where it cannot be run again."""
    started = header.get("started")
    if not isinstance(started, dict) or not started.get("arguments"):
        return None
    return [str(started["executable"]), *map(str, started["arguments"])], str(started["cwd"])
