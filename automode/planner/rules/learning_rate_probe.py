"""Is the learning rate about right? Asked once, early, when a wrong one is cheap to find."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from automode.planner.cards import Reason
from automode.planner.recipes import TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable
from automode.planner.signals.trend import TrendState

FASTER = tuple(Variant(name=f"x{factor}", lr_mul=float(factor)) for factor in (3, 10, 30))
SLOWER = tuple(Variant(name=f"x1/{factor}", lr_mul=1.0 / factor) for factor in (3, 10, 30))
"""Tried only where the loss has stopped falling: over a few steps a lower rate nearly always looks better, because it
quiets the loss, and then costs the whole run (Wu et al. 2018, arXiv:1803.02021)."""


@dataclass(frozen=True, slots=True)
class LearningRateProbe:
    """Propose one short sweep over learning-rate factors; the trunk itself is the arm with factor 1.

    Higher rates are tried, unless the loss stands still already: then lower ones. It takes ``policy.probe.share`` of the run's
    compute at the most, comes once, between the shares ``policy.probe.from`` and ``until`` of the run, and not while the run is unstable: then
    ``instability_spike`` asks the same question better.
    """

    id: Reason = "learning_rate_probe"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose the sweep in its window, or say why not now."""
        probe = view.policy.probe
        total = view.step + view.remaining
        first, last = ceil(probe.from_ * total), int(probe.until * total)
        made = view.counts.get(self.id, 0)
        if made:
            return Silence(code="done", why=f"{made} probe was made already")
        if view.step < first:
            return Silence(
                code="too_early", why=f"step {view.step} of {total}: the probe comes from step {first}"
            )
        if view.step > last:
            return Silence(
                code="too_late", why=f"step {view.step} of {total}: the probe comes until step {last}"
            )
        signals = view.signals
        if signals.burst.active or signals.shift.active or signals.trend.status is TrendState.REGRESSING:
            return Silence(code="unstable", why="the run is unstable, which is another rule's business")
        stuck = signals.trend.status is TrendState.PLATEAU
        variants = (SLOWER if stuck else FASTER)[: view.policy.pacing.variants]
        return if_executable(
            Proposal(
                reason=self.id,
                action="fork",
                because=(
                    f"Step {view.step} of {total} ({view.step / total:.0%}): a badly chosen learning rate is cheap to find now. "
                    f"{'The loss stands still already: ' if stuck else ''}{len(variants)} short runs at {', '.join(f'{v.lr_mul:.3g}' for v in variants)} times the rate are compared "
                    "with the trunk."
                ),
                training_recipe=TrainingRecipe(variants=variants),
                share=probe.share,
                diagnostics={"step": view.step, "total": total, "factors": tuple(v.lr_mul for v in variants)},
            ),
            view,
        )
