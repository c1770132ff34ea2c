"""The capability table: complete, and every refusal names the part and the reason."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel

from automode.planner.capability import TABLE, refusals
from automode.planner.cards import PlanCard
from automode.planner.inputs import Run
from automode.planner.recipes import (
    Acceptance,
    GateRecipe,
    MergeAdapterFuse,
    MergeDistill,
    MergeInterpolate,
    MergeRecipe,
    MergeSwa,
    Relabel,
    RelabelGiven,
    RelabelPredicted,
    Resources,
    SearchSpace,
    SelectAll,
    SelectIndices,
    Selection,
    SelectKMeans,
    SelectQuantile,
    TrainingRecipe,
    Variant,
)
from automode.planner.rules.base import Proposal

DIGEST = "sha256:" + "0" * 64
TAIL = SelectQuantile.model_validate({"from": 0.8, "to": 1.0})

RELABELLED = TrainingRecipe(
    variants=(Variant(name="pruned"), Variant(name="relabelled", labels="relabel")),
    exclude=SelectIndices(ids=(1, 2)),
    relabel=RelabelPredicted(),
)


def run_of(**changes: Any) -> Run:
    return Run.model_validate(
        {
            "total_steps": 1000,
            "batch": 10,
            "val_a": 100,
            "val_b": 100,
            "task": "classification",
            "has_ids": True,
            "exact_losses": True,
            "slices": {"rotated": 40},
            "train_slices": ["rotated"],
        }
        | changes
    )


def fork(variant: dict[str, Any] | None = None, **changes: Any) -> Proposal:
    recipe = TrainingRecipe(variants=(Variant.model_validate({"name": "v"} | (variant or {})),))
    return Proposal(
        **({"reason": "manual", "action": "fork", "because": "1", "training_recipe": recipe} | changes)
    )


PLACED = TrainingRecipe(variants=(Variant(name="v"),), resources=Resources(cpus=2.0, gpus=0.5))


def test_a_run_whose_backend_places_trials_takes_cards_that_ask_for_what_it_uses() -> None:
    assert refusals(fork(training_recipe=PLACED), run_of(why_no_resources=None, device="cuda")) == []
    cores = PLACED.model_copy(update={"resources": Resources(cpus=4.0)})
    assert refusals(fork(training_recipe=cores), run_of(why_no_resources=None)) == []


def kinds_of(union: Any) -> list[str]:
    inner = get_args(union)[0]
    models = get_args(inner) or (inner,)
    return [m.model_fields["kind"].default for m in models if issubclass(m, BaseModel)]


def test_everything_that_a_card_can_ask_for_stands_in_the_table() -> None:
    listed = {(a.part, a.value) for a in TABLE}
    parts = {a.part for a in TABLE}
    for kind in kinds_of(Selection):
        assert ("selection", kind) in listed
    for kind in kinds_of(MergeRecipe):
        assert ("merge_recipe", kind) in listed
    for kind in kinds_of(Relabel):
        assert ("training_recipe.relabel", kind) in listed
    assert ("gate_recipe", GateRecipe().kind) in listed
    for name, field in Variant.model_fields.items():
        if name == "name":
            continue
        assert f"variant.{name}" in parts, name
        if isinstance(field.annotation, type) or not get_args(field.annotation):
            continue
        for value in get_args(field.annotation):
            if isinstance(value, str):
                assert (f"variant.{name}", value) in listed
    for name in TrainingRecipe.model_fields:
        assert f"training_recipe.{name}" in parts, name


def test_whatever_cannot_run_says_why() -> None:
    for ability in TABLE:
        assert ability.runs == (ability.why == "")


def test_a_plain_fork_can_run() -> None:
    assert refusals(fork(), run_of()) == []


def test_new_labels_can_be_trained_on_and_merged_where_every_variant_takes_them() -> None:
    assert refusals(fork(training_recipe=RELABELLED), run_of()) == []
    alike = RELABELLED.model_copy(update={"variants": RELABELLED.variants[1:]})
    assert refusals(fork(training_recipe=alike, merge_recipe=MergeInterpolate()), run_of()) == []


def test_a_card_may_anneal_where_all_of_its_variants_do() -> None:
    assert refusals(fork({"schedule": "anneal"}), run_of()) == []
    drawn = search(
        schedule={"kind": "choice", "choices": ["anneal"]}, lr_mul={"kind": "choice", "choices": [1.0, 2.0]}
    )
    assert refusals(drawn, run_of()) == []


def test_adapters_can_be_trained_and_fused() -> None:
    adapted = {"adapter": {"rank": 4, "targets": ["encoder.*"]}}
    assert refusals(fork(adapted), run_of()) == []
    assert refusals(fork(adapted, merge_recipe=MergeAdapterFuse()), run_of()) == []
    drawn = search(lr_mul={"kind": "choice", "choices": [1.0, 2.0]})
    assert (
        "those of `search`"
        in refusals(fork(training_recipe=drawn.training_recipe, merge_recipe=MergeAdapterFuse()), run_of())[0]
    )


def test_specialists_can_be_distilled_by_their_mean_or_by_their_router() -> None:
    assert refusals(fork(merge_recipe=MergeDistill()), run_of()) == []
    routed = fork(merge_recipe=MergeDistill(teacher="mixture"), gate_recipe=GateRecipe())
    assert refusals(routed, run_of(task="regression")) == []


@pytest.mark.parametrize(
    ("planned", "run", "words"),
    [
        (
            fork({"batch_mul": 2.0}),
            run_of(why_no_batch_mul="its batches are put together by a Pairs"),
            ["variant 'v'", "batch_mul", "by a Pairs: leave it at 1"],
        ),
        (
            fork({"updates": 4}),
            run_of(why_no_batch_mul="its batches are put together by a Pairs"),
            ["variant 'v'", "updates trains on each batch in parts", "by a Pairs: leave it at 1"],
        ),
        (
            fork({"updates": 64}),
            run_of(batch=20),
            ["batches of 20 samples into 64 parts", "ask for 10 or fewer"],
        ),
        (fork({"updates": 2, "batch_mul": 2.0}), run_of(), ["keeps its own batches after batch_mul"]),
        (fork({"updates": 2, "adapter": {"rank": 2}}), run_of(), ["rates and steps after an adapter"]),
        (fork(training_recipe=RELABELLED), run_of(task="regression"), ["relabel", "task is regression"]),
        (fork(training_recipe=RELABELLED), run_of(task="unknown"), ["relabel", "task is unknown"]),
        (
            fork(
                training_recipe=TrainingRecipe(
                    variants=(Variant(name="new", labels="relabel"),),
                    relabel=RelabelGiven(ids=(1,), labels=(0,)),
                )
            ),
            run_of(has_ids=False, why_no_ids="iterable"),
            ["training_recipe.relabel: needs sample ids: iterable"],
        ),
        (
            fork(training_recipe=RELABELLED, merge_recipe=MergeInterpolate()),
            run_of(),
            ["merge_recipe: some variants take new labels and some do not"],
        ),
        (
            fork(merge_recipe=MergeDistill()),
            run_of(task="sequence"),
            ["merge_recipe: distill teaches classes or values", "task is sequence"],
        ),
        (
            fork(merge_recipe=MergeDistill()),
            run_of(has_ids=False, why_no_ids="iterable"),
            ["merge_recipe: distill needs sample ids: iterable"],
        ),
        (
            fork({"schedule": "anneal"}, merge_recipe=MergeInterpolate()),
            run_of(),
            ["the control that anneals alike has the compute of one specialist"],
        ),
        (
            fork({"schedule": "anneal"}, gate_recipe=GateRecipe()),
            run_of(),
            ["leave `gate_recipe` and `merge_recipe` out"],
        ),
        (
            fork(
                training_recipe=TrainingRecipe(
                    variants=(Variant(name="a", schedule="anneal"), Variant(name="b", schedule="constant"))
                )
            ),
            run_of(),
            ["some variants anneal and some do not (schedule constant)"],
        ),
        (
            fork(merge_recipe=MergeAdapterFuse()),
            run_of(),
            ["adapter_fuse sums low-rank deltas, and whole networks are trained by v"],
        ),
        (
            fork(merge_recipe=MergeDistill(teacher="mixture")),
            run_of(),
            ["teacher mixture needs a `gate_recipe`"],
        ),
        (fork(merge_recipe=MergeSwa()), run_of(), ["swa averages the trunk's own trajectory"]),
        (
            Proposal(reason="manual", action="merge", because="1", merge_recipe=MergeInterpolate()),
            run_of(),
            ["interpolate merges specialists"],
        ),
        (fork({"precision": "bf16"}), run_of(), ["does not train in bf16"]),
        (fork({"loss_weight": 2.0}), run_of(), ["all are selected"]),
        (
            fork({"loss_weight": 2.0}, selection=SelectIndices(ids=(1,))),
            run_of(exact_losses=False, why_inexact="a batch loss"),
            ["loss_weight needs exact", "a batch loss"],
        ),
        (fork(selection=TAIL), run_of(has_ids=False, why_no_ids="iterable"), ["sample ids: iterable"]),
        (
            fork(selection=TAIL),
            run_of(exact_losses=False, why_inexact="odd"),
            ["exact per-sample losses: odd"],
        ),
        (
            fork(selection=SelectQuantile.model_validate({"from": 0, "to": 0.1, "metric": "margin"})),
            run_of(task="regression"),
            ["margins exist for classification only"],
        ),
        (
            fork(selection=SelectKMeans(k=2, clusters=(0,), feature="loss")),
            run_of(exact_losses=False),
            ["kmeans needs exact per-sample losses"],
        ),
        (fork(selection=SelectIndices(slice="rotatd")), run_of(), ["no slice 'rotatd'", "rotated"]),
        (
            fork(
                training_recipe=TrainingRecipe(variants=(Variant(name="v"),), exclude=SelectAll()),
            ),
            run_of(),
            ["leave nothing to train on"],
        ),
        (
            fork(
                training_recipe=TrainingRecipe(variants=(Variant(name="v"),), exclude=TAIL),
            ),
            run_of(has_ids=False),
            ["training_recipe.exclude: quantile needs sample ids"],
        ),
        (
            fork(training_recipe=PLACED),
            run_of(why_no_resources="trials train in worker processes of one thread each"),
            [
                "training_recipe.resources: the card asks for 2 cores and 0.5 GPUs a trial",
                "worker processes of one thread each",
                'Trainer(backend="ray"), or leave resources out',
            ],
        ),
        (fork(training_recipe=PLACED), run_of(), ["begun by a version that gave trials none"]),
        (
            fork(training_recipe=PLACED),
            run_of(why_no_resources=None, device="cpu"),
            ["on the CPU", "leave gpus at 0"],
        ),
        (fork(gate_recipe=GateRecipe()), run_of(task="sequence"), ["gate_recipe", "task is sequence"]),
        (fork(), run_of(why_no_forks="the model cannot be copied"), ["the model cannot be copied"]),
        (fork(), run_of(why_no_evidence="no validation loader"), ["no validation loader"]),
        (fork(), run_of(val_b=1), ["100 and 1 samples"]),
    ],
)
def test_each_obstacle_is_named(planned: Proposal, run: Run, words: list[str]) -> None:
    found = refusals(planned, run)
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]


def test_all_obstacles_are_named_at_once() -> None:
    found = refusals(
        fork({"batch_mul": 2.0, "precision": "bf16"}, selection=TAIL),
        run_of(has_ids=False, val_a=0, why_no_batch_mul="it has its own"),
    )
    assert len(found) == 4


def test_the_policys_least_held_out_counts() -> None:
    assert refusals(fork(), run_of(val_a=29, val_b=29), min_held_out=30)
    assert refusals(fork(), run_of(val_a=30, val_b=30), min_held_out=30) == []


def test_embedding_clusters_and_stored_ids_need_no_exact_losses() -> None:
    run = run_of(exact_losses=False)
    assert refusals(fork(selection=SelectKMeans(k=2, clusters=(0,), artifact=DIGEST)), run) == []
    assert refusals(fork(selection=SelectIndices(ids=(1, 2))), run) == []
    assert refusals(fork(selection=SelectIndices(ids=(1, 2), slice="unheard of")), run) == []


def test_a_card_may_be_judged_by_any_metric_that_the_task_has() -> None:
    card = {
        "id": "0123abcd",
        "session": "s",
        "step": 10,
        "action": "fork",
        "reason": "manual",
        "because": "1",
        "training_recipe": {"variants": [{"name": "v"}]},
        "budget_steps": 20,
        "asha": {"max_steps": 60},
        "cost": {"sample_passes": 0, "share_of_remaining": 0},
        "cooldown_steps": 0,
        "base": {"step": 10, "policy": DIGEST},
    }
    allowed = {
        "classification": {"utility", "accuracy", "nll", "log_score"},
        "regression": {"utility", "huber", "mse"},
        "sequence": {"utility"},
        "unknown": {"utility"},
    }
    metrics = get_args(Acceptance.model_fields["metric"].annotation)
    assert set().union(*allowed.values()) == set(metrics)
    for task, takes in allowed.items():
        for metric in metrics:
            asked = PlanCard.model_validate(card | {"acceptance": {"metric": metric}})
            found = refusals(asked, run_of(task=task))
            assert len(found) == (metric not in takes)
            assert all(f"acceptance.metric: {metric} is of" in why and task in why for why in found)


def search(**parameters: Any) -> Proposal:
    space = SearchSpace.model_validate({"parameters": parameters, "draws": 2})
    return fork(training_recipe=TrainingRecipe(search=space))


def test_a_search_space_is_checked_at_its_corners() -> None:
    space = {
        "lr_mul": {"kind": "log_uniform", "low": 0.1, "high": 10.0},
        "optimizer": {"kind": "choice", "choices": ["keep", "sam"]},
    }
    assert refusals(search(**space), run_of()) == []


@pytest.mark.parametrize(
    ("proposal", "words"),
    [
        (
            search(precision={"kind": "choice", "choices": ["keep", "bf16"]}),
            ["search.precision", "bf16"],
        ),
        (
            search(schedule={"kind": "choice", "choices": ["keep", "anneal"]}),
            ["some variants anneal and some do not (schedule keep)"],
        ),
    ],
)
def test_a_search_space_that_reaches_too_far_is_refused(proposal: Proposal, words: list[str]) -> None:
    found = refusals(proposal, run_of())
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]
