"""Specialists in worker processes are those that the training process would have trained itself."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentJob
from automode.backends.inline import InlineBackend
from automode.backends.process import ProcessBackend
from automode.backends.starting import Start
from automode.errors import NotExecutableError
from automode.planner.recipes import TrainingRecipe, Variant
from automode.scheduler.asha import ASHA
from automode.testing.backends import drained
from automode.testing.bench import Bench, Memory, identical, make_bench, small_network
from automode.trainer.arithmetic import Arithmetic
from automode.trainer.evaluation import Evaluator
from automode.trainer.heldout import HeldOut
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.steps import pair_step
from automode.trainer.worker_runner import CardBriefs

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks, as Linux has them")

PLAIN = Variant(name="plain")
FAST = Variant(name="fast", lr_mul=2.0, weight_decay=0.01)
SHARP = Variant(name="sharp", optimizer="sam", ema=0.9)
WEIGHTED = Variant(name="weighted", loss_weight=3.0)


def bench_in(folder: Path, *, averages: bool = True) -> Bench:
    made = make_bench(
        folder,
        model=small_network(norm=True, dropout=0.3),
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 50),
        averages=averages,
        clip_norm=1.0,
    )
    made.card(TrainingRecipe(variants=(PLAIN, FAST, SHARP, WEIGHTED)))
    return made


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return bench_in(tmp_path)


@contextmanager
def workers(bench: Bench, start: Start = "fork", slots: int = 1) -> Iterator[ProcessBackend]:
    backend = ProcessBackend(bench.factory(), slots=slots, brief=CardBriefs(bench.runner), start=start)
    with closing(backend):
        yield backend


def trained(backend: Backend, *jobs: SegmentJob) -> list[SegmentDone]:
    for job in jobs:
        backend.submit(job)
    results = sorted(drained(backend, seconds=60.0), key=lambda r: r.job.trial)
    assert all(isinstance(r, SegmentDone) for r in results), results
    return [r for r in results if isinstance(r, SegmentDone)]


def assert_same(bench: Bench, theirs: SegmentDone, mine: SegmentDone) -> None:
    assert replace(theirs, seconds=0.0, checkpoint="") == replace(mine, seconds=0.0, checkpoint="")
    assert identical(bench.weights(theirs), bench.weights(mine))
    assert identical(bench.rest(theirs), bench.rest(mine))


@pytest.mark.parametrize("start", ["auto", pytest.param("fork", marks=LINUX)])
def test_a_worker_trains_what_the_training_process_would_have_trained(bench: Bench, start: Start) -> None:
    before = Memory.of(bench.trunk)
    with workers(bench, start) as backend:
        assert (backend.how == "fork") == (start == "fork")
        theirs = trained(
            backend, *(bench.job(v, trial=k) for k, v in enumerate((PLAIN, FAST, SHARP, WEIGHTED)))
        )
        assert before.differences(Memory.of(bench.trunk)) == []
        alone = [bench.train(done.job) for done in theirs]
        for done, mine in zip(theirs, alone, strict=True):
            assert_same(bench, done, mine)
        (on,) = trained(backend, bench.job(FAST, trial=1, start=6, end=12, checkpoint=theirs[1].checkpoint))
        assert_same(bench, on, bench.train(on.job))


@LINUX
def test_a_restart_is_the_same_in_a_worker(bench: Bench) -> None:
    weights, rest, _ = bench.checkpoints.load(bench.base)
    first = {name: tensor * 0.5 for name, tensor in weights.items()}
    bench.base = bench.checkpoints.save(weights, rest | {"first": first}, {"kind": "base"})
    with workers(bench) as backend:
        (done,) = trained(backend, bench.job(Variant(name="again", lr_mul=0.3, restart=True)))
        assert_same(bench, done, bench.train(done.job))


@LINUX
def test_a_job_follows_the_trunk_as_it_is_when_the_job_is_handed_out(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, averages=False)
    with workers(bench) as backend:
        (before,) = trained(backend, bench.job(PLAIN))
        bench.trunk.clip_norm = 0.01
        next(bench.trunk.model.parameters()).requires_grad_(False)
        bench.step(3)
        bench.base = bench.snapshot()
        bench.card(TrainingRecipe(variants=(PLAIN,)), selected=bench.held_out.ids[:40])
        (after,) = trained(backend, bench.job(PLAIN))
        assert_same(bench, after, bench.train(after.job))
        assert not identical(bench.weights(before), bench.weights(after))
        frozen = next(iter(bench.weights(after)))
        assert identical(bench.weights(after)[frozen], bench.trunk.model.state_dict()[frozen])


@LINUX
def test_a_card_of_two_trials_ends_the_same_in_workers_and_in_the_training_process(bench: Bench) -> None:
    def run(backend: Backend) -> tuple[list[tuple[int, int, float]], int]:
        asha = ASHA(4, 16, 2, mode="max", candidates=2)
        checkpoints: dict[tuple[int, int], str] = {}
        log = []
        while True:
            if not backend.busy:  # one at a time, so that both take the same decisions
                hand_out(backend, asha, checkpoints, bench)
            for r in backend.pump(4):
                assert isinstance(r, SegmentDone), r
                checkpoints[r.job.trial, r.job.to_resource] = r.checkpoint
                asha.report(r.job.trial, r.job.to_resource, value=r.value, attempt=r.job.attempt)
                log.append((r.job.trial, r.job.to_resource, r.value))
            best = asha.best()
            if best is not None and best.resource == 16:
                return log, best.trial

    inline = run(InlineBackend(bench.runner))
    with workers(bench) as backend:
        assert run(backend) == inline


def hand_out(backend: Backend, asha: ASHA, checkpoints: dict[tuple[int, int], str], bench: Bench) -> None:
    """Submit what the scheduler wants trained next."""
    job = asha.next()
    assert job is not None
    segment = bench.job(
        (PLAIN, FAST)[job.trial],
        trial=job.trial,
        start=job.from_resource,
        end=job.to_resource,
        top=16,
        checkpoint=checkpoints.get((job.trial, job.from_resource)),
    )
    backend.submit(replace(segment, attempt=job.attempt))


@LINUX
def test_a_variant_that_the_run_cannot_train_fails_there_as_it_does_here(bench: Bench) -> None:
    bench.runner.per_sample = None
    with workers(bench) as backend:
        backend.submit(bench.job(WEIGHTED))
        (failed,) = drained(backend, seconds=60.0)
    assert isinstance(failed, SegmentFailed)
    assert not failed.retryable
    assert "per-sample losses" in failed.error


@LINUX
def test_a_model_of_the_users_own_script_is_inherited(tmp_path: Path) -> None:
    class Here(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x)
            return out

    bench = make_bench(tmp_path, model=Here())
    with workers(bench, "auto") as backend:
        assert backend.how == "fork"
        (done,) = trained(backend, bench.job(PLAIN))
    assert_same(bench, done, bench.train(done.job))


def test_a_dataset_that_cannot_be_read_in_a_worker_is_found_out_before_the_first_job(tmp_path: Path) -> None:
    parent = os.getpid()

    class Local(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if os.getpid() != parent:
                raise OSError("the archive is open in another process")
            return super().__getitem__(index)

    source = make_bench(tmp_path / "other").loader.dataset
    assert isinstance(source, TensorDataset)
    bench = make_bench(tmp_path, dataset=Local(*source.tensors))
    with pytest.raises(NotExecutableError, match="the archive is open in another process"), workers(bench):
        pass


def test_the_factory_leaves_the_run_as_it_is_and_holds_none_of_it(bench: Bench) -> None:
    bench.step()
    before = Memory.of(bench.trunk)
    factory = bench.factory()
    mine = {id(p) for p in bench.trunk.model.parameters()}
    assert mine.isdisjoint(id(p) for p in factory.model.parameters())
    assert {id(p) for g in factory.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in factory.model.parameters()
    }
    assert not factory.optimizer.state
    runner = factory(None).runner
    bench_job = bench.job(PLAIN)
    runner.cards[bench_job.card] = bench.runner.cards[bench_job.card]
    segment = runner.open(bench_job)
    while not segment.advance(1.0):
        pass
    segment.finish()
    assert before.differences(Memory.of(bench.trunk)) == []


def test_a_relative_folder_means_the_same_wherever_a_worker_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = make_bench(Path("runs"))
    with workers(bench, "auto") as backend:
        (done,) = trained(backend, bench.job(PLAIN))
    assert_same(bench, done, bench.train(done.job))


def test_workers_may_keep_their_checkpoints_elsewhere(bench: Bench, tmp_path: Path) -> None:
    store = bench.factory()(str(tmp_path / "elsewhere")).runner.checkpoints
    assert getattr(store, "root") == tmp_path / "elsewhere"  # noqa: B009


def test_per_sample_losses_that_are_exact_only_in_the_training_process_are_refused(bench: Bench) -> None:
    factory = replace(bench.factory(), loss_fn=_Moody())
    with pytest.raises(NotExecutableError, match="exact in the training process and not here"):
        factory(None)


class _Moody(nn.Module):
    """A loss that draws random numbers, of which no twin is exact."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets) * torch.rand(())


