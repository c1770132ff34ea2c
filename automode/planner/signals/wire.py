"""Floats on the wire: a signal's state is strict JSON, which knows no NaN and no infinity.

Non-finite values are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``; finite ones stay numbers, so that
``json.dumps(state, allow_nan=False)`` always succeeds and reading back gives the same bits.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, TypeAlias

from automode.errors import UsageError

SignalState: TypeAlias = dict[str, Any]
"""What ``state()`` returns and ``from_state()`` takes: a JSON object."""

WireFloat: TypeAlias = float | str


def to_wire(value: float) -> WireFloat:
    """Return `value` as JSON can hold it: itself when finite, else ``"nan"``, ``"inf"`` or ``"-inf"``."""
    return value if isfinite(value) else str(value)


def from_wire(value: WireFloat) -> float:
    """Read a float that `to_wire` wrote.

    Raises:
        UsageError: If a string is none of the three names.
    """
    if isinstance(value, str):
        if value not in {"nan", "inf", "-inf"}:
            raise UsageError(
                f"expected a number or one of 'nan', 'inf', '-inf', but a stored float is {value!r}"
            )
        return float(value)
    return value


def require_positive(name: str, value: float) -> None:
    """Refuse a parameter that is not a finite number above 0.

    Raises:
        UsageError: If `value` is zero, negative or not finite.
    """
    if not (isfinite(value) and value > 0.0):
        raise UsageError(f"the value of `{name}` is {value!r}, but it must be a finite number above 0")
