"""A named slice of the held-out data is worse than the rest, validation after validation."""

from __future__ import annotations

from dataclasses import dataclass

from automode.planner.capability import ROUTED
from automode.planner.cards import Reason
from automode.planner.recipes import GateRecipe, MergeInterpolate, SelectIndices, TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable
from automode.planner.signals.slices import SliceWatch


@dataclass(frozen=True, slots=True)
class SliceUnderperformance:
    """Propose specialists for the slice that has fallen behind the furthest.

    A slice lags (:class:`SliceWatch`) when its mean utility lies below the rest's by the gap, and significantly so with
    correction for the number of slices, at each of the last validations. Thresholds are ``policy.slices`` and
    ``policy.evidence.min_samples``.
    """

    id: Reason = "slice_underperformance"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose to specialise on the worst lagging slice, with a router over the specialists."""
        if not view.run.slices:
            return Silence(code="no_slices", why="the run names no slices")
        watch = view.signals.slices
        if not watch.lagging:
            return _no_slice(watch)
        return if_executable(self._proposal(view, watch.lagging[0], watch), view)

    def _proposal(self, view: View, name: str, watch: SliceWatch) -> Proposal:
        track = watch.tracks[name]
        last = track.last
        weighted = [Variant(name="weighted", loss_weight=3.0)] if view.run.exact_losses else []
        variants = [
            Variant(name="plain"),
            Variant(name="gentle", lr_mul=0.5),
            *weighted,
            Variant(name="flat", lr_mul=0.5, optimizer="sam"),
        ]
        routed = view.run.task in ROUTED
        return Proposal(
            reason=self.id,
            action="fork",
            because=(
                f"Slice {name} ({last.n} held-out samples) scores {last.rest - last.mean:.3g} below the rest, {-last.z:.1f} standard errors "
                f"({watch.threshold:.1f} needed), and has done so for {track.run} validations in a row ({watch.persistence} needed)."
            ),
            selection=SelectIndices(slice=name),
            training_recipe=TrainingRecipe(
                replay=0.1, variants=tuple(variants[: view.policy.pacing.variants])
            ),
            gate_recipe=GateRecipe() if routed else None,
            merge_recipe=MergeInterpolate(),
            diagnostics={
                "slice": name,
                "n": last.n,
                "gap": last.rest - last.mean,
                "z": last.z,
                "threshold": watch.threshold,
                "validations": track.run,
                "catching_up_z": track.gap_z,
            },
        )


def _no_slice(watch: SliceWatch) -> Silence:
    if not watch.tracks:
        return Silence(
            code="no_slices",
            why=f"no validation has measured a slice of at least {watch.min_samples} samples",
        )
    name, track = min(watch.tracks.items(), key=lambda item: (item[1].last.mean - item[1].last.rest, item[0]))
    last = track.last
    return Silence(
        code="no_gap",
        why=(
            f"no slice has lain behind for {watch.persistence} validations in a row; the worst is {name}: "
            f"{last.mean - last.rest:+.3g} against the rest, z {last.z:.1f}, {track.run} in a row (a card at -{watch.min_gap:g} and "
            f"z -{watch.threshold:.1f})"
        ),
    )
