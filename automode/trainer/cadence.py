"""How often a run's state is stored: every so many steps, epochs or minutes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from automode.errors import UsageError

Unit = Literal["steps", "epochs", "seconds"]

_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)
_UNITS: dict[str, tuple[Unit, float]] = {
    **dict.fromkeys(("step", "steps"), ("steps", 1.0)),
    **dict.fromkeys(("epoch", "epochs"), ("epochs", 1.0)),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("seconds", 1.0)),
    **dict.fromkeys(("min", "minute", "minutes"), ("seconds", 60.0)),
    **dict.fromkeys(("h", "hour", "hours"), ("seconds", 3600.0)),
}


@dataclass(frozen=True, slots=True)
class Cadence:
    """Every ``amount`` of ``unit``."""

    amount: float
    unit: Unit


def cadence_of(text: str) -> Cadence:
    """Read ``"500 steps"``, ``"10 min"`` or ``"1 epoch"``.

    Raises:
        UsageError: It is none of these.
    """
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    known = _UNITS.get(match[2].lower()) if match else None
    if match is None or known is None:
        raise UsageError(
            f'checkpoint_every must read like "500 steps", "10 min", "2 h" or "1 epoch", or be None; got {text!r}'
        )
    unit, size = known
    amount = float(match[1]) * size
    if amount <= 0 or (unit != "seconds" and amount != int(amount)):
        raise UsageError(
            f"checkpoint_every={text!r} must be above 0, and steps and epochs must be whole numbers"
        )
    return Cadence(amount, unit)
