"""What a signal says when its state changes: one frozen `Reading`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from automode.planner.signals.wire import from_wire, to_wire

Detail = float | int | str | bool
"""One value of `Reading.details`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A signal's state at the step at which it changed.

    Attributes:
        name: The signal, e.g. ``"loss_spike"`` or ``"trend"``.
        step: The step number of the observation that changed the state.
        value: The statistic, in the signal's own unit (a z, a share, a count); may be infinite or NaN.
        state: The state that was entered, e.g. ``"PLATEAU"``.
        threshold: What `value` was compared with at this step.
        window: How many steps the value rests on.
        details: Further numbers for a card, by name.
    """

    name: str
    step: int
    value: float
    state: str
    threshold: float
    window: int
    details: Mapping[str, Detail] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the reading as a strict JSON object (non-finite floats as strings)."""
        return {
            "name": self.name,
            "step": self.step,
            "value": to_wire(self.value),
            "state": self.state,
            "threshold": to_wire(self.threshold),
            "window": self.window,
            "details": {key: to_wire(v) if isinstance(v, float) else v for key, v in self.details.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reading:
        """Read what `to_dict` wrote. A detail that is text stays text."""
        details = {k: from_wire(v) if v in ("nan", "inf", "-inf") else v for k, v in data["details"].items()}
        return cls(
            name=data["name"],
            step=data["step"],
            value=from_wire(data["value"]),
            state=data["state"],
            threshold=from_wire(data["threshold"]),
            window=data["window"],
            details=details,
        )
