"""The rules: one trouble, one remedy, one file each. What is built in stands in :data:`BUILT_IN`, in order of priority.

Rules of third parties come as arguments (:func:`automode.plugins.plugins` finds installed ones); one that gives a
built-in's reason takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from automode.errors import PolicyError
from automode.planner.cards import Reason
from automode.planner.policy import Policy
from automode.planner.rules.base import Proposal, Rule, Silence, View
from automode.planner.rules.generalization_gap import GeneralizationGap
from automode.planner.rules.high_loss_tail import HighLossTail
from automode.planner.rules.instability_spike import InstabilitySpike
from automode.planner.rules.label_noise import LabelNoise
from automode.planner.rules.learning_rate_probe import LearningRateProbe
from automode.planner.rules.loss_plateau import LossPlateau
from automode.planner.rules.merge_cadence import MergeCadence
from automode.planner.rules.residual_cluster import ResidualCluster
from automode.planner.rules.slice_underperformance import SliceUnderperformance

__all__ = ["BUILT_IN", "PRIORITY", "Proposal", "Rule", "Silence", "View", "chosen"]

BUILT_IN: Final[tuple[Rule, ...]] = (
    InstabilitySpike(),
    LearningRateProbe(),
    LabelNoise(),
    MergeCadence(),
    SliceUnderperformance(),
    ResidualCluster(),
    LossPlateau(),
    GeneralizationGap(),
    HighLossTail(),
)
"""Every rule of this version; where two propose at once, the earlier one goes first."""

PRIORITY: Final[tuple[Reason, ...]] = (*(rule.id for rule in BUILT_IN), "manual")
"""Reasons by urgency."""


def chosen(policy: Policy, plugins: Sequence[Rule] = ()) -> tuple[Rule, ...]:
    """Return the rules that a policy lets propose, by priority.

    Args:
        policy: Its ``reasons`` choose.
        plugins: Rules of third parties; each takes the place of the built-in with its reason.

    Raises:
        PolicyError: The policy names a reason that no rule gives, or two plugins give the same one.
    """
    by_reason: dict[Reason, Rule] = {rule.id: rule for rule in BUILT_IN}
    seen: set[Reason] = set()
    for rule in plugins:
        if rule.id in seen:
            raise PolicyError(f"two plugins give the reason {rule.id}: uninstall one, or load them by hand")
        if rule.id not in by_reason:
            raise PolicyError(
                f"the rule {rule!r} gives the reason {rule.id!r}; known are {', '.join(by_reason)}"
            )
        seen.add(rule.id)
        by_reason[rule.id] = rule
    nobody = [reason for reason in policy.reasons if reason not in by_reason]
    if nobody:
        raise PolicyError(
            f"policy.reasons: no rule gives {', '.join(nobody)}; known are {', '.join(by_reason)}"
        )
    return tuple(by_reason[reason] for reason in PRIORITY if reason in policy.reasons)
