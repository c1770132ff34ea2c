"""Which samples of a ledger: conditions on its columns, read from a line of text and never evaluated as code.

    margin < 0 and visits >= 2
    suspect = yes and mean_loss > 1.5

A condition is a column, one of ``< <= > >= = !=``, and a number (or yes, no). ``and`` joins several: all of them must hold. What is
not known of a sample meets no condition.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from automode.errors import UsageError

ALIASES: Final[Mapping[str, str]] = {"aum": "margin", "count": "visits", "id": "sample_id"}
"""Other names of columns."""

_COMPARE: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}
_WORDS: Final = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_CONDITION: Final = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|==|!=|<|>|=)\s*(\S+)\s*")
_AND: Final = re.compile(r"\s+and\s+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Condition:
    """One column compared with one number."""

    column: str
    sign: str
    value: float

    def holds(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell for each value whether it meets the condition; NaN, which is not known, never does."""
        return np.asarray(_COMPARE[self.sign](values, self.value) & ~np.isnan(values), dtype=np.bool_)


def conditions(text: str) -> tuple[Condition, ...]:
    """Read conditions.

    Raises:
        UsageError: The text is none.
    """
    return tuple(_condition(part, text) for part in _AND.split(text.strip()))


def column_named(name: str, known: Mapping[str, object]) -> str:
    """Return the column that a name or an alias means.

    Raises:
        UsageError: There is none.
    """
    wanted = name.lower()
    wanted = wanted if wanted in known else ALIASES.get(wanted, name)
    if wanted in known:
        return wanted
    close = difflib.get_close_matches(wanted, list(known), n=1)
    guess = f" did you mean {close[0]}?" if close else ""
    shown = [n for n in known if not n.startswith("embedding_")]
    raise UsageError(f"the ledger has no column {name!r};{guess} it has {', '.join(shown)}")


def _condition(part: str, text: str) -> Condition:
    match = _CONDITION.fullmatch(part)
    if match is None:
        raise UsageError(
            f"{part!r} in {text!r} is no condition: write COLUMN < NUMBER (or <=, >, >=, =, !=), several joined by `and`, "
            'such as "margin < 0 and visits >= 2"'
        )
    column, sign, value = match.groups()
    try:
        number = _WORDS[value.lower()] if value.lower() in _WORDS else float(value)
    except ValueError:
        raise UsageError(f"{value!r} in {text!r} is no number, and neither yes nor no") from None
    if isnan(number):
        raise UsageError(f"{text!r} compares with nan: what is not known meets no condition")
    return Condition(column, sign, number)
