"""The signals that a policy asks for: every threshold of the policy lands in exactly one signal."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan, sqrt

from automode.planner.inputs import Group, Validated
from automode.planner.policy import Policy
from automode.planner.signals.gap import GeneralizationGap
from automode.planner.signals.joint_z import JointZ
from automode.planner.signals.level_shift import LevelShift
from automode.planner.signals.nonfinite import NonFinite
from automode.planner.signals.readings import Reading
from automode.planner.signals.robust_z import RobustZ
from automode.planner.signals.slices import SliceMeasure, SliceWatch
from automode.planner.signals.spike_burst import SpikeBurst
from automode.planner.signals.suite import SignalSuite
from automode.planner.signals.trend import BlockTrend


def signals_for(policy: Policy, budget: int) -> SignalSuite:
    """Build the signals of a run.

    Args:
        policy: The thresholds.
        budget: B, the planning budget in steps (:meth:`Policy.planning_budget`).
    """
    trend, spike = policy.trend, policy.spike
    suite = SignalSuite()
    suite.non_finite = NonFinite(stall_after=spike.unapplied)
    suite.loss_z = RobustZ(base=spike.loss_z, window=spike.window, warm=spike.warmup)
    suite.grad_norm_z = RobustZ(base=spike.grad_norm_z, signed=False, window=spike.window, warm=spike.warmup)
    suite.joint_z = JointZ(base=spike.joint_z)
    suite.burst = SpikeBurst(count=spike.count, window=spike.within)
    suite.shift = LevelShift(threshold=spike.shift_z)
    suite.trend = BlockTrend(
        budget=budget,
        gain=trend.gain,
        z_advise=trend.z_advise,
        z_execute=trend.z_execute,
        z_rise=trend.z_rise,
        regress_rise=trend.regress_rise,
    )
    suite.gap = GeneralizationGap(min_rise=policy.gap.rise, persistence=policy.gap.persist)
    suite.slices = SliceWatch(
        alpha=policy.slices.alpha,
        persistence=policy.slices.persist,
        min_gap=policy.slices.gap,
        min_samples=policy.evidence.min_samples,
    )
    return suite


def watch_validation(suite: SignalSuite, validated: Validated) -> tuple[Reading, ...] | None:
    """Show a validation to the signals that follow held-out data; None when no state changed."""
    return suite.observe_validation(validated.step, validated.loss, _measures(validated.slices))


def _measures(slices: Mapping[str, Group]) -> dict[str, SliceMeasure]:
    """A group holds the slice's utility minus the rest's, so the rest stands at 0."""
    return {
        name: SliceMeasure(
            mean=group.mean, rest=0.0, se=sqrt(group.variance / group.n) if group.n else nan, n=group.n
        )
        for name, group in slices.items()
    }
