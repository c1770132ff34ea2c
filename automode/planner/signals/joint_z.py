"""Loss and gradient norm together: a corrupted batch often raises both by less than either alone would be alarmed by."""

from __future__ import annotations

from math import inf, sqrt

from automode.errors import UsageError
from automode.planner.signals.tail_alarm import TailAlarm
from automode.planner.signals.wire import SignalState

CLIP = 6.0
"""Either score counts for this much at most: what stands out by one of them alone is told by that one."""

MOST = 7.5
"""Highest threshold: two scores cut at 6 come to 8.49, and the bar must not rise out of reach after a few spikes."""

_ROOT = 1.0 / sqrt(2.0)


class JointZ(TailAlarm):
    """Sum the robust z of a step's loss and that of its gradient norm: (z_L + z_G) / sqrt(2), each cut at 6.

    An alarm above 5.5 takes at least 1.8 of either, since the other counts for 6 at most. A step at which either was not finite is passed over: `NonFinite` tells it.

    Args:
        base: Lowest threshold, in robust sigmas; below 8.48, which two scores cut at 6 come to.
        hold: Ordinary steps in a row that end an event.
    """

    __slots__ = ()

    def __init__(self, *, base: float, hold: int = 12) -> None:
        super().__init__(base=base, hold=hold, most=max(base, MOST))
        if base >= 2.0 * CLIP * _ROOT:
            raise UsageError(
                f"the threshold {base} is out of reach: two scores cut at {CLIP:g} come to at most {2.0 * CLIP * _ROOT:.2f}"
            )

    def reset(self) -> None:
        """End what is going on; the run's own tail is kept."""
        self.end_event()

    def update(self, loss_z: float, grad_norm_z: float) -> bool:
        """Take the two scores of one step, as `RobustZ` gave them.

        Returns:
            True when `active` changed.
        """
        if loss_z > CLIP:
            if loss_z == inf:
                return self.pass_over()
            loss_z = CLIP
        if grad_norm_z > CLIP:
            if grad_norm_z == inf:
                return self.pass_over()
            grad_norm_z = CLIP
        return self.judge((loss_z + grad_norm_z) * _ROOT)

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return self.alarm_state()

    @classmethod
    def from_state(cls, state: SignalState) -> JointZ:
        """Rebuild the signal from what `state` returned."""
        signal = cls(base=state["base"], hold=state["hold"])
        signal.restore_alarm(state)
        return signal
