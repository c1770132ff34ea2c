"""Trials whose batches are of another size than the trunk's: charged by what they take, on the trunk's clock, alone on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from automode.backends.stackability import why_variant_alone
from automode.planner.recipes import EarlyStopping, TrainingRecipe, Variant
from automode.testing.bench import BATCH, CARD, Bench, identical, make_bench, small_network
from automode.trainer.sample_source import BatchPlan
from automode.trainer.step_choice import why_no_other_batches


def scaled(mul: float, **more: Any) -> Variant:
    return Variant(name="v", batch_mul=mul, **more)


def sgd(rate: float = 0.1) -> Any:
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate)


def by_hand(bench: Bench, rows: int, steps: int) -> nn.Module:
    """Plain steps on batches of so many rows."""
    data = bench.runner.cards[CARD]
    model = small_network()
    model.load_state_dict(bench.checkpoints.load(bench.base)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = BatchPlan(
        data.selected, data.others, replay=data.recipe.replay, batch_size=rows, entropy=data.entropy
    )
    for k in range(steps):
        inputs, classes = bench.runner.source.batch(plan.ids(k))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), classes).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("mul", "steps"), [(2.0, 3), (0.5, 12), (3.0, 2), (1.0, 6)])
def test_as_many_samples_are_seen_in_more_or_fewer_steps(mul: float, steps: int, tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    variant = scaled(mul)
    bench.card(TrainingRecipe(variants=(variant,), replay=0.25), selected=np.arange(40))
    done = bench.train(bench.job(variant, end=6), slices=0.7)
    rest = bench.rest(done)
    assert (rest["steps"], rest["resource"]) == (steps, pytest.approx(6.0))
    assert identical(bench.weights(done), by_hand(bench, round(mul * BATCH), steps).state_dict())
    judged = done.passes - 3 * 6 * BATCH
    plain = bench.train(bench.job(Variant(name="p"), end=6))
    assert judged == plain.passes - 3 * 6 * BATCH


def test_a_way_that_no_whole_number_of_steps_fills_is_carried_on_from_where_it_ended(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    first = bench.train(bench.job(scaled(3.0), end=7, top=12))
    assert bench.rest(first)["resource"] == 6.0
    again = bench.job(scaled(3.0), start=7, end=12, checkpoint=first.checkpoint)
    assert bench.rest(bench.train(again))["steps"] == 4
    whole = bench.train(bench.job(scaled(3.0), end=12))
    assert identical(bench.weights(whole), by_hand(bench, 3 * BATCH, 4).state_dict())


@pytest.mark.parametrize("mul", [0.5, 1.0, 2.0, 4.0])
def test_schedule_and_averages_go_by_the_samples_seen(mul: float, tmp_path: Path) -> None:
    bench = make_bench(
        tmp_path, optimizer=sgd(), scheduler=lambda o: schedules.ExponentialLR(o, 0.9), averages=True
    )
    start = bench.trunk.step
    rest = bench.rest(bench.train(bench.job(scaled(mul), end=8)))
    assert rest["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * 0.9 ** (start + 8))
    assert rest["averages"]["last_step"] == start + 8


def test_an_anneal_ends_at_the_top_whatever_the_batch(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    rest = bench.rest(bench.train(bench.job(scaled(2.0, schedule="anneal"), end=8)))
    assert rest["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * 2 / 8)


def test_sharpness_aware_steps_on_larger_batches_cost_both(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    done = bench.train(bench.job(scaled(2.0, optimizer="sam"), end=8))
    plain = bench.train(bench.job(Variant(name="p"), end=8))
    assert bench.rest(done)["steps"] == 2
    assert done.passes == plain.passes


def test_early_stopping_looks_as_often_whatever_the_batch(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    rule = EarlyStopping(patience=2, min_delta=1e9)
    for mul in (0.5, 1.0, 2.0):
        bench.card(TrainingRecipe(variants=(scaled(mul),), early_stopping=rule))
        done = bench.train(bench.job(scaled(mul), end=40))
        # The first look is a new best whatever it shows; two more do not better it.
        assert done.stopped_early
        assert bench.rest(done)["resource"] == pytest.approx(3 * 4)


def test_a_batch_never_has_less_than_one_sample(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, optimizer=sgd())
    rest = bench.rest(bench.train(bench.job(scaled(1e-3), end=2)))
    assert rest["steps"] == 2 * BATCH


def test_they_are_not_stacked(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    assert "size of their own" in (why_variant_alone(bench.job(scaled(2.0))) or "")
    assert why_variant_alone(bench.job(scaled(1.0))) is None


class Grouped(BatchSampler):
    """Makes batches of its own kind."""


def test_a_loader_whose_batches_are_put_together_by_its_own_sampler_has_no_other_sizes() -> None:
    data = list(range(12))
    sampler = RandomSampler(data)
    for loader in (DataLoader(data, batch_size=4), [[1, 2]], DataLoader(data, batch_size=None)):
        assert why_no_other_batches(loader) is None
    own = DataLoader(data, batch_sampler=Grouped(sampler, 4, drop_last=False))
    assert "put together by a Grouped" in (why_no_other_batches(own) or "")
