"""What a card takes at the most, in sample passes and in trunk steps: one arithmetic for admission and for the reserve.

Unit: one sample pass is one forward pass of one sample. A training step of batch b costs 3 b, an evaluation of n samples
n. Rungs are measured in ordinary training steps, so a sharpness-aware step, which costs two, advances a trial by two and needs
no price of its own. The control costs nothing: it is the trunk itself.

The worst case counts every rung at its quota (``max(1, n // eta)`` go on), the drain included, one repeat of the longest segment,
every evaluation on val-A, the router, the merge and the one look at val-B (a probe may look at val-A in its place). Specialists of parts are not repeated: one that fails is left
out, since how long the longest is depends on sizes that are not known yet. Whoever runs the ladder gives the scheduler the
same limits, ``quota=True`` and ``budget=WorstCase.resource_steps``: then it is a bound and not an estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final, assert_never

from automode.planner.cards import Action, PlanCard
from automode.planner.events import Run
from automode.planner.recipes import (
    GateRecipe,
    MergeAdapterFuse,
    MergeDistill,
    MergeFisherSoup,
    MergeGreedy,
    MergeInterpolate,
    MergeRecipe,
    MergeSwa,
    MergeUniform,
    RelabelGiven,
    RelabelPredicted,
    SelectAll,
    Selection,
    SelectKMeans,
    TrainingRecipe,
)
from automode.planner.sharing import MAX_EXPERTS, trials_of

TRAIN_PASSES: Final = 3.0
"""Forward-equivalents of training on one sample: a forward pass, and a backward pass of twice its price."""

TRUNK_AVERAGES: Final = 3
"""EMA at two horizons and the tail average, each judged beside the raw weights."""

CHOOSING: Final = 512
"""Samples of val-A on which the best of raw weights and averages is chosen, where val-A holds many more. They are states of one
trajectory, whose differences on a sample are small, so that few samples tell them apart."""

CROSS_FIT: Final = 2
"""Halves of val-A on which a router is fitted and judged crosswise; another one on all of it is kept."""

CHECK_STEPS: Final = 8
"""Gradients of each specialist of a part that a backend which stacks may take beside its steps, to check its arithmetic (it takes four,
and as many again where the stack is made anew). Where a repeat is reserved, that pays for them."""

FISHER_PASSES: Final = 4.0
"""Of one sample's Fisher information: one forward pass to draw a label, then a forward and a backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstCase:
    """The most that a card can take, by part, in sample passes unless said otherwise.

    Attributes:
        train: Every rung at its quota.
        retry: One repeat of the longest segment; where there is none, what a backend takes to check its arithmetic.
        evaluate: Reports, snapshots and the look at val-B.
        resolve: Features of the training samples, where a selection needs them.
        gate: Experts' outputs on val-A and the router's own training.
        merge: Making and judging the merged states.
        resource_steps: Training steps of all segments, the repeat included; the scheduler's own budget.
        control_trial_steps: Training steps of a control that anneals as the specialists do.
        control_steps: Trunk steps until the control has had the compute of the candidate that it is compared with.
        copies: Copies of the weights that are in memory beside those of one trial.
    """

    train: float = 0.0
    retry: float = 0.0
    evaluate: float = 0.0
    resolve: float = 0.0
    gate: float = 0.0
    merge: float = 0.0
    resource_steps: int = 0
    control_trial_steps: int = 0
    control_steps: int = 0
    copies: int = 0

    @property
    def passes(self) -> float:
        """The sum, in sample passes."""
        return self.train + self.retry + self.evaluate + self.resolve + self.gate + self.merge


def step_passes(run: Run) -> float:
    """Sample passes of one ordinary trunk step."""
    return TRAIN_PASSES * run.batch


def rungs(first: int, reduction_factor: int, top: int) -> tuple[int, ...]:
    """Return the resources at which trials are compared: first, first * eta, ... and the top itself, in steps."""
    levels = []
    level = first
    while level < top:
        levels.append(level)
        level *= reduction_factor
    return (*levels, top)


