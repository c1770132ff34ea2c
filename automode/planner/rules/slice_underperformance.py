"""A named slice of the held-out data is worse than the rest, validation after validation."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt

from automode.planner.cards import Reason
from automode.planner.events import Group
from automode.planner.recipes import GateRecipe, MergeInterpolate, SelectIndices, TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable
from automode.planner.signals.slices import SliceMeasure, SliceWatch


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
        policy = view.policy.slices
        if not view.run.slices:
            return Silence(code="no_slices", why="the run names no slices")
        if len(view.validated) < policy.persist:
            return Silence(
                code="few_validations",
                why=f"{len(view.validated)} validations so far, and {policy.persist} in a row are needed",
            )
        recent = list(view.validated)[-policy.persist :]
        watch = SliceWatch(
            alpha=policy.alpha,
            persistence=policy.persist,
            min_gap=policy.gap,
            min_samples=view.policy.evidence.min_samples,
        )
        for validation in recent:
            watch.update({name: _measure(group) for name, group in validation.slices.items()})
        if not watch.lagging:
            return _no_slice(view, watch)
        name = watch.lagging[0]
        steps = tuple(v.step for v in recent)
        return if_executable(self._proposal(view, name, watch, steps), view)

    def _proposal(self, view: View, name: str, watch: SliceWatch, steps: tuple[int, ...]) -> Proposal:
        last = watch.tracks[name].last
        weighted = [Variant(name="weighted", loss_weight=3.0)] if view.run.exact_losses else []
        variants = [
            Variant(name="plain"),
            Variant(name="gentle", lr_mul=0.5),
            *weighted,
            Variant(name="flat", lr_mul=0.5, optimizer="sam"),
        ]
        classes = view.run.task in ("classification", "sequence")
        return Proposal(
            reason=self.id,
            action="fork",
            because=(
                f"Slice {name} ({last.n} held-out samples) scores {-last.mean:.3g} below the rest, {-last.z:.1f} standard errors "
                f"({watch.threshold:.1f} needed), and did so at each of the last {len(steps)} validations "
                f"(steps {', '.join(map(str, steps))})."
            ),
            selection=SelectIndices(slice=name),
            training_recipe=TrainingRecipe(
                replay=0.1, variants=tuple(variants[: view.policy.pacing.variants])
            ),
            gate_recipe=GateRecipe() if classes else None,
            merge_recipe=MergeInterpolate(),
            diagnostics={
                "slice": name,
                "n": last.n,
                "gap": -last.mean,
                "z": last.z,
                "threshold": watch.threshold,
                "steps": steps,
            },
        )


def _measure(group: Group) -> SliceMeasure:
    """A group holds the slice's utility minus the rest's, so the rest stands at 0."""
    se = sqrt(group.variance / group.n) if group.n else nan
    return SliceMeasure(mean=group.mean, rest=0.0, se=se, n=group.n)


def _no_slice(view: View, watch: SliceWatch) -> Silence:
    policy = view.policy.slices
    if not watch.tracks:
        return Silence(
            code="no_slices",
            why=f"the last validations measured no slice of at least {watch.min_samples} samples",
        )
    name, track = min(watch.tracks.items(), key=lambda item: (item[1].last.mean, item[0]))
    last = track.last
    return Silence(
        code="no_gap",
        why=(
            f"no slice lies behind at each of the last {policy.persist} validations; the worst is {name}: {last.mean:+.3g} against "
            f"the rest, z {last.z:.1f}, {track.run} times in a row (a card at -{policy.gap:g} and z -{watch.threshold:.1f})"
        ),
    )
