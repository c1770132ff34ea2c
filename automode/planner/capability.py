"""What this version, and this run, can carry out: the schema lists everything, this table says what has an executor.

Rules propose only what passes here, approval of anything else is refused with the reason, and the documentation prints
:data:`TABLE`. A value of the schema that is missing from the table is a failing test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Final, TypeAlias

from automode.planner.cards import PlanCard
from automode.planner.inputs import Run, Task
from automode.planner.metrics import TASKS
from automode.planner.recipes import (
    Adjustment,
    GateRecipe,
    MergeDistill,
    MergeRecipe,
    Resources,
    SearchSpace,
    SelectAll,
    SelectIndices,
    Selection,
    SelectKMeans,
    SelectQuantile,
    SelectSlices,
    TrainingRecipe,
    Variant,
)
from automode.planner.sharing import EQUAL_SHARE, sharing_refusals

if TYPE_CHECKING:
    from automode.planner.rules.base import Proposal


@dataclass(frozen=True, slots=True)
class Ability:
    """One value that a card may hold, and whether this version runs it.

    Attributes:
        part: Dotted name of the field.
        value: The value, or ``*`` for any.
        runs: Whether there is an executor.
        why: What is missing, where there is none.
    """

    part: str
    value: str
    runs: bool = True
    why: str = ""


TABLE: Final[tuple[Ability, ...]] = (
    Ability("selection", "all"),
    Ability("selection", "quantile"),
    Ability("selection", "kmeans"),
    Ability("selection", "slices"),
    Ability("selection", "indices"),
    Ability("variant.lr_mul", "*"),
    Ability("variant.weight_decay_mul", "*"),
    Ability("variant.weight_decay", "*"),
    Ability("variant.clip_norm", "*"),
    Ability("variant.optimizer", "keep"),
    Ability("variant.optimizer", "sgd"),
    Ability("variant.optimizer", "adam"),
    Ability("variant.optimizer", "adamw"),
    Ability("variant.optimizer", "sam"),
    Ability("variant.sam_rho", "*"),
    Ability("variant.ema", "*"),
    Ability("variant.precision", "keep"),
    Ability("variant.precision", "fp32"),
    Ability("variant.precision", "bf16"),
    Ability("variant.loss_weight", "*"),
    Ability("variant.batches", "selected"),
    Ability("variant.batches", "all"),
    Ability("variant.batch_mul", "*"),
    Ability("variant.updates", "*"),
    Ability("variant.schedule", "keep"),
    Ability("variant.schedule", "constant"),
    Ability("variant.schedule", "anneal"),
    Ability("variant.labels", "keep"),
    Ability("variant.labels", "relabel"),
    Ability("variant.adapter", "*"),
    Ability("variant.restart", "*"),
    Ability("training_recipe.replay", "*"),
    Ability("training_recipe.variants", "*"),
    Ability("training_recipe.search", "*"),
    Ability("training_recipe.early_stopping", "*"),
    Ability("training_recipe.per_part", "equal"),
    Ability("training_recipe.per_part", "by_size"),
    Ability("training_recipe.exclude", "*"),
    Ability("training_recipe.relabel", "predicted"),
    Ability("training_recipe.relabel", "given"),
    Ability("training_recipe.judged", "tail"),
    Ability("training_recipe.resources", "*"),
    Ability("training_recipe.retry", "*"),
    Ability("adjustment.rate_factor", "*"),
    Ability("adjustment.clip_norm", "*"),
    Ability("gate_recipe", "switch_softmax"),
    Ability("merge_recipe", "swa"),
    Ability("merge_recipe", "uniform"),
    Ability("merge_recipe", "greedy"),
    Ability("merge_recipe", "interpolate"),
    Ability("merge_recipe", "fisher_soup"),
    Ability("merge_recipe", "distill"),
    Ability("merge_recipe", "adapter_fuse"),
    Ability("acceptance.metric", "utility"),
    Ability("acceptance.metric", "accuracy"),
    Ability("acceptance.metric", "nll"),
    Ability("acceptance.metric", "log_score"),
    Ability("acceptance.metric", "huber"),
    Ability("acceptance.metric", "mse"),
)
"""Every part of a card that asks for work. The first entry that matches part and value counts."""


LEAST_PART: Final = 2
"""Rows of a part that a batch is divided into, at the least: norm layers cannot train on a single sample."""

ROUTED: Final[tuple[Task, ...]] = ("classification", "regression")
"""Tasks whose answers a router can mix."""

Planned: TypeAlias = "PlanCard | Proposal"
"""Whatever asks for work: a card, or a rule's proposal."""


