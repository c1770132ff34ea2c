"""The stacked backend: what every backend must do, and members that end as they would have ended alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stacked_bench import (
    CLOSE,
    MIXED,
    STEPS,
    Attention,
    Convolutions,
    Perceptron,
    adam,
    adamw,
    assert_equal,
    bench_of,
    both,
    farthest,
    jobs_of,
    plain_sgd,
    run,
    sgd,
    stackable,
)
from torch import nn
from torch.optim import lr_scheduler as schedules

from automode.backends import stacking_rule
from automode.backends.base import Backend, Fate, SegmentJob, SegmentRunner
from automode.backends.inline import InlineBackend
from automode.backends.stacked import StackedBackend
from automode.planner.recipes import EarlyStopping, TrainingRecipe, Variant
from automode.testing import BackendConformance
from automode.testing.backends import drained
from automode.testing.bench import (
    BATCH,
    FEATURES,
    identical,
    make_bench,
)
from automode.testing.scripted import ScriptedRunner, scripted_job
from automode.testing.training import TrainingConformance
from automode.trainer.sample_source import BatchPlan
from automode.trainer.stackable import StackableSpecialist, StackableSpecialists


class TestStacked(BackendConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return StackedBackend(stackable(runner), slots=4)


class TestStackedWithRealSpecialists(TrainingConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return StackedBackend(stackable(runner))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        *((Perceptron, optimizer) for optimizer in (adam, adamw, sgd, plain_sgd)),
        (Convolutions, adamw),
        (Attention, adam),
    ],
)
def test_members_end_as_they_would_alone(
    network: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    tmp_path: Path,
) -> None:
    bench = bench_of(tmp_path, network(), optimizer=optimizer)
    alone, together, said = both(bench, jobs_of(bench))
    assert said == []
    assert_equal(bench, alone, together)
    assert not identical(bench.weights(together[0]), bench.weights(together[1]))


@pytest.mark.usefixtures("always")
def test_per_step_losses_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path)
    seen: dict[int, list[float]] = {}

    def took(segment: StackableSpecialist, loss: float, norm: float) -> Fate:
        seen.setdefault(segment.job.trial, []).append(loss)
        return original(segment, loss, norm)

    original = StackableSpecialist.took
    monkeypatch.setattr(StackableSpecialist, "took", took)
    run(StackedBackend(StackableSpecialists(bench.runner)), jobs_of(bench))
    for trial, job in enumerate(jobs_of(bench)):
        segment = StackableSpecialists(bench.runner).open(job)
        segment.advance(stacking_rule.WARM_UP_STEPS)
        own = []
        while not segment.done:
            weight = torch.tensor(job.variant.loss_weight, dtype=torch.float64)
            own.append(float(segment.loss_of(segment.model, segment.draw(), weight).detach()))
            segment.advance(1)
        assert len(own) == STEPS - stacking_rule.WARM_UP_STEPS
        assert seen[trial] == pytest.approx(own, abs=CLOSE)


@pytest.mark.usefixtures("always")
def test_single_precision_agrees_to_rounding(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd)
    bench.card(TrainingRecipe(variants=MIXED, replay=0.25), selected=np.arange(64))
    alone, together, said = both(bench, jobs_of(bench))
    assert said == []
    for trial, mine in together.items():
        assert mine.value == pytest.approx(alone[trial].value, abs=1e-5)
        assert farthest(bench.weights(mine), bench.weights(alone[trial])) < 1e-5


@pytest.mark.usefixtures("always")
def test_schedules_and_trunk_clipping_are_followed(tmp_path: Path) -> None:
    bench = bench_of(
        tmp_path,
        clip_norm=0.4,
        scheduler=lambda optimizer: schedules.OneCycleLR(optimizer, 0.02, total_steps=200),
    )
    assert_equal(bench, *both(bench, jobs_of(bench))[:2])


@pytest.mark.usefixtures("always")
def test_variants_that_change_the_optimizers_kind_make_a_group_of_their_own(tmp_path: Path) -> None:
    variants = [
        Variant(name=f"v{i}", optimizer="adamw" if i % 2 else "keep", lr_mul=1.0 + i) for i in range(4)
    ]
    bench = bench_of(tmp_path, variants=variants)
    alone, together, said = both(bench, jobs_of(bench, variants))
    assert_equal(bench, alone, together)
    assert any("unlike" in text for text in said)


@pytest.mark.usefixtures("always")
def test_the_next_rung_starts_where_the_first_one_ended(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    alone, together, _ = both(bench, jobs_of(bench, top=2 * STEPS))
    second = [
        replace(job, checkpoint=together[job.trial].checkpoint, from_resource=STEPS, to_resource=2 * STEPS)
        for job in jobs_of(bench, top=2 * STEPS)
    ]
    inline = [replace(job, checkpoint=alone[job.trial].checkpoint) for job in second]
    runner = StackableSpecialists(bench.runner)
    assert_equal(bench, run(InlineBackend(runner), inline), run(StackedBackend(runner), second))


@pytest.mark.usefixtures("always")
def test_members_stop_early_each_at_its_own_time(tmp_path: Path) -> None:
    variants = [Variant(name=f"v{i}", lr_mul=rate) for i, rate in enumerate((0.01, 1.0, 3.0, 30.0))]
    bench = bench_of(tmp_path, variants=variants, early_stopping=EarlyStopping(patience=2, min_delta=0.01))
    alone, together, _ = both(bench, jobs_of(bench, variants, end=80))
    assert_equal(bench, alone, together)
    assert len({done.passes for done in alone.values()}) > 1


@pytest.mark.usefixtures("always")
def test_members_may_walk_through_batches_of_their_own(tmp_path: Path) -> None:
    class Own(StackableSpecialists):
        def open(self, job: SegmentJob) -> StackableSpecialist:
            segment = super().open(job)
            data = bench.runner.cards[job.card]
            segment._plan = BatchPlan(
                data.selected, data.others, replay=0.25, batch_size=BATCH, entropy=(job.trial, 99)
            )
            monkeypatched = type(
                "OwnBatches", (StackableSpecialist,), {"batch_key": property(lambda s: s.job.trial)}
            )
            segment.__class__ = monkeypatched
            return segment

    bench = bench_of(tmp_path)
    alone, together, said = both(bench, jobs_of(bench), Own(bench.runner))
    assert said == []
    assert_equal(bench, alone, together)


@pytest.mark.usefixtures("always")
def test_frozen_and_unreached_parameters_stay_as_they_are(tmp_path: Path) -> None:
    class Partly(Perceptron):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 3)
            self.body[0].weight.requires_grad_(False)

    bench = bench_of(tmp_path, Partly())
    alone, together, said = both(bench, jobs_of(bench))
    assert said == []
    assert_equal(bench, alone, together)
    base = bench.checkpoints.load(bench.base)[0]
    for name in ("spare.weight", "body.body.0.weight" if "body.body.0.weight" in base else "body.0.weight"):
        assert torch.equal(bench.weights(together[1])[name], base[name])


@pytest.mark.usefixtures("always")
def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(Perceptron):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
            self.body[2].weight = self.body[0].weight

    bench = bench_of(tmp_path, Tied())
    alone, together, said = both(bench, jobs_of(bench))
    assert said == []
    assert_equal(bench, alone, together)


# Slots and slices.


def test_more_jobs_than_slots_wait_for_the_next_group(tmp_path: Path, always: None) -> None:
    bench = bench_of(tmp_path)
    runner = StackableSpecialists(bench.runner)
    jobs = jobs_of(bench)
    backend = StackedBackend(runner, slots=2)
    for job in jobs:
        backend.submit(job)
    first = []
    while not first:
        first = backend.pump(1)
    assert sorted(result.job.trial for result in first) == [0, 1]
    together = run(backend, [])
    assert sorted(together) == [2, 3, 4]
    assert_equal(bench, run(InlineBackend(runner), jobs[2:]), together)


def test_a_group_trains_no_more_in_a_slice_than_its_share(tmp_path: Path, always: None) -> None:
    bench = bench_of(tmp_path)
    backend = StackedBackend(StackableSpecialists(bench.runner))
    for job in jobs_of(bench):
        backend.submit(job)
    for pumps in range(1, 25):
        backend.pump(1)
        assert backend._group is not None
        trained = sum(segment.job.to_resource - segment.steps_left for segment in backend._group.segments)
        assert trained <= 7 * pumps
    assert trained > 7 * 24 - stacking_rule.WARM_UP_STEPS * 5 - 8 * 5


def test_a_backend_without_a_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="slots is 0"):
        StackedBackend(ScriptedRunner(), slots=0)


def test_segments_that_cannot_be_taken_apart_are_opened_in_their_turn_only() -> None:
    opened: list[int] = []

    class Watched(ScriptedRunner):
        def open(self, job: SegmentJob) -> Any:
            opened.append(job.trial)
            return super().open(job)

    backend = StackedBackend(Watched())
    for trial in range(3):
        backend.submit(scripted_job(trial, end=4))
    backend.pump(1)
    assert opened == [0]
    drained(backend, seconds=10)
    assert opened == [0, 1, 2]
