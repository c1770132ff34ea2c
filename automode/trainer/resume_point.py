"""Where a run is taken up again: a checkpoint, the record of the log that it belongs to, and what the driver needs back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A step boundary that a run can be taken up from.

    Attributes:
        session: The session's folder.
        checkpoint: ``sha256:...`` of the run's state at that boundary.
        at_seq: The record of the log that says that this checkpoint is durable; what came after it is superseded.
        step: Optimizer steps completed there.
        rows: Rows of the trunk's frame up to there; the next row gets this number.
        exact: Whether what follows equals the run that was cut, bit for bit.
        why_approximate: What is not exact, and why; None where everything is.
        actor: Who had the state loaded; None: a run that was cut goes on.
        driver: What the driver's ``state_for_checkpoint()`` gave, plain data.
    """

    session: Path
    checkpoint: str
    at_seq: int
    step: int
    rows: int
    exact: bool
    why_approximate: str | None
    driver: Mapping[str, Any]
    actor: str | None = None