def refusals(planned: Planned, run: Run, *, min_held_out: int = 2) -> list[str]:
    """Name everything in a card or proposal that this version or this run cannot carry out.

    Args:
        planned: A proposal or a card.
        run: What the run offers.
        min_held_out: Least samples in each held-out half (``policy.evidence.min_samples``).

    Returns:
        One sentence for each obstacle, in the order of the card's fields; empty when everything can run.
    """
    if planned.adjustment is not None:
        return [*_adjustment(planned.adjustment, run)]
    found = [*_evidence(planned, run, min_held_out), *_selection("selection", planned.selection, run)]
    if planned.training_recipe is not None:
        found += _training(planned.training_recipe, planned.selection, run)
        found += _annealing(planned)
        found += sharing_refusals(planned)
        found += _too_short(planned)
    if planned.gate_recipe is not None:
        found += _unable("gate_recipe", planned.gate_recipe.kind)
        if run.task not in ROUTED:
            found.append(f"gate_recipe: a router mixes classes or values, and this run's task is {run.task}")
    if planned.merge_recipe is not None:
        found += _merge(planned.merge_recipe, planned.action, planned.training_recipe)
        if isinstance(planned.merge_recipe, MergeDistill):
            found += _distillation(planned.merge_recipe, planned.gate_recipe, run)
    return found


def relabel_refusals(run: Run) -> list[str]:
    """Say why no sample of this run can be given another label; empty where it can."""
    if run.task != "classification":
        return [
            (
                "training_recipe.relabel: labels are replaced where they are whole numbers, one class a sample, and this run's task is "
                f"{run.task}"
            )
        ]
    if not run.has_ids:
        return [f"training_recipe.relabel: needs sample ids: {run.why_no_ids or 'this loader gives none'}"]
    return []


@lru_cache(maxsize=512)  # the same few values are looked up at every look of every rule
def _unable(part: str, value: str) -> tuple[str, ...]:
    """Look a value up in the table."""
    for ability in TABLE:
        if ability.part == part and ability.value in ("*", value):
            return () if ability.runs else (f"{part}: {value} cannot run in this version: {ability.why}",)
    return (f"{part}: {value} is not known to this version",)


def _evidence(planned: Planned, run: Run, least: int) -> Iterator[str]:
    if planned.action == "fork" and run.why_no_forks is not None:
        yield f"action: no specialist can be trained in this run: {run.why_no_forks}"
    if run.why_no_evidence is not None:
        yield f"acceptance: there is no held-out evidence in this run: {run.why_no_evidence}"
    elif min(run.val_a, run.val_b) < least:
        yield (
            f"acceptance: the held-out halves hold {run.val_a} and {run.val_b} samples, and each needs at least {least}: "
            "give a larger validation loader"
        )
    if isinstance(planned, PlanCard):
        metric = planned.acceptance.metric
        yield from _unable("acceptance.metric", metric)
        if TASKS.get(metric, run.task) != run.task:
            yield f"acceptance.metric: {metric} is of {TASKS[metric]}, and this run's task is {run.task}: leave it at utility"


def _adjustment(adjustment: Adjustment, run: Run) -> Iterator[str]:
    if adjustment.rate_factor != 1.0:
        yield from _unable("adjustment.rate_factor", f"{adjustment.rate_factor:g}")
        if run.why_no_rate is not None:
            yield f"adjustment.rate_factor: the rates cannot be changed in this run: {run.why_no_rate}"
    if adjustment.clip_norm is not None:
        yield from _unable("adjustment.clip_norm", f"{adjustment.clip_norm:g}")


def _selection(part: str, selection: Selection, run: Run) -> Iterator[str]:
    yield from _unable("selection", selection.kind)
    if isinstance(selection, SelectAll):
        return
    if not run.has_ids:
        yield f"{part}: {selection.kind} needs sample ids: {run.why_no_ids or 'this loader gives none'}"
    by_loss = isinstance(selection, SelectQuantile) or (
        isinstance(selection, SelectKMeans) and selection.feature != "embedding"
    )
    if by_loss and not run.exact_losses:
        why = run.why_inexact or "this run has none"
        yield f"{part}: {selection.kind} needs exact per-sample losses: {why}"
    margins = (isinstance(selection, SelectQuantile) and selection.metric == "margin") or (
        isinstance(selection, SelectKMeans) and selection.feature == "margin"
    )
    if margins and run.task != "classification":
        yield f"{part}: margins exist for classification only, and this run's task is {run.task}"
    if isinstance(selection, SelectSlices):
        for name in selection.slices:
            yield from _slice(part, name, run)
    if isinstance(selection, SelectIndices) and selection.ids is None and selection.artifact is None:
        yield from _slice(part, selection.slice or "", run)


