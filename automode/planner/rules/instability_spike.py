"""The run is unstable: values that are not finite, spikes in quick succession, a shifted level, slow divergence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

from automode.planner.cards import Diagnostic, Reason
from automode.planner.recipes import Adjustment, TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable
from automode.planner.signals.nonfinite import NonFiniteState, SteppingState
from automode.planner.signals.trend import TrendState

WEIGHT_DECAY = 0.01


@dataclass(frozen=True, slots=True)
class InstabilitySpike:
    """Propose calmer ways to train on, when the run shows that it needs one.

    What must be done at once (skipping a step that is not finite) is a safeguard of the loop and no card; this is the sweep
    that follows where the trouble stays. Its first arm depends on the trouble: clipping answers spikes, a lower rate
    answers divergence. Thresholds are ``policy.spike`` and ``policy.trend.regress_rise``.
    """

    id: Reason = "instability_spike"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose calmer variants for every sign of instability found, or say that there is none."""
        signs = [*_signs(view)]
        if not signs:
            burst = view.signals.burst
            return Silence(
                code="stable",
                why=(
                    f"{burst.recent} {'spike' if burst.recent == 1 else 'spikes'} in the last {burst.window} steps (a card at {view.policy.spike.count}), level shift "
                    f"{view.signals.shift.value:.1f} sigmas (a card at {view.policy.spike.shift_z:g})"
                ),
            )
        kinds = {kind for kind, _ in signs}
        return if_executable(
            Proposal(
                reason=self.id,
                action="fork",
                because=" ".join(sentence for _, sentence in signs),
                training_recipe=TrainingRecipe(variants=_variants(view, spikes_only=kinds == {"burst"})),
                risk="medium",
                diagnostics=_diagnostics(view),
            ),
            view,
            otherwise=_calmer(view, spikes_only=kinds == {"burst"}),
        )


def _signs(view: View) -> Iterator[tuple[str, str]]:
    suite = view.signals
    spike = view.policy.spike
    finite = suite.non_finite
    # A step that was left out never reached the weights: one batch is broken, and no way of training mends that.
    if finite.status is NonFiniteState.NON_FINITE and finite.skipped_run == 0:
        bad = [
            name
            for name, good in (("loss", finite.loss_finite), ("gradient norm", finite.grad_norm_finite))
            if not good
        ]
        were = f"The {' and the '.join(bad)} {'was' if len(bad) == 1 else 'were'} not finite"
        yield "non_finite", f"{were} for {finite.bad_run} steps in a row."
    if finite.stepping is SteppingState.STALLED:
        yield (
            "stalled",
            f"The optimizer has not applied a step for {finite.skipped_run} steps in a row (a card at {finite.stall_after}).",
        )
    if suite.burst.recent >= spike.count:
        yield (
            "burst",
            f"{suite.burst.recent} spikes within {suite.burst.window} steps (a card at {spike.count}).",
        )
    if suite.shift.active:
        yield (
            "shift",
            (
                f"The last {suite.shift.length} losses stand {suite.shift.value:.1f} sigmas above their level (a card at "
                f"{suite.shift.threshold:g})."
            ),
        )
    trend = suite.trend
    if trend.firm is TrendState.REGRESSING:
        yield (
            "regressing",
            (
                f"The loss rose by at least {trend.rise:.1%} over the last {trend.rise_window} steps "
                f"(one-sided, z {trend.z_rise:g}; a card at {trend.regress_rise:.0%})."
            ),
        )


def _variants(view: View, *, spikes_only: bool) -> tuple[Variant, ...]:
    clip = _clip(view)
    half = Variant(name="half", lr_mul=0.5)
    quarter = Variant(name="quarter clipped" if clip else "quarter", lr_mul=0.25, clip_norm=clip)
    clipped = [Variant(name="clipped", clip_norm=clip)] if clip else []
    rest = [
        Variant(name="averaged", lr_mul=0.5, ema=0.99),
        Variant(name="flat", lr_mul=0.5, optimizer="sam"),
        Variant(name="decayed", lr_mul=0.5, weight_decay=WEIGHT_DECAY),
    ]
    if view.run.bf16:
        rest.append(Variant(name="bf16", lr_mul=0.5, precision="bf16"))
    ordered = [*clipped, half, quarter, *rest] if spikes_only else [half, quarter, *clipped, *rest]
    return tuple(ordered[: view.policy.pacing.variants])


def _clip(view: View) -> float | None:
    """What was ordinary for the gradient norm; None where that is no measure for clipping."""
    ceiling = view.signals.grad_norm_z.ceiling
    return None if ceiling is None or not 0.0 < ceiling < 1e9 else float(f"{ceiling:.3g}")


def _calmer(view: View, *, spikes_only: bool) -> Adjustment:
    """What the first arm of the sweep would do to the trunk itself."""
    clip = _clip(view)
    if spikes_only and clip is not None:
        return Adjustment(clip_norm=clip)
    return Adjustment(rate_factor=0.5, clip_norm=clip)


def _diagnostics(view: View) -> dict[str, Diagnostic]:
    suite = view.signals
    found: dict[str, Diagnostic] = {
        "non_finite_in_a_row": suite.non_finite.bad_run,
        "unapplied_in_a_row": suite.non_finite.skipped_run,
        "spikes": suite.burst.recent,
        "spikes_window": suite.burst.window,
        "loss_z": suite.loss_z.z,
        "grad_norm_z": suite.grad_norm_z.z,
        "joint_z": suite.joint_z.z,
        "level_shift": suite.shift.value,
    }
    if isfinite(suite.trend.rise):
        found["rise"] = suite.trend.rise
    return found
