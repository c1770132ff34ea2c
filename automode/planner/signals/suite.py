"""All per-step signals behind one call that costs a few microseconds and says nothing unless something changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import repeat
from math import isfinite
from typing import Any

from automode.errors import UsageError
from automode.planner.signals.current import READERS, gap_reading, slice_reading
from automode.planner.signals.gap import GeneralizationGap
from automode.planner.signals.joint_z import JointZ
from automode.planner.signals.level_shift import LevelShift
from automode.planner.signals.nonfinite import NonFinite
from automode.planner.signals.page_hinkley import PageHinkley
from automode.planner.signals.readings import Reading
from automode.planner.signals.robust_z import RobustZ
from automode.planner.signals.slices import SliceMeasure, SliceWatch
from automode.planner.signals.spike_burst import SpikeBurst
from automode.planner.signals.trend import BlockTrend
from automode.planner.signals.wire import SignalState

LR_JUMP = 0.10
"""A relative change of the learning rate above this, within one step, starts the trend anew."""

STATE_VERSION = 2
COLUMNS = ("step", "loss", "grad_norm", "lr", "applied")


class SignalSuite:
    """The streaming signals of one training run: mutable, owned by one fold.

    Args:
        budget: B, the planning budget in steps (see `BlockTrend`).
        gain: rho, the relative gain over B steps that would make waiting worthwhile.
        z_advise: One-sided confidence of the trend's advice.
        z_execute: One-sided confidence at which the trend may be acted upon.
        loss_threshold: Lowest threshold of the loss's robust z.
        grad_norm_threshold: Lowest threshold of the gradient norm's robust z.
        joint_threshold: Lowest threshold of the two together.
        stall_after: Consecutive un-applied optimizer steps that count as a stall.

    Attributes:
        non_finite: S0.
        loss_z: S1 on the loss.
        grad_norm_z: S1 on the gradient norm.
        joint_z: Both together.
        burst: Spikes of any of the three in quick succession.
        shift: S2.
        drift: Page-Hinkley on the loss's standardised residuals.
        trend: S3 and S4; holds the streaming Mann-Kendall.
        gap: Held-out loss against training loss, from one validation to the next.
        slices: Every slice against the rest, from one validation to the next.
        step: Step number of the last observation; -1 before the first.
        observations: Observations taken in all.
        reset_by: What last started the trend anew; empty before the first reset.
    """

    __slots__ = (
        "_lr",
        "_told",
        "burst",
        "drift",
        "gap",
        "grad_norm_z",
        "joint_z",
        "loss_z",
        "non_finite",
        "observations",
        "reset_by",
        "shift",
        "slices",
        "step",
        "trend",
    )

    def __init__(
        self,
        budget: int = 800,
        gain: float = 0.01,
        *,
        z_advise: float = 1.0,
        z_execute: float = 1.28,
        loss_threshold: float = 4.5,
        grad_norm_threshold: float = 6.0,
        joint_threshold: float = 5.5,
        stall_after: int = 5,
    ) -> None:
        self.non_finite = NonFinite(stall_after=stall_after)
        self.loss_z = RobustZ(base=loss_threshold)
        self.grad_norm_z = RobustZ(base=grad_norm_threshold, signed=False)
        self.joint_z = JointZ(base=joint_threshold)
        self.burst = SpikeBurst()
        self.shift = LevelShift()
        self.drift = PageHinkley()
        self.trend = BlockTrend(budget=budget, gain=gain, z_advise=z_advise, z_execute=z_execute)
        self.gap = GeneralizationGap()
        self.slices = SliceWatch()
        self._lr: float | None = None
        self.step = -1
        self.observations = 0
        self.reset_by = ""
        self._told = {name: _state_of(read(self)) for name, read in READERS.items()}

    def observe(
        self,
        step: int,
        loss: float,
        grad_norm: float | None = None,
        lr: float | None = None,
        applied: bool = True,
    ) -> tuple[Reading, ...] | None:
        """Take the scalars of one attempted step.

        Args:
            step: Step number, for the readings.
            loss: Raw loss, never smoothed.
            grad_norm: Global gradient norm before clipping; None where it was not measured (NaN: measured, and NaN).
            lr: Learning rate in force; None where it is not known.
            applied: Whether the optimizer applied its step.

        Returns:
            None when no state changed, else a reading for each that did.
        """
        self.step = step
        self.observations += 1
        changed = lr is not None and lr != self._lr and self._lr_jumped(lr)
        if self.non_finite.update(loss, grad_norm, applied):
            changed = True
        if not applied:
            # A batch that was left out says something of the data, and nothing of the run.
            return self._tell() if changed else None
        loss_z = self.loss_z
        if loss_z.update(loss):
            changed = True
        if self._observe_norm(grad_norm):
            changed = True
        fired = loss_z.fired or self.grad_norm_z.fired or self.joint_z.fired
        if self.burst.update(fired):
            changed = True
        z = loss_z.z
        trend = self.trend
        if self.shift.update(z):
            changed = True
            if self.shift.active:
                trend.excursion()
                self.reset_by = "level shift"
        if self.drift.update(z):
            changed = True
        if trend.level_scale != loss_z.scale:
            trend.level_scale = loss_z.scale
        if trend.update(loss):
            changed = True
        return self._tell() if changed else None

    def _observe_norm(self, grad_norm: float | None) -> bool:
        norm_z, joint_z = self.grad_norm_z, self.joint_z
        if grad_norm is None:
            ended = norm_z.pass_over()
            return joint_z.pass_over() or ended
        changed = norm_z.update(grad_norm)
        return joint_z.update(self.loss_z.z, norm_z.z) or changed

    def observe_block(self, columns: Mapping[str, Any]) -> list[Reading]:
        """Take many observations: the same readings as one `observe` for each row, in order.

        Args:
            columns: Equally long arrays or lists ``step`` and ``loss``, and optionally ``grad_norm``, ``lr`` and ``applied``.

        Raises:
            UsageError: If a column is unknown, missing, or of another length.
        """
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown:
            raise UsageError(f"unknown columns {unknown}; the signals read {list(COLUMNS)}")
        for name in ("step", "loss"):
            if name not in columns:
                raise UsageError(f"the column `{name}` is missing; came {sorted(columns)}")
        n = len(columns["loss"])
        rows: list[Iterable[Any]] = []
        for name in COLUMNS:
            column = columns.get(name)
            if column is None:
                rows.append(repeat(True if name == "applied" else None, n))
                continue
            if len(column) != n:
                raise UsageError(f"the column `{name}` has {len(column)} rows, but `loss` has {n}")
            rows.append(column.tolist() if hasattr(column, "tolist") else column)
        observe = self.observe
        readings: list[Reading] = []
        for step, loss, grad_norm, lr, applied in zip(*rows, strict=True):
            new = observe(step, loss, grad_norm, lr, applied)
            if new is not None:
                readings.extend(new)
        return readings

    def observe_validation(
        self, step: int, loss: float, slices: Mapping[str, SliceMeasure] | None = None
    ) -> tuple[Reading, ...] | None:
        """Take one validation of the run on held-out data.

        Its loss is set against the median training loss of the last 101 steps.

        Args:
            step: When it took place.
            loss: Mean held-out loss, in the unit of the training loss.
            slices: By name, each slice against the rest.

        Returns:
            None when no state changed, else a reading for each that did.
        """
        self.gap.scale = self.loss_z.scale
        news: list[Reading] = []
        if self.gap.update(step, loss, self.loss_z.median):
            news.append(gap_reading(step, self.gap))
        if slices:
            news.extend(slice_reading(step, self.slices, name) for name in self.slices.update(slices))
        return tuple(news) or None

    def reset(self, reason: str) -> tuple[Reading, ...] | None:
        """Start every window anew: after a fork, a resume, an adoption, a change of data or batch size, an executed plan.

        Args:
            reason: What happened, for the readings.

        Returns:
            None when no state changed by it, else a reading for each that did.
        """
        for signal in (self.non_finite, self.loss_z, self.grad_norm_z, self.joint_z, self.burst):
            signal.reset()
        self.shift.reset()
        self.drift.reset()
        self.gap.reset()
        self.slices.reset()
        return self.reset_trend(reason)

    def reset_trend(self, reason: str) -> tuple[Reading, ...] | None:
        """Start the trend alone anew, and leave the spike signals' windows as they are.

        Args:
            reason: What happened, for the readings.

        Returns:
            None when no state changed by it, else a reading for each that did.
        """
        self.trend.reset()
        self.reset_by = reason
        return self._tell()

    def reading(self, name: str) -> Reading:
        """Return what the signal `name` (a key of `READERS`) says now.

        Raises:
            UsageError: If there is no such signal.
        """
        read = READERS.get(name)
        if read is None:
            raise UsageError(f"there is no signal {name!r}; the suite has {sorted(READERS)}")
        return read(self)

    def readings(self) -> dict[str, Reading]:
        """Return what every signal says now, by name."""
        return {name: read(self) for name, read in READERS.items()}

    def _lr_jumped(self, lr: float) -> bool:
        before = self._lr
        if not isfinite(lr):
            return False
        self._lr = lr
        if before is None or abs(lr - before) <= LR_JUMP * abs(before):
            return False
        self.trend.reset()
        self.reset_by = f"learning rate {before:g} -> {lr:g}"
        return True

    def _tell(self) -> tuple[Reading, ...] | None:
        """Collect a reading for each state that differs from what was told last."""
        told = self._told
        news = []
        for name, read in READERS.items():
            reading = read(self)
            state = _state_of(reading)
            if state != told[name]:
                told[name] = state
                news.append(reading)
        return tuple(news) or None

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here: a strict JSON object."""
        return {
            "version": STATE_VERSION,
            "non_finite": self.non_finite.state(),
            "loss_z": self.loss_z.state(),
            "grad_norm_z": self.grad_norm_z.state(),
            "joint_z": self.joint_z.state(),
            "burst": self.burst.state(),
            "shift": self.shift.state(),
            "drift": self.drift.state(),
            "trend": self.trend.state(),
            "gap": self.gap.state(),
            "slices": self.slices.state(),
            "lr": self._lr,
            "step": self.step,
            "observations": self.observations,
            "reset_by": self.reset_by,
            "told": dict(self._told),
        }

    @classmethod
    def from_state(cls, state: SignalState) -> SignalSuite:
        """Rebuild the suite from what `state` returned.

        Raises:
            UsageError: If the state was written by another version of the signals.
        """
        if state.get("version") != STATE_VERSION:
            raise UsageError(
                f"this signal state has version {state.get('version')!r}, but version {STATE_VERSION} is read here; "
                "replay the observations to rebuild it"
            )
        suite = cls()
        suite.non_finite = NonFinite.from_state(state["non_finite"])
        suite.loss_z = RobustZ.from_state(state["loss_z"])
        suite.grad_norm_z = RobustZ.from_state(state["grad_norm_z"])
        suite.joint_z = JointZ.from_state(state["joint_z"])
        suite.burst = SpikeBurst.from_state(state["burst"])
        suite.shift = LevelShift.from_state(state["shift"])
        suite.drift = PageHinkley.from_state(state["drift"])
        suite.trend = BlockTrend.from_state(state["trend"])
        suite.gap = GeneralizationGap.from_state(state["gap"])
        suite.slices = SliceWatch.from_state(state["slices"])
        suite._lr = state["lr"]
        suite.step = state["step"]
        suite.observations = state["observations"]
        suite.reset_by = state["reset_by"]
        suite._told = dict(state["told"])
        return suite


def _state_of(reading: Reading) -> str:
    """What must differ for a reading to be news: the trend has a state at either confidence."""
    firm = reading.details.get("execute_state")
    return reading.state if firm is None else f"{reading.state}/{firm}"