def climbers(candidates: int, levels: int, reduction_factor: int) -> tuple[int, ...]:
    """Return how many trials train to each rung: all to the first, then ``max(1, n // eta)``."""
    counts = [candidates]
    while len(counts) < levels:
        counts.append(max(1, counts[-1] // reduction_factor))
    return tuple(counts)


def price_fork(
    *,
    recipe: TrainingRecipe,
    levels: Sequence[int],
    reduction_factor: int,
    run: Run,
    selection: Selection | None = None,
    gate: GateRecipe | None = None,
    merge: MergeRecipe | None = None,
) -> WorstCase:
    """Price a fork card.

    Args:
        recipe: Which trials there are.
        levels: The rungs, in steps, rising (:func:`rungs`).
        reduction_factor: One trial in this many goes on.
        run: Sizes of batch, training set and held-out halves, in samples.
        selection: What the trials specialise on.
        gate: The router, if any.
        merge: The merge, if any.

    Returns:
        The worst case by part.
    """
    parts = recipe.per_part is not None
    counts = climbers(trials_of(recipe, selection), len(levels), reduction_factor)
    segments = [high - low for low, high in zip((0, *levels[:-1]), levels, strict=True)]
    train_steps = sum(n * segment for n, segment in zip(counts, segments, strict=True))
    repeated = recipe.retry and not parts
    checked = counts[0] * CHECK_STEPS
    retry_steps = checked if parts else max(segments) if repeated else min(max(segments), checked)
    tail = recipe.judged == "tail"
    states = 1 + (TRUNK_AVERAGES if run.averages and not tail else 0)
    own = 1 if any(v.ema is not None for v in recipe.variants) or recipe.search is not None else 0
    experts = counts[-1]
    per_step = step_passes(run)
    alone = float(run.refresh) if tail else 0.0  # an average in the place of the raw weights
    report = _chosen(states + own, run) + alone
    looks = 1 if gate is None else experts + 1  # a mixture answers with every expert
    gate_passes = _gate(gate, experts, run)
    top = levels[-1]
    several = (
        parts
        or gate is not None
        or isinstance(merge, MergeUniform | MergeGreedy | MergeFisherSoup | MergeDistill | MergeAdapterFuse)
    )
    together = experts * top if several else top
    taught = student_passes(merge, experts + 1, run)
    annealed = top if recipe.anneals else 0  # the control that anneals alike, and once more if it fails
    return WorstCase(
        train=(train_steps + annealed) * per_step,
        retry=(retry_steps + annealed) * per_step,
        evaluate=(sum(counts) + (0 if parts else 1) + (2 if annealed else 0)) * report
        + _chosen(states, run)
        + alone
        + (looks + 1) * float((max(run.val_a, run.val_b) if tail else run.val_b) + run.refresh),
        resolve=_resolve(recipe, selection, run),
        gate=gate_passes,
        merge=_merge(merge, experts, run),
        resource_steps=train_steps + (retry_steps if repeated else 0),
        control_trial_steps=annealed,
        control_steps=together + ceil((gate_passes + taught) / per_step),
        copies=experts + 1 if taught or parts else 0,
    )


def price_merge(merge: MergeRecipe, run: Run) -> WorstCase:
    """Price a card that merges what the trunk carries, its best validated state included: evaluations only."""
    states = 1 + (TRUNK_AVERAGES if run.averages else 0)
    earlier = states * run.val_a + (states - 1) * run.refresh if run.keeps_best else 0
    return WorstCase(
        evaluate=_judged(states, run) + earlier + 2.0 * (run.val_b + run.refresh),
        merge=_merge(merge, 0, run),
    )


def price_stop(run: Run) -> WorstCase:
    """Price a card that ends the run: its last and its best state are judged, each raw and averaged."""
    states = 1 + (TRUNK_AVERAGES if run.averages else 0)
    held_out = run.val_a + run.val_b
    return WorstCase(evaluate=float((2 * states + 2) * held_out + (2 * states + 2) * run.refresh))


def price_of(action: Action, merge: MergeRecipe | None, run: Run) -> WorstCase:
    """Price what trains nothing: a merge, an adjustment, or the end of the run."""
    if action == "stop":
        return price_stop(run)
    return WorstCase() if merge is None else price_merge(merge, run)


def worst_case(card: PlanCard, run: Run) -> WorstCase:
    """Price a card: the amount that is reserved when it starts, and stated on its face as ``cost``."""
    if card.action != "fork":
        return price_of(card.action, card.merge_recipe, run)
    assert card.training_recipe is not None
    assert card.asha is not None
    return price_fork(
        recipe=card.training_recipe,
        levels=rungs(card.budget_steps, card.asha.reduction_factor, card.asha.max_steps),
        reduction_factor=card.asha.reduction_factor,
        run=run,
        selection=card.selection,
        gate=card.gate_recipe,
        merge=card.merge_recipe,
    )


def worst_case_passes(card: PlanCard, run: Run) -> float:
    """Sample passes that a card can take at the most."""
    return worst_case(card, run).passes


def _resolve(recipe: TrainingRecipe, selection: Selection | None, run: Run) -> float:
    """Cluster membership by embedding needs one forward pass of every training sample; the rest is in the ledger.

    New labels need one of the samples in question and of those that are asked, after norm statistics for averaged weights.
    """
    needing = sum(
        isinstance(part, SelectKMeans) and part.feature == "embedding"
        for part in (selection or SelectAll(), recipe.exclude)
    )
    reading = float(needing * (run.train_samples or 0))
    match recipe.relabel:
        case None:
            return reading
        case RelabelPredicted():
            return reading + (run.train_samples or 0) + run.refresh
        case RelabelGiven():
            return reading + 1.0  # one sample shows how many classes there are
        case _:
            assert_never(recipe.relabel)


def choosing_samples(states: int, val_a: int) -> int:
    """Return on how many samples of val-A one of so many states is chosen.

    All of them, or :data:`CHOOSING` where it takes less to choose on these and then to read the chosen one on all.
    """
    return CHOOSING if states * CHOOSING + val_a < states * val_a else val_a


def _chosen(states: int, run: Run) -> float:
    """The best of raw weights and averages, chosen on some of val-A and read on all of it."""
    few = choosing_samples(states, run.val_a)
    again = 0 if few == run.val_a else run.val_a + run.refresh
    return float(states * few + (states - 1) * run.refresh + again)


def _judged(states: int, run: Run) -> float:
    """Raw weights and averages, judged on val-A; all but the raw ones get norm statistics of their own first."""
    return float(states * run.val_a + (states - 1) * run.refresh)


def _router(members: int, run: Run) -> float:
    """Size of a router over so many networks relative to the trunk, at the most: its outputs alone grow with them."""
    return run.router * max(1.0, members / (MAX_EXPERTS + 1))


def _gate(gate: GateRecipe | None, experts: int, run: Run) -> float:
    if gate is None:
        return 0.0
    members = experts + 1  # the control is one
    outputs = members * (run.refresh + (1 + CROSS_FIT) * run.val_a)
    training = TRAIN_PASSES * _router(members, run) * (CROSS_FIT * 0.5 + 1.0) * gate.epochs * run.val_a
    return float(outputs + training)


def _merge(merge: MergeRecipe | None, experts: int, run: Run) -> float:
    judged = float(run.val_a + run.refresh)
    members = experts + 1  # the control is one
    match merge:
        case None | MergeSwa():
            return 0.0
        case MergeUniform():
            return judged + run.refresh
        case MergeGreedy():
            return (2 * members - 1) * judged + run.refresh
        case MergeInterpolate() | MergeAdapterFuse():
            return len(merge.weights) * judged + run.refresh
        case MergeFisherSoup():
            return judged + run.refresh + FISHER_PASSES * members * merge.samples
        case MergeDistill():
            states = 1 + (TRUNK_AVERAGES if run.averages else 0)
            return student_passes(merge, members, run) + _chosen(states, run) + members * run.refresh
        case _:
            assert_never(merge)


def student_passes(merge: MergeRecipe | None, members: int, run: Run) -> float:
    """Price a student's steps: its own, and the pass of every teacher (and of the router) over the same samples.

    Args:
        merge: How the card merges; what is no distillation has no student.
        members: The teachers, the control among them.
        run: Sizes.
    """
    if not isinstance(merge, MergeDistill):
        return 0.0
    teachers = members + (_router(members, run) if merge.teacher == "mixture" else 0.0)
    return merge.steps * run.batch * (TRAIN_PASSES + teachers)
