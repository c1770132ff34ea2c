"""The generalisation gap: held-out loss that keeps rising while the training loss keeps falling.

Judged over the validations after the best one, so that a U-shape is seen from its bottom on. Leaving out the best value
itself matters: it is the smallest by selection, and would bias the test; those after it are exchangeable where nothing
happens, which is what Mann-Kendall asks for.
"""

from __future__ import annotations

from enum import StrEnum
from math import hypot, isfinite, nan

from automode.errors import UsageError
from automode.planner.signals.mann_kendall import MannKendall
from automode.planner.signals.wire import SignalState, from_wire, require_positive, to_wire


class GapState(StrEnum):
    """Whether the model is memorising what it trains on."""

    UNKNOWN = "UNKNOWN"
    STEADY = "STEADY"
    WIDENING = "WIDENING"


class GeneralizationGap:
    """Test, at every validation, for a held-out loss that rises and a training loss that falls, both persistently.

    WIDENING when, over the validations after the best one (the last `window` of them), Mann-Kendall's z of the held-out loss is
    at least `z_rise` and that of the training loss at most -`z_fall`, and the median of the last three held-out losses is at
    least `min_rise` above the best, at `persistence` validations in a row.

    Args:
        window: Validations tested at the most.
        min_rise: Relative rise of the held-out loss above its best that matters.
        z_rise: One-sided confidence that the held-out loss rises, in sigmas.
        z_fall: One-sided confidence that the training loss falls, in sigmas.
        persistence: Validations in a row at which all of this must hold.

    Attributes:
        status: The state after the last validation.
        best: Lowest held-out loss since the reset.
        best_step: The step of that validation.
        rise: Relative rise of the last three held-out losses above the best.
        gap: Held-out loss minus training loss of the last validation.
        validations: Validations with finite losses since the reset.
    """

    __slots__ = (
        "_held_out",
        "_last_three",
        "_run",
        "_training",
        "best",
        "best_step",
        "gap",
        "min_rise",
        "persistence",
        "rise",
        "scale",
        "status",
        "validations",
        "window",
        "z_fall",
        "z_rise",
    )

    def __init__(
        self,
        *,
        window: int = 12,
        min_rise: float = 0.02,
        z_rise: float = 2.33,
        z_fall: float = 1.645,
        persistence: int = 3,
    ) -> None:
        if window < 6:
            raise UsageError(
                f"the value of `window` is {window}, but at least 6 validations are needed for a test"
            )
        if persistence < 1:
            raise UsageError(f"the value of `persistence` is {persistence}, but it must be at least 1")
        for name, value in (("min_rise", min_rise), ("z_rise", z_rise), ("z_fall", z_fall)):
            require_positive(name, value)
        self.window = window
        self.min_rise = min_rise
        self.z_rise = z_rise
        self.z_fall = z_fall
        self.persistence = persistence
        self.scale = 0.0
        self.reset()

    def reset(self) -> None:
        """Forget all validations; `scale`, for losses at or below 0 (see `BlockTrend`), stays."""
        self._held_out = MannKendall(window=self.window)
        self._training = MannKendall(window=self.window)
        self._last_three: list[float] = []
        self._run = 0
        self.status = GapState.UNKNOWN
        self.best = nan
        self.best_step = -1
        self.rise = nan
        self.gap = nan
        self.validations = 0

    @property
    def since_best(self) -> int:
        """Validations in the test: those after the best one, `window` at the most."""
        return len(self._held_out)

    @property
    def held_out_z(self) -> float:
        """Mann-Kendall's z of the held-out loss since its best; positive when it rises."""
        return self._held_out.z

    @property
    def training_z(self) -> float:
        """Mann-Kendall's z of the training loss over the same validations; negative when it falls."""
        return self._training.z

    def update(self, step: int, held_out: float, training: float) -> bool:
        """Take one validation; a pair with a non-finite loss is passed over.

        Args:
            step: When it took place.
            held_out: Mean loss on held-out data.
            training: Level of the training loss about this step.

        Returns:
            True when `status` changed.
        """
        if not (isfinite(held_out) and isfinite(training)):
            return False
        before = self.status
        self.validations += 1
        self.gap = held_out - training
        self._last_three = [*self._last_three[-2:], held_out]
        if not held_out >= self.best:
            self.best = held_out
            self.best_step = step
            self._held_out.reset()
            self._training.reset()
        else:
            self._held_out.update(held_out)
            self._training.update(training)
        last = sorted(self._last_three)
        weight = hypot(self.best, self.scale)
        self.rise = (last[len(last) // 2] - self.best) / weight if weight else nan
        held = (
            self.rise >= self.min_rise
            and self._held_out.z >= self.z_rise
            and self._training.z <= -self.z_fall
        )
        self._run = self._run + 1 if held else 0
        if self._run >= self.persistence:
            self.status = GapState.WIDENING
        elif self.validations >= 6:
            self.status = GapState.STEADY
        return self.status is not before

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {
            "window": self.window,
            "min_rise": self.min_rise,
            "z_rise": self.z_rise,
            "z_fall": self.z_fall,
            "persistence": self.persistence,
            "scale": self.scale,
            "held_out": self._held_out.state(),
            "training": self._training.state(),
            "last_three": list(self._last_three),
            "run": self._run,
            "status": str(self.status),
            "best": to_wire(self.best),
            "best_step": self.best_step,
            "rise": to_wire(self.rise),
            "gap": to_wire(self.gap),
            "validations": self.validations,
        }

    @classmethod
    def from_state(cls, state: SignalState) -> GeneralizationGap:
        """Rebuild the signal from what `state` returned."""
        names = ("window", "min_rise", "z_rise", "z_fall", "persistence")
        signal = cls(**{name: state[name] for name in names})
        signal.scale = state["scale"]
        signal._held_out = MannKendall.from_state(state["held_out"])
        signal._training = MannKendall.from_state(state["training"])
        signal._last_three = list(state["last_three"])
        signal._run = state["run"]
        signal.status = GapState(state["status"])
        signal.best = from_wire(state["best"])
        signal.best_step = state["best_step"]
        signal.rise = from_wire(state["rise"])
        signal.gap = from_wire(state["gap"])
        signal.validations = state["validations"]
        return signal
