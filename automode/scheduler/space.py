"""A search space as plain dicts, read and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from automode.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """A parameter that takes one of a few values; the sampler sees their places only, so they can be of any kind."""

    values: tuple[Any, ...]

    def external(self, internal: float) -> Any:
        """Turn the sampler's value into the parameter's."""
        return self.values[int(internal)]

    def holds(self, internal: float) -> bool:
        """Tell whether the sampler's value is one of this parameter's."""
        return internal in range(len(self.values))

    def grid_size(self, name: str) -> int:
        """How many values a grid visits."""
        return len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """A numeric parameter with evenly spaced values; the sampler sees their places.

    Attributes:
        low: The first value.
        step: Distance of neighbours.
        count: How many values there are.
        integer: Whether values are whole numbers.
    """

    low: float
    step: float
    count: int
    integer: bool

    def external(self, internal: float) -> float | int:
        """Turn the sampler's value into the parameter's, in decimal arithmetic: 3 steps of 0.1 are 0.3."""
        value = float(Decimal(str(self.low)) + int(internal) * Decimal(str(self.step)))
        return int(value) if self.integer else value

    def holds(self, internal: float) -> bool:
        """Tell whether the sampler's value is one of this parameter's."""
        return internal in range(self.count)

    def grid_size(self, name: str) -> int:
        """How many values a grid visits."""
        return self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A numeric parameter that can take every value between its ends.

    Attributes:
        low: Least value.
        high: Greatest value.
        log: Whether the logarithm is sampled evenly.
        integer: Whether values are whole numbers; then ``log`` is set too (see :class:`Steps`).
    """

    low: float
    high: float
    log: bool
    integer: bool

    def external(self, internal: float) -> float | int:
        """Turn the sampler's value into the parameter's."""
        return int(internal) if self.integer else float(internal)

    def holds(self, internal: float) -> bool:
        """Tell whether the sampler's value lies in this range."""
        return self.low <= internal <= self.high

    def grid_size(self, name: str) -> int:
        """Refuse: a grid needs values that can be counted.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"{name}: a grid needs `choices`, or a range with a `step`")


Parameter = Choices | Steps | Range


def parse_space(space: Mapping[str, Mapping[str, Any]]) -> dict[str, Parameter]:
    """Read a search space.

    Raises:
        UsageError: It is empty, or a parameter's entry cannot be taken; the message names it.
    """
    if not space:
        raise UsageError("the search space is empty, but needs at least one parameter")
    return {name: _parse(name, spec) for name, spec in space.items()}


def _parse(name: str, spec: Mapping[str, Any]) -> Parameter:
    if not isinstance(spec, Mapping):
        raise UsageError(
            f"{name} is {spec!r}, but must be a mapping with `choices`, or with `low` and `high`"
        )
    allowed = {"choices"} if "choices" in spec else {"low", "high", "log", "step", "integer"}
    unknown = sorted(set(spec) - allowed)
    if unknown:
        raise UsageError(
            f"{name}: {', '.join(unknown)} cannot stand beside {', '.join(sorted(set(spec) & allowed))}"
        )
    if "choices" in spec:
        values = spec["choices"]
        if not isinstance(values, list | tuple) or not values:
            raise UsageError(f"{name}: choices is {values!r}, but must be a list with at least one value")
        return Choices(values=tuple(values))
    missing = sorted({"low", "high"} - set(spec))
    if missing:
        raise UsageError(f"{name}: {' and '.join(missing)} missing: give `low` and `high`, or `choices`")
    return _parse_range(name, spec)


def _parse_range(name: str, spec: Mapping[str, Any]) -> Steps | Range:
    log, integer = spec.get("log", False), spec.get("integer", False)
    for key, flag in (("log", log), ("integer", integer)):
        if not isinstance(flag, bool):
            raise UsageError(f"{name}: {key} is {flag!r}, but must be true or false")
    low, high = _number(name, "low", spec["low"]), _number(name, "high", spec["high"])
    step = None if spec.get("step") is None else _number(name, "step", spec["step"])
    if not low < high:
        raise UsageError(f"{name}: low is {low:g} and high is {high:g}, but low must be the smaller")
    if log and low <= 0:
        raise UsageError(f"{name}: low is {low:g}, but a logarithmic range must start above 0")
    if log and step is not None:
        raise UsageError(f"{name}: a logarithmic range takes no step")
    if step is not None and not 0 < step <= high - low:
        raise UsageError(f"{name}: step is {step:g}, but must be positive and fit between low and high")
    if integer:
        for key, value in (("low", low), ("high", high), ("step", step)):
            if value is not None and value != int(value):
                raise UsageError(f"{name}: {key} is {value:g}, but integer ranges need whole numbers")
        step = step if log else (step or 1.0)
    if step is None:
        return Range(low=low, high=high, log=log, integer=integer)
    count = int((Decimal(str(high)) - Decimal(str(low))) / Decimal(str(step))) + 1
    return Steps(low=low, step=step, count=count, integer=integer)


def _number(name: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise UsageError(f"{name}: {key} is {value!r}, but must be a finite number")
    try:
        return float(value)
    except OverflowError as error:
        raise UsageError(f"{name}: {key} does not fit into a float: give a smaller number") from error
