"""The worst case: the same numbers as the scheduler's own bound, and nothing forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.planner.cards import PlanCard
from automode.planner.inputs import Run
from automode.planner.pricing import (
    CHECK_STEPS,
    CHOOSING,
    choosing_samples,
    climbers,
    price_fork,
    price_merge,
    price_stop,
    rungs,
    step_passes,
    worst_case,
    worst_case_passes,
)
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
    SelectKMeans,
    TrainingRecipe,
    Variant,
)
from automode.scheduler.asha import ASHA
from automode.scheduler.bounds import worst_case_resource
from automode.scheduler.ladder import Ladder

DIGEST = "sha256:" + "0" * 64


def run_of(**changes: Any) -> Run:
    return Run.model_validate(
        {"total_steps": 1000, "batch": 10, "train_samples": 500, "val_a": 100, "val_b": 50} | changes
    )


def recipe_of(n: int) -> TrainingRecipe:
    return TrainingRecipe(variants=tuple(Variant(name=f"v{i}") for i in range(n)))


def test_a_ladder_priced_by_hand() -> None:
    # Three trials to 20, one of them on to 60: 3 * 20 + 40 steps, the longest segment of 40 once more; 30 passes a step.
    # Five reports (one repeated) and the control's snapshot on val-A (100), and two networks on val-B (50).
    worst = price_fork(recipe=recipe_of(3), levels=(20, 60), reduction_factor=3, run=run_of())
    assert worst.train == 100 * 30
    assert worst.retry == 40 * 30
    assert worst.evaluate == 5 * 100 + 100 + 2 * 50
    assert (worst.resolve, worst.gate, worst.merge) == (0, 0, 0)
    assert worst.passes == 3000 + 1200 + 700
    assert worst.resource_steps == 140
    assert worst.control_steps == 60


def test_a_recipe_without_a_second_try_reserves_what_checks_take_alone() -> None:
    recipe = recipe_of(3).model_copy(update={"retry": False})
    again, once = (
        price_fork(recipe=r, levels=(20, 60), reduction_factor=3, run=run_of())
        for r in (recipe_of(3), recipe)
    )
    assert once.retry == 3 * CHECK_STEPS * 30 < again.retry
    assert again.resource_steps - once.resource_steps == 40
    assert again.passes - once.passes == 40 * 30 - once.retry


def test_averages_are_judged_beside_raw_weights() -> None:
    plain = price_fork(recipe=recipe_of(1), levels=(10,), reduction_factor=3, run=run_of())
    averaged = price_fork(recipe=recipe_of(1), levels=(10,), reduction_factor=3, run=run_of(averages=True))
    assert plain.evaluate == (2 + 1) * 100 + 100
    assert averaged.evaluate == (2 + 1) * 4 * 100 + 100


def test_norm_statistics_are_recomputed_for_everything_but_raw_weights() -> None:
    worst = price_fork(
        recipe=recipe_of(1), levels=(10,), reduction_factor=3, run=run_of(averages=True, refresh=160)
    )
    assert worst.evaluate == (2 + 1) * (4 * 100 + 3 * 160) + 2 * (50 + 160)


def test_an_average_of_the_variants_own_is_one_more_candidate() -> None:
    own = TrainingRecipe(variants=(Variant(name="own", ema=0.9),))
    worst = price_fork(recipe=own, levels=(10,), reduction_factor=3, run=run_of(averages=True))
    assert worst.evaluate == 2 * 5 * 100 + 4 * 100 + 100


def test_clusters_by_embedding_need_every_training_sample_once() -> None:
    clusters = SelectKMeans(k=3, clusters=(0,), artifact=DIGEST)
    worst = price_fork(
        recipe=recipe_of(1), levels=(10,), reduction_factor=3, run=run_of(), selection=clusters
    )
    assert worst.resolve == 500
    by_loss = SelectKMeans(k=3, clusters=(0,), feature="loss", artifact=DIGEST)
    assert (
        price_fork(
            recipe=recipe_of(1), levels=(10,), reduction_factor=3, run=run_of(), selection=by_loss
        ).resolve
        == 0
    )


def test_a_routers_control_gets_the_sum_of_its_experts_and_the_router() -> None:
    gated = price_fork(
        recipe=recipe_of(9), levels=(10, 30), reduction_factor=3, run=run_of(), gate=GateRecipe(epochs=4)
    )
    assert climbers(9, 2, 3) == (9, 3)
    # Four networks answer val-A three times: for the fit, and mixed by either half's router.
    assert gated.gate == 4 * 3 * 100 + 3 * 2 * 4 * 100
    small = price_fork(
        recipe=recipe_of(9),
        levels=(10, 30),
        reduction_factor=3,
        run=run_of(router=0.25),
        gate=GateRecipe(epochs=4),
    )
    assert small.gate == 4 * 3 * 100 + 0.25 * 3 * 2 * 4 * 100
    assert gated.control_steps == 3 * 30 + -(-int(gated.gate) // 30)
    plain = price_fork(recipe=recipe_of(9), levels=(10, 30), reduction_factor=3, run=run_of())
    assert gated.evaluate == plain.evaluate + 3 * 50  # a mixture of four networks looks at val-B


@pytest.mark.parametrize(
    ("merge", "passes", "control"),
    [
        (None, 0, 30),
        (MergeInterpolate(weights=(0.5, 1.0)), 2 * (100 + 160) + 160, 30),
        (MergeUniform(), 100 + 160 + 160, 30),
        (MergeAdapterFuse(weights=(0.5, 1.0)), 2 * (100 + 160) + 160, 30),
        (MergeGreedy(), 3 * (100 + 160) + 160, 30),
        (MergeFisherSoup(samples=64), 100 + 160 + 160 + 4 * 2 * 64, 30),
        # Two teachers answer for each of the student's samples, and may need norm statistics of their own.
        (MergeDistill(steps=20), 20 * 10 * (3 + 2) + 100 + 2 * 160, 30 + 20 * 10 * 5 // 30 + 1),
    ],
)
def test_merges_of_one_specialist_with_the_control(
    merge: MergeRecipe | None, passes: int, control: int
) -> None:
    run = run_of(refresh=160)
    worst = price_fork(recipe=recipe_of(3), levels=(10, 30), reduction_factor=3, run=run, merge=merge)
    assert worst.merge == passes
    assert worst.control_steps == control


def test_a_student_is_priced_with_every_answer_of_its_teachers_and_stated_with_their_memory() -> None:
    merge = MergeDistill(steps=20, teacher="mixture")
    routed = {"recipe": recipe_of(9), "levels": (10, 30), "reduction_factor": 3, "gate": GateRecipe(epochs=1)}
    run = run_of(averages=True, refresh=160, router=0.5)
    worst = price_fork(**routed, run=run, merge=merge)
    plain = price_fork(**routed, run=run)
    student = 20 * 10 * (3 + 4 + 0.5)
    assert worst.merge == student + 4 * 100 + 3 * 160 + 4 * 160
    assert worst.control_steps == 3 * 30 + -(-int(plain.gate + student) // 30)
    assert (plain.copies, worst.copies) == (0, 4)


def test_a_card_that_anneals_pays_for_a_control_that_anneals_alike_and_for_its_one_repeat() -> None:
    def priced(schedule: str) -> Any:
        variants = [{"name": f"v{i}", "schedule": schedule} for i in range(3)]
        recipe = TrainingRecipe.model_validate({"variants": variants})
        return price_fork(recipe=recipe, levels=(20, 60), reduction_factor=3, run=run_of())

    plain, annealed = priced("keep"), priced("anneal")
    assert annealed.train - plain.train == annealed.retry - plain.retry == 60 * 30
    assert annealed.evaluate - plain.evaluate == 2 * 100
    assert (plain.control_trial_steps, annealed.control_trial_steps) == (0, 60)
    # The scheduler's own budget, and when the trunk has had as much as a candidate, stay what they are.
    assert (annealed.resource_steps, annealed.control_steps) == (plain.resource_steps, plain.control_steps)


def test_a_stop_judges_last_and_best_states_on_everything_that_is_held_out() -> None:
    run = run_of(averages=True, refresh=160)
    everything = run.val_a + run.val_b
    # Twice raw and three averages, then the look at candidate and control; norm statistics for each at the most.
    assert price_stop(run).passes == 10 * everything + 10 * 160
    assert price_stop(run_of()).passes == 4 * everything


def test_a_merge_of_the_trunks_averages_costs_evaluations_only() -> None:
    worst = price_merge(MergeSwa(), run_of(averages=True, refresh=160))
    assert worst.passes == 4 * 100 + 3 * 160 + 2 * (50 + 160)
    assert worst.resource_steps == worst.control_steps == 0
    kept = price_merge(MergeSwa(), run_of(averages=True, keeps_best=True, refresh=160))
    assert kept.passes - worst.passes == 4 * 100 + 3 * 160  # the best state and its averages, on val-A


def test_sharpness_aware_arms_cost_the_same_for_each_resource_step() -> None:
    sam = TrainingRecipe(variants=(Variant(name="flat", optimizer="sam"),))
    assert price_fork(recipe=sam, levels=(10, 30), reduction_factor=3, run=run_of()) == price_fork(
        recipe=recipe_of(1), levels=(10, 30), reduction_factor=3, run=run_of()
    )


def card_of(**changes: Any) -> PlanCard:
    return PlanCard.model_validate(
        {
            "id": "0123abcd",
            "session": "s",
            "step": 100,
            "action": "fork",
            "reason": "loss_plateau",
            "because": "3 %",
            "training_recipe": {"variants": [{"name": "a"}, {"name": "b"}, {"name": "c"}]},
            "budget_steps": 20,
            "asha": {"reduction_factor": 3, "max_steps": 60},
            "cost": {"sample_passes": 0, "share_of_remaining": 0},
            "cooldown_steps": 10,
            "base": {"step": 100, "policy": DIGEST},
        }
        | changes
    )


def test_a_card_is_priced_by_the_same_arithmetic() -> None:
    worst = worst_case(card_of(), run_of())
    assert worst == price_fork(recipe=recipe_of(3), levels=(20, 60), reduction_factor=3, run=run_of())
    assert worst_case_passes(card_of(), run_of()) == worst.passes
    merge = card_of(
        action="merge",
        training_recipe=None,
        asha=None,
        budget_steps=0,
        merge_recipe={"kind": "swa"},
    )
    assert worst_case(merge, run_of()) == price_merge(MergeSwa(), run_of())


@given(
    n=st.integers(1, 40),
    eta=st.integers(2, 5),
    first=st.integers(1, 50),
    extra=st.integers(0, 400),
)
def test_training_is_priced_as_the_scheduler_bounds_it(n: int, eta: int, first: int, extra: int) -> None:
    ladder = Ladder(first, first + extra, eta)
    levels = rungs(first, eta, first + extra)
    assert levels == ladder.levels
    worst = price_fork(recipe=recipe_of(n), levels=levels, reduction_factor=eta, run=run_of())
    assert worst.resource_steps == worst_case_resource(n, ladder, quota=True, retries=1)
    assert worst.train + worst.retry == worst.resource_steps * step_passes(run_of())


@given(
    values=st.lists(st.floats(-1, 1) | st.just(float("nan")), min_size=1, max_size=12),
    eta=st.integers(2, 4),
    fails=st.integers(0, 30),
)
def test_no_order_of_values_and_failures_trains_more_than_was_priced(
    values: list[float], eta: int, fails: int
) -> None:
    levels = rungs(5, eta, 5 * eta**2)
    priced = price_fork(recipe=recipe_of(len(values)), levels=levels, reduction_factor=eta, run=run_of())
    asha = ASHA(
        5, 5 * eta**2, eta, mode="max", candidates=len(values), quota=True, budget=priced.resource_steps
    )
    reports = trained = jobs = 0
    while (job := asha.next()) is not None:
        jobs += 1
        trained += job.to_resource - job.from_resource
        if jobs == fails:
            asha.failed(job.trial, job.attempt)
            continue
        asha.report(job.trial, job.to_resource, values[job.trial], job.attempt)
        reports += 1
    assert trained <= priced.resource_steps
    assert reports <= sum(climbers(len(values), len(levels), eta)) + 1


def test_of_a_large_val_a_some_samples_choose_and_all_of_them_judge_what_was_chosen() -> None:
    large = run_of(averages=True, val_a=3000, refresh=160)
    worst = price_fork(recipe=recipe_of(1), levels=(10,), reduction_factor=3, run=large)
    report = 4 * CHOOSING + 3000 + 4 * 160  # the chosen average gets its norm statistics once more
    assert worst.evaluate == (2 + 1) * report + 2 * (50 + 160)
    assert choosing_samples(1, 3000) == 3000
    assert choosing_samples(4, CHOOSING + 100) == CHOOSING + 100  # choosing on fewer would take more in all


@given(st.integers(1, 8), st.integers(0, 20_000))
def test_choosing_on_some_samples_never_takes_more(states: int, val_a: int) -> None:
    few = choosing_samples(states, val_a)
    assert 0 <= few <= val_a
    assert states * few + (0 if few == val_a else val_a) <= states * val_a
