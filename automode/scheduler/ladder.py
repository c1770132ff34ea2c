"""The ladder: the exact integer resources at which trials are compared."""

from __future__ import annotations

import operator
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import SupportsIndex

from automode.errors import UsageError


def whole(name: str, value: object, *, least: int) -> int:
    """Take an integer argument, refusing booleans, floats and what is too small.

    Args:
        name: What the argument is called, for the message.
        value: What was given; numpy integers are welcome.
        least: The smallest value allowed.

    Returns:
        The value as a plain ``int``.

    Raises:
        UsageError: It is no integer, or below ``least``.
    """
    if type(value) is int:  # the usual case: a run-time protocol check costs 8 microseconds
        number = value
    elif isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise UsageError(f"{name} is {value!r}, but must be a whole number >= {least}: give an int")
    else:
        number = operator.index(value)
    if number < least:
        raise UsageError(f"{name} is {number}, but must be >= {least}")
    return number


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs ``r, r*eta, r*eta**2, ...`` below ``R``, then ``R`` itself, in integers throughout.

    A floating-point logarithm loses a rung for some (r, eta, R) and gains one for others, so none is taken.
    When ``R`` is no power step the last ratio is smaller than ``eta``; the top rung is ``R`` all the same.

    Args:
        min_resource: The first rung (r in the paper), in resource steps, at least 1.
        max_resource: The last rung (R in the paper), at least ``min_resource``.
        reduction_factor: One trial in this many goes on (eta in the paper), a whole number >= 2.

    Attributes:
        levels: The rungs' resources, strictly increasing.

    Raises:
        UsageError: An argument is no whole number or out of range.
    """

    min_resource: int
    max_resource: int
    reduction_factor: int
    levels: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Validate and lay the rungs."""
        low = whole("min_resource", self.min_resource, least=1)
        high = whole("max_resource", self.max_resource, least=1)
        eta = whole("reduction_factor", self.reduction_factor, least=2)
        if low > high:
            raise UsageError(
                f"min_resource is {low} and max_resource is {high}, but the first rung cannot lie above the last:"
                " lower min_resource or raise max_resource"
            )
        levels = []
        level = low
        while level < high:
            levels.append(level)
            level *= eta
        levels.append(high)
        object.__setattr__(self, "min_resource", low)
        object.__setattr__(self, "max_resource", high)
        object.__setattr__(self, "reduction_factor", eta)
        object.__setattr__(self, "levels", tuple(levels))

    @property
    def top(self) -> int:
        """Index of the last rung."""
        return len(self.levels) - 1

    def rung_of(self, resource: int) -> int | None:
        """Give the index of the rung that stands at exactly this resource, or ``None``."""
        index = bisect_left(self.levels, resource)
        return index if index < len(self.levels) and self.levels[index] == resource else None