def _slice(part: str, name: str, run: Run) -> Iterator[str]:
    if name not in run.slices:
        known = ", ".join(sorted(run.slices)) or "none"
        yield f"{part}: there is no slice {name!r}; this run has {known}"
    elif name not in run.train_slices:
        yield (
            f"{part}: slice {name!r} is a list of held-out samples, so its training samples are not known: "
            "give the slice as a function of (inputs, targets)"
        )


def _training(recipe: TrainingRecipe, selection: Selection, run: Run) -> Iterator[str]:
    if recipe.relabel is not None:
        yield from _unable("training_recipe.relabel", recipe.relabel.kind)
        yield from relabel_refusals(run)
    if recipe.exclude is not None:
        if isinstance(recipe.exclude, SelectAll):
            yield "training_recipe.exclude: all samples excluded leave nothing to train on"
        yield from _selection("training_recipe.exclude", recipe.exclude, run)
    if recipe.per_part is not None:
        yield from _unable("training_recipe.per_part", recipe.per_part)
    if recipe.judged is not None:
        yield from _unable("training_recipe.judged", recipe.judged)
    if recipe.judged == "tail" and not run.averages:
        yield "training_recipe.judged: tail needs averages, and this run keeps none: allow policy.averages, or leave judged out"
    if recipe.resources is not None:
        yield from _resources(recipe.resources, run)
    for variant in recipe.variants:
        yield from _variant(variant, selection, run)
    if recipe.search is not None:
        yield from _search(recipe.search, selection, run)


def _annealing(planned: Planned) -> Iterator[str]:
    recipe = planned.training_recipe
    if recipe is None or not recipe.anneals:
        return
    if len(recipe.schedules) > 1:
        others = ", ".join(sorted(recipe.schedules - {"anneal"}))
        yield (
            f"training_recipe: some variants anneal and some do not (schedule {others}), and one control cannot be fair to both: "
            "let all of them anneal, or none"
        )
    if planned.gate_recipe is not None or planned.merge_recipe is not None:
        yield (
            "training_recipe: the control that anneals alike has the compute of one specialist, and a router or a merge that of several: "
            "leave `gate_recipe` and `merge_recipe` out"
        )


def _too_short(planned: Planned) -> Iterator[str]:
    """A step that costs more than the way to the first rung would never be taken."""
    recipe = planned.training_recipe
    if not isinstance(planned, PlanCard) or recipe is None:
        return
    by_size = recipe.per_part == "by_size"
    way = EQUAL_SHARE * planned.budget_steps if by_size else float(planned.budget_steps)
    named = [(f"variant {v.name!r}", v) for v in recipe.variants]
    drawn = () if recipe.search is None else recipe.search.corners
    for where, variant in (*named, *((f"training_recipe.search.{name}", v) for name, v in drawn)):
        cost = variant.batch_mul * (2.0 if variant.optimizer == "sam" else 1.0)
        if cost > way:
            yield (
                f"{where}: one of its steps costs {cost:g} ordinary ones, and it has {way:g} to the first rung: raise budget_steps to "
                f"{ceil(cost / EQUAL_SHARE if by_size else cost)} at the least"
            )


def _resources(asked: Resources, run: Run) -> Iterator[str]:
    part = "training_recipe.resources"
    yield from _unable(part, "given")
    if run.why_no_resources is not None:
        yield (
            f"{part}: the card asks for {asked.text} a trial, which only a Ray cluster can give, and here {run.why_no_resources}: "
            'train with Trainer(backend="ray"), or leave resources out'
        )
    elif asked.gpus and run.device == "cpu":
        yield (
            f"{part}: the card asks for {asked.text} a trial, and trials train where the trunk does, on the CPU, so that a GPU "
            "would be held and never used: leave gpus at 0, or train the trunk on a GPU"
        )


