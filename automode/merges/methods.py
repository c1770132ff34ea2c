"""The merge menu: one call for every method, refused by name or by reason when it cannot run.

``merge("greedy", parent=..., members=..., context=...)`` is all that an executor needs. A method is a frozen dataclass:
its fields are the card's options. Built-ins are the visible tuple :data:`METHODS`; a caller with methods of its own
passes a longer one.

What is common to all: states are checked before any work, running norm statistics are recomputed for the merged weights
where the context gives batches, and every sample that passes through a network is counted.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from automode.errors import MergeError
from automode.merges import adapter_fuse, averages, soups
from automode.merges.distill import distill, ensemble
from automode.merges.fisher import Bernoulli, Categorical, Gaussian, Likelihood, diagonal_fisher
from automode.merges.merge_context import (
    Judge,
    MergeContext,
    MergeMethod,
    MergeResult,
    ReportValue,
    loaded,
    needs_model,
    needs_score,
)
from automode.merges.moe import Task
from automode.merges.state_dicts import StateDict, cloned, incompatibility


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """The plain mean of the members (the parent counts only if it is one of them)."""

    name: str = "uniform"

    def applicable(
        self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
    ) -> str | None:
        """See :class:`MergeMethod`."""
        return incompatibility(parent, members)

    def merge(self, parent: StateDict, members: Sequence[StateDict], context: MergeContext) -> MergeResult:
        """See :class:`MergeMethod`."""
        return MergeResult(
            state=averages.uniform(members, parent=parent), passes=0, report={"members": len(members)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """Greedy soup of the members by held-out score."""

    name: str = "greedy"

    def applicable(
        self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
    ) -> str | None:
        """See :class:`MergeMethod`."""
        return incompatibility(parent, members) or needs_score(context)

    def merge(self, parent: StateDict, members: Sequence[StateDict], context: MergeContext) -> MergeResult:
        """See :class:`MergeMethod`."""
        judge = Judge(context)
        soup = soups.greedy(members, judge.score, parent=parent)
        report: dict[str, ReportValue] = {
            "members": len(members),
            "ingredients": soup.ingredients,
            "single_scores": soup.single_scores,
            "score": soup.score,
        }
        return MergeResult(state=soup.state, passes=judge.passes, report=report)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swa:
    """The trunk's own trajectory: the best of its live averages by score, or the mean of snapshots given as members."""

    name: str = "swa"

    def applicable(
        self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
    ) -> str | None:
        """See :class:`MergeMethod`."""
        if context.trajectory:
            if members:
                return "both trajectory averages and snapshots came: give one of them"
            return incompatibility(parent, list(context.trajectory.values())) or needs_score(context)
        return incompatibility(parent, members)

    def merge(self, parent: StateDict, members: Sequence[StateDict], context: MergeContext) -> MergeResult:
        """See :class:`MergeMethod`."""
        if not context.trajectory:
            return MergeResult(
                state=averages.swa(members, parent=parent), passes=0, report={"members": len(members)}
            )
        judge = Judge(context)
        scores = {name: judge.checked(state, name) for name, state in context.trajectory.items()}
        best = max(scores, key=lambda name: scores[name])
        state = averages.uniform([context.trajectory[best]], parent=parent)
        report: dict[str, ReportValue] = {f"score_{name}": value for name, value in scores.items()}
        return MergeResult(
            state=state, passes=judge.passes, report={**report, "chosen": best, "score": scores[best]}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpolate:
    """The best-scored point on the line from the parent to one member.

    Attributes:
        weights: coefficients tried, in [-1, 2]; 1 is the member itself. Ties go to the one closest to the parent.
    """

    weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    name: str = "interpolate"

    def applicable(
        self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
    ) -> str | None:
        """See :class:`MergeMethod`."""
        if len(members) != 1:
            return f"{len(members)} members came: interpolation is between the parent and one member, pass the best"
        low, high = averages.EXTRAPOLATION_LIMITS
        if not self.weights or not all(low <= weight <= high for weight in self.weights):
            return f"the interpolation weights are {self.weights}: at least one is needed, all in [{low}, {high}]"
        return incompatibility(parent, members) or needs_score(context)

    def merge(self, parent: StateDict, members: Sequence[StateDict], context: MergeContext) -> MergeResult:
        """See :class:`MergeMethod`."""
        judge = Judge(context)
        grid = sorted(self.weights, key=abs)
        scores = [
            judge.checked(averages.interpolate(parent, members[0], weight), f"weight {weight}")
            for weight in grid
        ]
        best = max(range(len(grid)), key=lambda index: (scores[index], -index))
        report: dict[str, ReportValue] = {
            "weights": tuple(grid),
            "scores": tuple(scores),
            "weight": grid[best],
            "score": scores[best],
        }
        state = averages.interpolate(parent, members[0], grid[best])
        return MergeResult(state=state, passes=judge.passes, report=report)


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherSoup:
    """The members' mean, element by element in proportion to their true diagonal Fisher information.

    Attributes:
        samples: inputs that each member's information is estimated on.
        floor: smallest normalised information, as a share of a tensor's mean; in (0, 1].
    """

    samples: int = 256
    floor: float = 1e-3
    name: str = "fisher_soup"

    def applicable(
        self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
    ) -> str | None:
        """See :class:`MergeMethod`."""
        if self.samples < 1 or not 0 < self.floor <= 1:
            return f"samples {self.samples} must be at least 1 and floor {self.floor} in (0, 1]"
        return incompatibility(parent, members) or needs_model(context, "estimate Fisher information")

    def merge(self, parent: StateDict, members: Sequence[StateDict], context: MergeContext) -> MergeResult:
        """See :class:`MergeMethod`."""
        assert context.build_model is not None
        assert context.batches is not None
        model = context.build_model()
        for parameter in model.parameters():
            # a layer that is frozen now may still differ between members
            parameter.requires_grad_(parameter.is_floating_point())
        passes = 0
        fishers = []
        for member in members:
            loaded(model, member)
            estimate = diagonal_fisher(
                model,
                context.batches(),
                likelihood=_likelihood(context.task),
                max_samples=self.samples,
                seed=context.seed,
                forward=context.forward,
            )
            passes += estimate.passes
            fishers.append(estimate.diagonal)
        state = soups.fisher_average(members, fishers, floor=self.floor, parent=parent)
        return MergeResult(
            state=state, passes=passes, report={"members": len(members), "samples": self.samples}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill:
    """One network of the parent's architecture, started from the parent and taught by the members or a mixture.

    Attributes:
        temperature: softens teacher and student.
        steps: optimizer steps.
    """

    temperature: float = 2.0
    steps: int = 200
    name: str = "distill"

    def applicable(
        self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
    ) -> str | None:
        """See :class:`MergeMethod`."""
        if self.steps < 1 or not (math.isfinite(self.temperature) and self.temperature > 0):
            return f"steps {self.steps} must be at least 1 and temperature {self.temperature} above 0"
        if context.teacher is not None:
            if context.teacher_passes is None:
                return "a teacher came without `teacher_passes`: state what one of its samples costs"
        else:
            reason = incompatibility(parent, members)
            if reason is not None:
                return f"{reason} (or give a `teacher`)"
        return needs_model(context, "distil")

    def merge(self, parent: StateDict, members: Sequence[StateDict], context: MergeContext) -> MergeResult:
        """See :class:`MergeMethod`."""
        assert context.build_model is not None
        assert context.batches is not None
        teacher, teacher_passes = context.teacher, context.teacher_passes
        if teacher is None or teacher_passes is None:
            models = [loaded(context.build_model(), member) for member in members]
            teacher = ensemble(models, task=context.task, forward=context.forward)
            teacher_passes = float(len(members))
        student = loaded(context.build_model(), parent)
        done = distill(
            student,
            teacher,
            context.batches,
            steps=self.steps,
            teacher_passes=teacher_passes,
            task=context.task,
            temperature=self.temperature,
            optimizer=context.optimizer,
            seed=context.seed,
            forward=context.forward,
        )
        report: dict[str, ReportValue] = {
            "steps": done.steps,
            "samples": done.samples,
            "first_loss": done.first_loss,
            "last_loss": done.last_loss,
        }
        return MergeResult(state=cloned(student.state_dict()), passes=done.passes, report=report)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFuse:
    """The parent plus the weighted sum of the specialists' low-rank deltas."""

    name: str = "adapter_fuse"

    def applicable(
        self, parent: StateDict, members: Sequence[StateDict], context: MergeContext
    ) -> str | None:
        """See :class:`MergeMethod`."""
        if not context.adapters:
            return "no adapters came: adapter fusion needs specialists that were trained as low-rank adapters"
        if members:
            return f"{len(members)} full states came beside the adapters: adapter fusion reads adapters only"
        return None

    def merge(self, parent: StateDict, members: Sequence[StateDict], context: MergeContext) -> MergeResult:
        """See :class:`MergeMethod`."""
        count = len(context.adapters)
        weights = [1.0 / count] * count if context.adapter_weights is None else list(context.adapter_weights)
        state = adapter_fuse.fuse(parent, context.adapters, weights)
        return MergeResult(state=state, passes=0, report={"adapters": count, "weights": tuple(weights)})


METHODS: tuple[MergeMethod, ...] = (
    Uniform(),
    Greedy(),
    Swa(),
    Interpolate(),
    FisherSoup(),
    Distill(),
    AdapterFuse(),
)
"""The built-in methods with their default options."""


def find(name: str, *, methods: Sequence[MergeMethod] = METHODS) -> MergeMethod:
    """Return the method of that name.

    Raises:
        MergeError: there is none; the message names the closest.
    """
    for method in methods:
        if method.name == name:
            return method
    known = [method.name for method in methods]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise MergeError(f"there is no merge method {name!r}; {hint}known: {', '.join(known)}")


def merge(
    method: str | MergeMethod,
    *,
    parent: StateDict,
    members: Sequence[StateDict],
    context: MergeContext,
    methods: Sequence[MergeMethod] = METHODS,
) -> MergeResult:
    """Merge, with norm statistics recomputed for the result, and count what it cost.

    Args:
        method: a name, or a method with options of its own such as ``Distill(steps=500)``.
        parent: the state that the members descend from.
        members: the states to merge.
        context: what the method may use.
        methods: where names are looked up.

    Raises:
        MergeError: the method is unknown or not applicable, or the merge failed.
    """
    chosen = find(method, methods=methods) if isinstance(method, str) else method
    reason = chosen.applicable(parent, members, context)
    if reason is not None:
        raise MergeError(f"{chosen.name} cannot merge this: {reason}")
    result = chosen.merge(parent, members, context)
    judge = Judge(context)
    state, how = judge.refreshed(result.state)
    return replace(
        result,
        state=state,
        passes=result.passes + judge.passes,
        report={**result.report, "method": chosen.name, "norm_statistics": how},
    )


def _likelihood(task: Task) -> Likelihood:
    match task:
        case "classification":
            return Categorical()
        case "binary":
            return Bernoulli()
        case "regression":
            return Gaussian()
