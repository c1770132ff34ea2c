"""What it takes to leave a run where it stands, and go on from another of its states."""

from __future__ import annotations

from dataclasses import dataclass

from automode.trainer.control import Ticket
from automode.trainer.resuming import Found


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """Another state of the session that the run goes on from.

    Attributes:
        found: The state.
        ticket: The order behind it.
        redo: Whether the order itself is still to be carried out there.
        paused: Whether the run waits there.
    """

    found: Found
    ticket: Ticket
    redo: bool
    paused: bool