def _variant(variant: Variant, selection: Selection, run: Run) -> Iterator[str]:
    where = f"variant {variant.name!r}"
    for name in ("optimizer", "precision", "batches", "schedule", "labels"):
        yield from (f"{where}: {why}" for why in _unable(f"variant.{name}", getattr(variant, name)))
    yield from (f"{where}: {why}" for why in _unable("variant.batch_mul", f"{variant.batch_mul:g}"))
    if variant.batch_mul != 1.0 and run.why_no_batch_mul is not None:
        yield f"{where}: batch_mul draws batches of another size than the loader's, and {run.why_no_batch_mul}: leave it at 1"
    yield from (f"{where}: {why}" for why in _updates(variant, run))
    if variant.restart and run.why_no_restart is not None:
        yield f"{where}: restart needs the run's first weights: {run.why_no_restart}"
    if variant.restart and variant.adapter is not None:
        yield f"{where}: an adapter is trained on what the trunk has learnt, and restart forgets it: leave one of them out"
    if variant.precision == "bf16" and not run.bf16:
        yield f"{where}: this device does not train in bf16"
    if variant.loss_weight != 1.0:
        if isinstance(selection, SelectAll):
            yield f"{where}: loss_weight weighs the selected samples against the rest, and all are selected"
        if not run.exact_losses:
            why = run.why_inexact or "this run has none"
            yield f"{where}: loss_weight needs exact per-sample losses: {why}"


def _updates(variant: Variant, run: Run) -> Iterator[str]:
    """Check whether batches can be divided as a variant would have it."""
    if variant.updates == 1:
        return
    yield from _unable("variant.updates", str(variant.updates))
    if run.why_no_batch_mul is not None:
        yield f"updates trains on each batch in parts, and {run.why_no_batch_mul}: leave it at 1"
    if run.batch < LEAST_PART * variant.updates:
        yield (
            f"updates divides batches of {run.batch:g} samples into {variant.updates} parts, and a part has {LEAST_PART} at the least: ask for "
            f"{max(1, int(run.batch // LEAST_PART))} or fewer"
        )
    if variant.batch_mul != 1.0 or variant.adapter is not None:
        yield (
            "updates is taken over by the trunk, which keeps its own batches after batch_mul and its own rates and steps after an adapter: "
            "leave one of them out"
        )


def _search(search: SearchSpace, selection: Selection, run: Run) -> Iterator[str]:
    """Check each corner of a search space as the variant that it would become."""
    for name, corner in search.corners:
        where = f"training_recipe.search.{name}"
        yield from (why.replace("variant 'corner'", where, 1) for why in _variant(corner, selection, run))


def _merge(merge: MergeRecipe, action: str, recipe: TrainingRecipe | None) -> Iterator[str]:
    yield from _unable("merge_recipe", merge.kind)
    if recipe is not None and len(recipe.label_sources) > 1:
        yield (
            "merge_recipe: some variants take new labels and some do not, so that the trunk would not know which to go on with: "
            "give all variants the same `labels`, or leave the merge out"
        )
    whole = [] if recipe is None else [v.name for v in recipe.variants if v.adapter is None]
    if recipe is not None and recipe.search is not None:
        whole.append("those of `search`")
    if merge.kind == "adapter_fuse" and whole:
        yield (
            f"merge_recipe: adapter_fuse sums low-rank deltas, and whole networks are trained by {', '.join(whole)}: give every variant an "
            "`adapter`, or use interpolate"
        )
    if recipe is not None and recipe.restarts:
        yield (
            "merge_recipe: a trial that restarts from the run's first weights has left the trunk's path, and a merge of weights is for states "
            "that share one: leave the merge out"
        )
    if action == "fork" and merge.kind == "swa":
        yield "merge_recipe: swa averages the trunk's own trajectory: use it with action merge, or merge by interpolate"
    if action == "merge" and merge.kind != "swa":
        yield f"merge_recipe: {merge.kind} merges specialists, and a merge card has none: use swa, or action fork"


def _distillation(merge: MergeDistill, gate: GateRecipe | None, run: Run) -> Iterator[str]:
    if run.task not in ROUTED:
        yield f"merge_recipe: distill teaches classes or values, and this run's task is {run.task}: use interpolate"
    if not run.has_ids:
        yield f"merge_recipe: distill needs sample ids: {run.why_no_ids or 'this loader gives none'}"
    if merge.teacher == "mixture" and gate is None:
        yield "merge_recipe: teacher mixture needs a `gate_recipe`, whose router mixes the teachers: add one, or use ensemble"
