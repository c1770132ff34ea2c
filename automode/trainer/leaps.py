"""Steps that a broken batch makes many times as large as any before: they are left out, as those are that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from automode.backends.base import Fate
from automode.planner.policy import SafeguardPolicy

EARLIEST = 3
"""Steps before the first judgement: what a gradient's norm is like has to be seen."""

IN_A_ROW = 3
"""Steps left out in a row at the most. The next one is what the run is like now, and the measure from then on."""


class Leaps:
    """Says which steps must not reach the weights, by their loss and the norm of their gradients.

    One batch of wrong scale is enough to undo a network, and with Adam it does so twice: by the step, and by a second moment that
    keeps all further steps small for as long as it remembers. The norm is known before the step is made, so that
    nothing has to be undone.

    Args:
        times: Multiple of the largest norm so far that is a leap; None: none is.

    Attributes:
        largest: The largest norm so far, leaps that were left out not among them.
    """

    __slots__ = ("_at", "_row", "_times", "largest")

    def __init__(self, times: float | None) -> None:
        self._times = times
        self.largest = 0.0
        self._at, self._row = -1, 0

    def unfit(self, loss: float, norm: float, step: int) -> str:
        """Why a step must not reach the weights; empty: it may.

        Need not be asked of a step whose norm is no larger than ``largest`` and whose loss is finite: where ``loss - loss + norm <= largest``,
        which no NaN is.

        Args:
            loss: The training loss.
            norm: Of all gradients; nothing has clipped them.
            step: Steps that the run has made.
        """
        why = unfit(loss, norm)
        if why:
            return why
        if self._times is not None and step >= EARLIEST and 0.0 < self._times * self.largest < norm:
            self._at, self._row = step, self._row + 1 if step == self._at else 1
            if self._row <= IN_A_ROW:
                return f"the gradient norm is {norm:.3g}, {norm / self.largest:.0f} times the largest before"
        self.largest = max(self.largest, norm)
        return ""

    def state(self) -> dict[str, Any]:
        """As plain data for :meth:`load`."""
        return {"largest": self.largest, "at": self._at, "row": self._row}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.largest, self._at, self._row = state["largest"], state["at"], state["row"]


class TrialGuard:
    """Says what becomes of a trial's step, as the run's own guard does: a broken batch is no fault of the variant that meets it.

    Args:
        policy: Whether such steps are left out, what a leap is, and how many in a row mean that the trial has diverged.
    """

    def __init__(self, policy: SafeguardPolicy) -> None:
        self.on = policy.skip_nonfinite
        self._most = policy.rewind_after_nonfinite
        self._leaps = Leaps(policy.leap)
        self._row = 0

    def fate(self, loss: float, norm: float, step: int, *, clipped: bool) -> Fate:
        """Judge a step before the optimizer makes it.

        Args:
            loss: The training loss.
            norm: Of all gradients, before they were clipped; any number where the guard is off.
            step: Steps that the trial has made.
            clipped: Whether a leap was cut off, and is none any more.
        """
        if not self.on:
            return "moves" if isfinite(loss) else "ends"
        if not (unfit(loss, norm) if clipped else self._leaps.unfit(loss, norm, step)):
            self._row = 0
            return "moves"
        self._row += 1
        return "ends" if self._row >= self._most else "stays"

    def state(self) -> dict[str, Any]:
        """As plain data for :meth:`load`."""
        return {"leaps": self._leaps.state(), "row": self._row}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._leaps.load(state["leaps"])
        self._row = state["row"]


def unfit(loss: float, norm: float) -> str:
    """Why a step cannot reach the weights at all: a loss or a norm that is not finite; empty: it can."""
    if not isfinite(loss):
        return f"the loss is {loss}"
    return "" if isfinite(norm) else f"the gradient norm is {norm}"
