"""The held-out loss rises while the training loss falls: regularise, and where that was tried, end the run with its best state."""

from __future__ import annotations

from dataclasses import dataclass

from automode.planner.cards import Diagnostic, Reason
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
    """Propose to regularise when training on makes the held-out loss worse, and to stop where that did not mend it.

    The signal (:mod:`automode.planner.signals.gap`) tests the validations after the best one: held-out loss rising, training
    loss falling, both significantly. An adopted card begins it anew, so that the validations since the best are those that no card
    has mended. Thresholds are ``policy.gap``; ending a run is always of high risk.
    """

    id: Reason = "generalization_gap"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose regularised variants, or the end, when held-out and training loss part."""
        gap = view.signals.gap
        match gap.status:
            case GapState.WIDENING:
                regularise = if_executable(self._regularise(view), view)
                tried = view.counts.get(self.id, 0) > 0 or isinstance(regularise, Silence)
                least = view.policy.gap.stop_after
                if tried and least is not None and gap.since_best >= least:
                    return if_executable(self._stop(view, regularise), view)
                return regularise
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

    def _regularise(self, view: View) -> Proposal:
        return Proposal(
            reason=self.id,
            action="fork",
            because=_because(view),
            training_recipe=TrainingRecipe(variants=VARIANTS[: view.policy.pacing.variants]),
            diagnostics=_readings(view),
        )

    def _stop(self, view: View, regularise: Proposal | Silence) -> Proposal:
        before = (
            "Regularising was proposed before, and the loss has gone on rising"
            if isinstance(regularise, Proposal)
            else "No specialist can be trained in this run to regularise it"
        )
        return Proposal(
            reason=self.id,
            action="stop",
            because=(
                f"{_because(view)} {before} (a stop from {view.policy.gap.stop_after} validations on): the run ends with the best of its "
                "last weights, their averages and its best validated state."
            ),
            risk="high",
            diagnostics=_readings(view),
        )


def _because(view: View) -> str:
    gap = view.signals.gap
    return (
        f"The held-out loss rose by {gap.rise:.1%} above its best ({gap.best:.4g} at step {gap.best_step}) in "
        f"{gap.since_best} validations (z {gap.held_out_z:.1f}), while the training loss fell (z {gap.training_z:.1f})."
    )


def _readings(view: View) -> dict[str, Diagnostic]:
    gap = view.signals.gap
    return {
        "best_loss": gap.best,
        "best_step": gap.best_step,
        "rise": gap.rise,
        "gap": gap.gap,
        "validations_after": gap.since_best,
        "held_out_z": gap.held_out_z,
        "training_z": gap.training_z,
    }
