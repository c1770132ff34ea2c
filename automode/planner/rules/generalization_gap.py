"""The held-out loss rises while the training loss falls."""

from __future__ import annotations

from dataclasses import dataclass

from automode.planner.cards import Reason
from automode.planner.recipes import TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable
from automode.planner.signals.gap import GapState

VARIANTS = (
    Variant(name="decayed", weight_decay=0.01),
    Variant(name="flat", optimizer="sam"),
    Variant(name="slow averaged", lr_mul=0.3, ema=0.99),
    Variant(name="decayed more", weight_decay=0.1),
)


@dataclass(frozen=True, slots=True)
class GeneralizationGap:
    """Propose to regularise when training on makes the held-out loss worse.

    The signal (:mod:`automode.planner.signals.gap`) tests the validations after the best one: held-out loss rising, training
    loss falling, both significantly. Thresholds are ``policy.gap``.
    """

    id: Reason = "generalization_gap"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose regularised variants when held-out and training loss part."""
        gap = view.signals.gap
        match gap.status:
            case GapState.WIDENING:
                return if_executable(self._proposal(view), view)
            case GapState.UNKNOWN:
                return Silence(
                    code="few_validations",
                    why=f"{gap.validations} validations since the last reset: too few to test",
                )
            case _:
                return Silence(
                    code="no_gap",
                    why=(
                        f"the held-out loss stands {gap.rise:.1%} above its best ({gap.best:.4g} at step {gap.best_step}; a card at "
                        f"{gap.min_rise:.0%}); since then it rises with z {gap.held_out_z:.1f} (a card at {gap.z_rise:g}), and the "
                        f"training loss falls with z {gap.training_z:.1f} (a card at -{gap.z_fall:g})"
                    ),
                )

    def _proposal(self, view: View) -> Proposal:
        gap = view.signals.gap
        return Proposal(
            reason=self.id,
            action="fork",
            because=(
                f"The held-out loss rose by {gap.rise:.1%} above its best ({gap.best:.4g} at step {gap.best_step}) in "
                f"{gap.since_best} validations (z {gap.held_out_z:.1f}), while the training loss fell (z {gap.training_z:.1f})."
            ),
            training_recipe=TrainingRecipe(variants=VARIANTS[: view.policy.pacing.variants]),
            diagnostics={
                "best_loss": gap.best,
                "best_step": gap.best_step,
                "rise": gap.rise,
                "gap": gap.gap,
                "validations_after": gap.since_best,
                "held_out_z": gap.held_out_z,
                "training_z": gap.training_z,
            },
        )
