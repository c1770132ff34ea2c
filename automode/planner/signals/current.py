"""What each streaming signal says now, as readings: built only when a state changed or somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from automode.planner.signals.gap import GeneralizationGap
from automode.planner.signals.readings import Detail, Reading
from automode.planner.signals.robust_z import RobustZ
from automode.planner.signals.slices import SliceWatch
from automode.planner.signals.tail_alarm import TailAlarm
from automode.planner.signals.trend import MIN_BLOCKS, TrendState

if TYPE_CHECKING:
    from automode.planner.signals.suite import SignalSuite

QUIET = "QUIET"
SPIKE = "SPIKE"
BURST = "BURST"
LEVEL = "LEVEL"
SHIFTED = "SHIFTED"
STEADY = "STEADY"
DRIFTING = "DRIFTING"


def _non_finite(suite: SignalSuite) -> Reading:
    signal = suite.non_finite
    return Reading(
        name="non_finite",
        step=suite.step,
        value=float(signal.bad_run),
        state=str(signal.status),
        threshold=1.0,
        window=1,
        details={"loss_finite": signal.loss_finite, "grad_norm_finite": signal.grad_norm_finite},
    )


def _skipped_steps(suite: SignalSuite) -> Reading:
    signal = suite.non_finite
    return Reading(
        name="skipped_steps",
        step=suite.step,
        value=float(signal.skipped_run),
        state=str(signal.stepping),
        threshold=float(signal.stall_after),
        window=signal.stall_after,
    )


def _spike(name: str, suite: SignalSuite, signal: TailAlarm, scored_by: RobustZ) -> Reading:
    return Reading(
        name=name,
        step=suite.step,
        value=signal.z,
        state=SPIKE if signal.active else QUIET,
        threshold=signal.threshold,
        window=scored_by.window,
        details={"ready": scored_by.ready, "recent_spikes": suite.burst.recent},
    )


def _loss_spike(suite: SignalSuite) -> Reading:
    return _spike("loss_spike", suite, suite.loss_z, suite.loss_z)


def _grad_norm_spike(suite: SignalSuite) -> Reading:
    return _spike("grad_norm_spike", suite, suite.grad_norm_z, suite.grad_norm_z)


def _joint_spike(suite: SignalSuite) -> Reading:
    return _spike("joint_spike", suite, suite.joint_z, suite.grad_norm_z)


def _spike_burst(suite: SignalSuite) -> Reading:
    signal = suite.burst
    return Reading(
        name="spike_burst",
        step=suite.step,
        value=float(signal.recent),
        state=BURST if signal.active else QUIET,
        threshold=float(signal.count),
        window=signal.window,
    )


def _level_shift(suite: SignalSuite) -> Reading:
    signal = suite.shift
    return Reading(
        name="level_shift",
        step=suite.step,
        value=signal.value,
        state=SHIFTED if signal.active else LEVEL,
        threshold=signal.threshold,
        window=signal.length,
    )


def _drift(suite: SignalSuite) -> Reading:
    signal = suite.drift
    return Reading(
        name="drift",
        step=suite.step,
        value=signal.value,
        state=DRIFTING if signal.active else STEADY,
        threshold=signal.threshold,
        window=suite.loss_z.window,
        details={"delta": signal.delta},
    )


def _trend(suite: SignalSuite) -> Reading:
    signal = suite.trend
    details: dict[str, Detail] = {
        "execute_state": str(signal.firm),
        "budget": signal.budget,
        "best_case_advise": signal.best_advise,
        "worst_case_advise": signal.worst_advise,
        "worst_case": signal.worst_execute,
        "z_advise": signal.z_advise,
        "z_execute": signal.z_execute,
        "z_against_gain": signal.z_against_gain,
        "mann_kendall_z": signal.mann_kendall.z,
        "level": signal.level,
        "slope_per_step": signal.slope,
        "blocks": signal.used,
        "block_steps": signal.block_steps,
    }
    if signal.blocks < MIN_BLOCKS and suite.reset_by:
        details["reset_by"] = suite.reset_by
    return Reading(
        name="trend",
        step=suite.step,
        value=signal.best_execute,
        state=str(signal.status),
        threshold=signal.gain,
        window=signal.window,
        details=details,
    )


def _slow_divergence(suite: SignalSuite) -> Reading:
    signal = suite.trend
    regressing = signal.status is TrendState.REGRESSING
    return Reading(
        name="slow_divergence",
        step=suite.step,
        value=signal.rise,
        state="REGRESSING" if regressing else STEADY,
        threshold=signal.regress_rise,
        window=signal.rise_window,
        details={"level": signal.level, "z": signal.z_rise},
    )


READERS: dict[str, Callable[[SignalSuite], Reading]] = {
    "non_finite": _non_finite,
    "skipped_steps": _skipped_steps,
    "loss_spike": _loss_spike,
    "grad_norm_spike": _grad_norm_spike,
    "joint_spike": _joint_spike,
    "spike_burst": _spike_burst,
    "level_shift": _level_shift,
    "drift": _drift,
    "trend": _trend,
    "slow_divergence": _slow_divergence,
}
"""By name of the reading, in the order in which readings of one step are told."""


def gap_reading(step: int, signal: GeneralizationGap) -> Reading:
    """Return what the generalisation gap says at the validation at `step`; windows count validations."""
    return Reading(
        name="generalization_gap",
        step=step,
        value=signal.rise,
        state=str(signal.status),
        threshold=signal.min_rise,
        window=signal.since_best,
        details={
            "gap": signal.gap,
            "best": signal.best,
            "best_step": signal.best_step,
            "held_out_z": signal.held_out_z,
            "training_z": signal.training_z,
        },
    )


def slice_reading(step: int, signal: SliceWatch, name: str) -> Reading:
    """Return what is known of the slice `name` at the validation at `step`; windows count validations."""
    track = signal.tracks[name]
    return Reading(
        name="slice_underperformance",
        step=step,
        value=track.last.z,
        state=str(track.status),
        threshold=-signal.threshold,
        window=signal.persistence,
        details={
            "slice": name,
            "mean": track.last.mean,
            "rest": track.last.rest,
            "se": track.last.se,
            "n": track.last.n,
            "run": track.run,
            "gap_z": track.gap_z,
        },
    )
