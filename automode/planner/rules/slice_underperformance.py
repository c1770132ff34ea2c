"""A named slice of the held-out data is worse than the rest, validation after validation."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

from automode.planner.cards import Reason
from automode.planner.events import Group
from automode.planner.recipes import GateRecipe, MergeInterpolate, SelectIndices, TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable


@dataclass(frozen=True, slots=True)
class SliceUnderperformance:
    """Propose specialists for the slice that has fallen behind the furthest.

    A slice counts when its mean utility lies below the rest's by the gap, and by z standard errors, at each of the last
    validations. Thresholds are ``policy.slices`` and ``policy.evidence.min_samples``.
    """

    id: Reason = "slice_underperformance"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose to specialise on the worst persistent slice, with a router over the specialists."""
        policy = view.policy.slices
        if not view.run.slices:
            return Silence(code="no_slices", why="the run names no slices")
        if len(view.validated) < policy.persist:
            return Silence(
                code="few_validations",
                why=f"{len(view.validated)} validations so far, and {policy.persist} in a row are needed",
            )
        recent = list(view.validated)[-policy.persist :]
        behind = {}
        for name in sorted(recent[-1].slices):
            history = [v.slices.get(name) for v in recent]
            groups = [g for g in history if g is not None and g.n >= view.policy.evidence.min_samples]
            if len(groups) == policy.persist and all(
                -g.mean >= policy.gap and -z_of(g) >= policy.z for g in groups
            ):
                behind[name] = groups[-1]
        if not behind:
            return _no_slice(view, recent[-1].slices)
        worst = min(behind, key=lambda name: behind[name].mean)
        steps = tuple(v.step for v in recent)
        return if_executable(self._proposal(view, worst, behind[worst], steps), view)

    def _proposal(self, view: View, name: str, group: Group, steps: tuple[int, ...]) -> Proposal:
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
                f"Slice {name} ({group.n} held-out samples) scores {-group.mean:.3g} below the rest, {-z_of(group):.1f} standard "
                f"errors, and did so at each of the last {len(steps)} validations (steps {', '.join(map(str, steps))})."
            ),
            selection=SelectIndices(slice=name),
            training_recipe=TrainingRecipe(
                replay=0.1, variants=tuple(variants[: view.policy.pacing.variants])
            ),
            gate_recipe=GateRecipe() if classes else None,
            merge_recipe=MergeInterpolate(),
            diagnostics={"slice": name, "n": group.n, "gap": -group.mean, "z": z_of(group), "steps": steps},
        )


def z_of(group: Group) -> float:
    """The mean in standard errors; infinite where nothing varies and the mean is not 0."""
    if group.n < 2 or group.mean == 0.0:
        return 0.0
    if group.variance <= 0.0:
        return inf if group.mean > 0.0 else -inf
    return group.mean / sqrt(group.variance / group.n)


def _no_slice(view: View, slices: dict[str, Group]) -> Silence:
    policy = view.policy.slices
    if not slices:
        return Silence(code="no_slices", why="the last validation measured no slice")
    name = min(sorted(slices), key=lambda s: slices[s].mean)
    group = slices[name]
    return Silence(
        code="no_gap",
        why=(
            f"no slice lies behind at each of the last {policy.persist} validations; the last one's worst is {name}: "
            f"{group.mean:+.3g} against the rest, z {z_of(group):.1f}, {group.n} samples (a card at -{policy.gap:g} and "
            f"z -{policy.z:g} with {view.policy.evidence.min_samples})"
        ),
    )
