"""Members that leave a group, and the random numbers that each of them draws: the others never notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stacked_bench import (
    MIXED,
    PLAIN,
    Perceptron,
    adam,
    assert_equal,
    bench_of,
    both,
    farthest,
    jobs_of,
    plain_sgd,
    run,
    sgd,
)
from torch import Tensor, nn

from automode.backends import stacking_rule
from automode.backends.inline import InlineBackend
from automode.backends.stacked import StackedBackend
from automode.planner.recipes import Variant
from automode.testing.backends import drained
from automode.testing.bench import (
    Memory,
    identical,
    small_dataset,
)
from automode.trainer.stackable import StackableSpecialists

# Members that leave.


@pytest.mark.usefixtures("always")
def test_a_member_that_diverges_poisons_no_other(tmp_path: Path) -> None:
    variants = [PLAIN, Variant(name="mad", lr_mul=1e4), Variant(name="slow", lr_mul=0.5)]
    bench = bench_of(tmp_path, Squared(), variants=variants, optimizer=plain_sgd)
    alone, together, said = both(bench, jobs_of(bench, variants))
    assert math.isnan(alone[1].value)
    assert math.isnan(together[1].value)
    assert together[1].passes < together[0].passes
    assert_equal(bench, {t: alone[t] for t in (0, 2)}, {t: together[t] for t in (0, 2)})
    assert said == []


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_steps_of_a_broken_batch_are_left_out_by_every_member(
    optimizer: Callable[[nn.Module], torch.optim.Optimizer], tmp_path: Path
) -> None:
    data = small_dataset(96, 11)
    data.tensors[0][7] = math.nan
    data.tensors[0][8] *= 1e6
    variants = [PLAIN, Variant(name="fast", lr_mul=2.0), Variant(name="clipped", clip_norm=0.3)]
    bench = bench_of(tmp_path, variants=variants, optimizer=optimizer, dataset=data, steps=0)
    alone, together, said = both(bench, jobs_of(bench, variants))
    assert said == []
    assert not any(math.isnan(done.value) for done in alone.values())
    assert_equal(bench, alone, together)


class Squared(Perceptron):
    """Outputs that blow up with the weights, fast enough to overflow in a few steps."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).pow(3)


@pytest.mark.usefixtures("always")
def test_a_member_is_cancelled_and_the_others_never_notice(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    runner = StackableSpecialists(bench.runner)
    alone = run(InlineBackend(runner), jobs_of(bench))
    for given_up in (0, 2):
        backend = StackedBackend(runner)
        jobs = jobs_of(bench)
        for job in jobs:
            backend.submit(job)
        assert drained(backend, seconds=60, pumps=18) == []
        assert 0.0 < backend.cancel(*jobs[given_up].key) < alone[given_up].passes
        together = run(backend, [])
        assert sorted(together) == [t for t in range(5) if t != given_up]
        assert_equal(bench, {t: alone[t] for t in together}, together)


@pytest.mark.usefixtures("always")
def test_the_last_members_of_a_group_are_trained_alone_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stacking_rule, "why_slower", lambda stacked, members, alone: "slower" if members == 1 else None
    )
    bench = bench_of(tmp_path)
    backend = StackedBackend(StackableSpecialists(bench.runner))
    jobs = jobs_of(bench)
    for job in jobs:
        backend.submit(job)
    drained(backend, seconds=60, pumps=20)
    for job in jobs[1:]:
        backend.cancel(*job.key)
    together = run(backend, [])
    assert_equal(bench, run(InlineBackend(backend._runner), jobs[:1]), together)
    assert backend.notes()[-1].trials == (0,)


@pytest.mark.usefixtures("always")
def test_a_group_that_has_shrunk_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking_rule, "should_restack", lambda rows, members, *_: rows > members)
    bench = bench_of(tmp_path)
    backend = StackedBackend(StackableSpecialists(bench.runner))
    jobs = jobs_of(bench)
    for job in jobs:
        backend.submit(job)
    drained(backend, seconds=60, pumps=20)
    for job in jobs[:3]:
        backend.cancel(*job.key)
    together = run(backend, [])
    assert_equal(bench, run(InlineBackend(backend._runner), jobs[3:]), together)
    assert sorted(g.rows for graphs in backend._graphs.kept.values() for g in graphs) == [2, 5]


@pytest.mark.usefixtures("always")
def test_a_kept_graph_is_filled_up_with_idle_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("automode.backends.stack_building.pads", lambda *_: True)
    bench = bench_of(tmp_path)
    backend = StackedBackend(StackableSpecialists(bench.runner))
    run(backend, jobs_of(bench))
    variants = MIXED[1:4]
    together = run(backend, jobs_of(bench, variants))
    assert [g.rows for graphs in backend._graphs.kept.values() for g in graphs] == [5]
    assert_equal(bench, run(InlineBackend(backend._runner), jobs_of(bench, variants)), together)


def test_a_slower_group_is_taken_apart_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking_rule, "why_too_short", lambda *_, **__: None)
    monkeypatch.setattr(stacking_rule, "why_slower", lambda *_: "no faster")
    bench = bench_of(tmp_path)
    alone, together, said = both(bench, jobs_of(bench))
    assert said == ["trained one after another: no faster"]
    assert_equal(bench, alone, together)


# Random numbers.


def test_the_parent_and_its_random_states_are_untouched(tmp_path: Path, always: None) -> None:
    bench = bench_of(tmp_path, Perceptron(dropout=0.4))
    bench.step()
    before = Memory.of(bench.trunk)
    backend = StackedBackend(StackableSpecialists(bench.runner))
    run(backend, jobs_of(bench))
    assert before.differences(Memory.of(bench.trunk)) == []
    assert backend.notes() == []


@pytest.mark.usefixtures("always")
def test_members_draw_masks_of_their_own_and_the_same_ones_again(tmp_path: Path) -> None:
    twins = [Variant(name="one"), Variant(name="two")]
    bench = bench_of(tmp_path, Perceptron(dropout=0.4), variants=twins)
    first, second = (
        run(StackedBackend(StackableSpecialists(bench.runner)), jobs_of(bench, twins)) for _ in range(2)
    )
    assert farthest(bench.weights(first[0]), bench.weights(first[1])) > 1e-3
    for trial in (0, 1):
        assert identical(bench.weights(first[trial]), bench.weights(second[trial]))
