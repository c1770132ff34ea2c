"""The held-out loss rises while the training loss falls."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from automode.planner.cards import Reason
from automode.planner.events import Validated
from automode.planner.recipes import TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable

VARIANTS = (
    Variant(name="decayed", weight_decay=0.01),
    Variant(name="flat", optimizer="sam"),
    Variant(name="slow averaged", lr_mul=0.3, ema=0.99),
    Variant(name="decayed more", weight_decay=0.1),
    Variant(name="anneal", schedule="anneal"),
)


@dataclass(frozen=True, slots=True)
class GeneralizationGap:
    """Propose to regularise when training on makes the held-out loss worse.

    Thresholds are ``policy.gap``: the last validations all stand above the best one, the last by the given relative rise, and
    the training loss has a falling slope.
    """

    id: Reason = "generalization_gap"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose regularised variants when held-out and training loss part."""
        policy = view.policy.gap
        seen = [v for v in view.validated if isfinite(v.loss)]
        if len(seen) <= policy.persist:
            return Silence(
                code="few_validations",
                why=f"{len(seen)} validations so far, and one and {policy.persist} after it are needed",
            )
        best = min(seen, key=lambda v: v.loss)
        after = [v for v in seen if v.step > best.step]
        rise = (seen[-1].loss - best.loss) / abs(best.loss) if best.loss != 0.0 else 0.0
        if len(after) < policy.persist or rise < policy.rise:
            return Silence(
                code="no_gap",
                why=(
                    f"the held-out loss stands {rise:.1%} above its best ({best.loss:.4g} at step {best.step}), {len(after)} "
                    f"validations after it (a card at {policy.rise:.0%} and {policy.persist})"
                ),
            )
        trend = view.signals.trend
        if trend.used == 0:
            return Silence(
                code="no_trend",
                why=f"the training loss has no trend yet: {trend.blocks} blocks since the reset",
            )
        if not trend.slope < 0.0:
            return Silence(
                code="training_not_falling",
                why=(
                    f"the held-out loss rose by {rise:.1%}, but the training loss does not fall either (slope "
                    f"{trend.slope:+.2g} a step): that is no gap in generalisation"
                ),
            )
        return if_executable(self._proposal(view, best, seen[-1], rise, len(after)), view)

    def _proposal(self, view: View, best: Validated, last: Validated, rise: float, after: int) -> Proposal:
        trend = view.signals.trend
        return Proposal(
            reason=self.id,
            action="fork",
            because=(
                f"The held-out loss rose by {rise:.1%} in {after} validations, from {best.loss:.4g} at step {best.step} to "
                f"{last.loss:.4g} at step {last.step}, while the training loss fell by {-trend.slope:.2g} a step over the last "
                f"{trend.window}."
            ),
            training_recipe=TrainingRecipe(variants=VARIANTS[: view.policy.pacing.variants]),
            diagnostics={
                "best_loss": best.loss,
                "best_step": best.step,
                "last_loss": last.loss,
                "rise": rise,
                "validations_after": after,
                "slope_per_step": trend.slope,
                "window": trend.window,
            },
        )