def test_evaluators_of_one_run_measure_alike_once_settled() -> None:
    torch.manual_seed(0)
    inputs, values = torch.randn(64, 3), torch.randn(64, 1) * torch.linspace(0.1, 5.0, 64)[:, None]
    held_out = HeldOut(DataLoader(TensorDataset(inputs, values), batch_size=8), torch.device("cpu"), seed=3)
    model = nn.Linear(3, 1)

    def evaluator(task: Any = None, delta: float | None = None) -> Evaluator:
        step = pair_step(nn.MSELoss(), torch.device("cpu"))
        return Evaluator(
            step_fn=step,
            batches=held_out.batches,
            per_sample=per_sample_twin(nn.MSELoss()),
            autocast=lambda: torch.autocast("cpu", enabled=False),
            task=task,
            delta=delta,
        )

    first, late = evaluator(), evaluator()
    first.settle(model)
    assert first.task == "regression"
    assert first.delta is not None
    late.scores(model, None)  # the whole set came first, whose first batch is another
    assert late.delta != first.delta
    twin = evaluator(first.task, first.delta)
    twin.scores(model, None)
    assert twin.delta == first.delta
    first.settle(model)
    assert math.isclose(
        float(first.scores(model, "A").utility.mean()), float(twin.scores(model, "A").utility.mean())
    )


def test_how_a_process_computes_can_be_captured_and_put_back() -> None:
    before = Arithmetic.capture()
    try:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("medium")
        changed = Arithmetic.capture()
        assert (changed.dtype, changed.deterministic, changed.warn_only) == ("float64", True, True)
        before.apply()
        assert Arithmetic.capture() == before != changed
        changed.apply()
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        before.apply()
