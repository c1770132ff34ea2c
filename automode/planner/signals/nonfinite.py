"""S0: numbers that are not finite, and optimizers that have silently stopped stepping.

A mixed-precision wrapper that skips every step leaves a run that looks healthy while nothing is learned
(DeepSpeed#8415), so consecutive un-applied steps are counted beside NaN and infinity.
"""

from __future__ import annotations

from enum import StrEnum

from automode.errors import UsageError
from automode.planner.signals.wire import SignalState

FINITE_LIMIT = 1e300
"""A float whose magnitude reaches this counts as non-finite: sums of a block of them would overflow."""


class NonFiniteState(StrEnum):
    """Whether the last observation could be computed with."""

    FINITE = "FINITE"
    NON_FINITE = "NON_FINITE"


class SteppingState(StrEnum):
    """Whether the optimizer's steps are being applied."""

    STEPPING = "STEPPING"
    STALLED = "STALLED"


class NonFinite:
    """Watch loss and gradient norm for NaN and infinity, and count un-applied optimizer steps.

    Args:
        stall_after: Consecutive un-applied optimizer steps that count as a stall.

    Attributes:
        status: `NonFiniteState` of the last observation.
        stepping: `SteppingState` after the last observation.
        loss_finite: Whether the last loss was finite.
        grad_norm_finite: Whether the last gradient norm was finite (or was not measured).
        bad_run: Consecutive non-finite observations up to now.
        skipped_run: Consecutive un-applied optimizer steps up to now.
    """

    __slots__ = (
        "bad_run",
        "grad_norm_finite",
        "loss_finite",
        "skipped_run",
        "stall_after",
        "status",
        "stepping",
    )

    def __init__(self, *, stall_after: int = 5) -> None:
        if stall_after < 1:
            raise UsageError(f"the value of `stall_after` is {stall_after}, but it must be at least 1 step")
        self.stall_after = stall_after
        self.reset()

    def reset(self) -> None:
        """Forget the runs of bad and of skipped steps."""
        self.status = NonFiniteState.FINITE
        self.stepping = SteppingState.STEPPING
        self.loss_finite = True
        self.grad_norm_finite = True
        self.bad_run = 0
        self.skipped_run = 0

    def update(self, loss: float, grad_norm: float | None, applied: bool) -> bool:
        """Take one observation.

        Args:
            loss: Raw loss of the step.
            grad_norm: Global gradient norm before clipping, or None where it was not measured.
            applied: Whether the optimizer applied its step.

        Returns:
            True when `status` or `stepping` changed.
        """
        if (
            applied
            and -FINITE_LIMIT < loss < FINITE_LIMIT
            and (grad_norm is None or -FINITE_LIMIT < grad_norm < FINITE_LIMIT)
            and self.skipped_run == 0
            and self.bad_run == 0
        ):
            return False
        return self._update_unusual(loss, grad_norm, applied)

    def _update_unusual(self, loss: float, grad_norm: float | None, applied: bool) -> bool:
        before = (self.status, self.stepping)
        self.loss_finite = -FINITE_LIMIT < loss < FINITE_LIMIT
        self.grad_norm_finite = grad_norm is None or -FINITE_LIMIT < grad_norm < FINITE_LIMIT
        if self.loss_finite and self.grad_norm_finite:
            self.bad_run = 0
            self.status = NonFiniteState.FINITE
        else:
            self.bad_run += 1
            self.status = NonFiniteState.NON_FINITE
        self.skipped_run = 0 if applied else self.skipped_run + 1
        stalled = self.skipped_run >= self.stall_after
        self.stepping = SteppingState.STALLED if stalled else SteppingState.STEPPING
        return (self.status, self.stepping) != before

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {
            "stall_after": self.stall_after,
            "loss_finite": self.loss_finite,
            "grad_norm_finite": self.grad_norm_finite,
            "bad_run": self.bad_run,
            "skipped_run": self.skipped_run,
        }

    @classmethod
    def from_state(cls, state: SignalState) -> NonFinite:
        """Rebuild the signal from what `state` returned."""
        signal = cls(stall_after=state["stall_after"])
        signal.loss_finite = state["loss_finite"]
        signal.grad_norm_finite = state["grad_norm_finite"]
        signal.bad_run = state["bad_run"]
        signal.skipped_run = state["skipped_run"]
        finite = signal.loss_finite and signal.grad_norm_finite
        signal.status = NonFiniteState.FINITE if finite else NonFiniteState.NON_FINITE
        stalled = signal.skipped_run >= signal.stall_after
        signal.stepping = SteppingState.STALLED if stalled else SteppingState.STEPPING
        return signal
