"""The stacked backend: what every backend must do, and members that end as they would have ended alone."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import TensorDataset

from automode.backends import stacking_rule
from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentJob, SegmentRunner
from automode.backends.inline import InlineBackend
from automode.backends.stacked import StackedBackend
from automode.planner.recipes import EarlyStopping, TrainingRecipe, Variant
from automode.testing import BackendConformance
from automode.testing.backends import drained
from automode.testing.bench import (
    BATCH,
    CLASSES,
    FEATURES,
    Bench,
    Memory,
    identical,
    make_bench,
    small_network,
)
from automode.testing.scripted import ScriptedRunner, scripted_job
from automode.testing.training import TrainingConformance
from automode.trainer.sample_source import BatchPlan, SampleSource
from automode.trainer.specialists import SpecialistRunner
from automode.trainer.stackable import StackableSpecialist, StackableSpecialists

STEPS = 40
CLOSE = 1e-10
PLAIN = Variant(name="plain")
MIXED = (
    PLAIN,
    Variant(name="fast", lr_mul=2.0, clip_norm=0.3),
    Variant(name="decayed", weight_decay=0.1),
    Variant(name="weighted", lr_mul=0.5, loss_weight=3.0),
    Variant(name="annealed", schedule="anneal", ema=0.9),
)

Results = dict[int, SegmentDone]


def stackable(runner: SegmentRunner) -> SegmentRunner:
    return StackableSpecialists(runner) if isinstance(runner, SpecialistRunner) else runner


class TestStacked(BackendConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return StackedBackend(stackable(runner), slots=4)


class TestStackedWithRealSpecialists(TrainingConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return StackedBackend(stackable(runner))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here survives the test, so that the disk need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rungs are stacked too, and stay so however long their steps take."""
    monkeypatch.setattr(stacking_rule, "why_too_short", lambda *_, **__: None)
    monkeypatch.setattr(stacking_rule, "why_slower", lambda *_: None)


class Convolutions(nn.Module):
    """Features as an image of 2 x 3, two convolutions, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.body(inputs.to(self.body[0].weight.dtype).view(-1, 1, 2, 3))
        return logits


class Attention(nn.Module):
    """Features as a sequence of 6 scalars, one transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(1, 8)
        self.place = nn.Parameter(0.1 * torch.randn(FEATURES, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.lift(inputs.to(self.place.dtype).unsqueeze(-1)) + self.place
        logits: Tensor = self.head(self.layer(hidden).mean(dim=1))
        return logits


class Perceptron(nn.Module):
    """The bench's network, in its weights' own precision."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.body = small_network(**how)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.body(inputs.to(next(self.parameters()).dtype))
        return logits


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0, "lr": 0.02}], lr=0.01
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def bench_of(
    folder: Path,
    model: nn.Module | None = None,
    variants: Sequence[Variant] = MIXED,
    *,
    early_stopping: EarlyStopping | None = None,
    **how: Any,
) -> Bench:
    """A run in double precision, and a card over two thirds of its samples."""
    torch.manual_seed(5)
    network = Perceptron() if model is None else model
    bench = make_bench(folder, model=network.double(), **{"optimizer": adam, "averages": True, **how})
    recipe = TrainingRecipe(variants=tuple(variants), replay=0.25, early_stopping=early_stopping)
    bench.card(recipe, selected=np.arange(64))
    return bench


def jobs_of(
    bench: Bench, variants: Sequence[Variant] = MIXED, *, end: int = STEPS, **how: Any
) -> list[SegmentJob]:
    return [
        replace(bench.job(variant, trial=trial, end=end, **how), per_trunk_step=7.0)
        for trial, variant in enumerate(variants)
    ]


def run(backend: Backend, jobs: Iterable[SegmentJob]) -> Results:
    for job in jobs:
        backend.submit(job)
    found: Results = {}
    for result in drained(backend, seconds=60):
        assert isinstance(result, SegmentDone), result
        found[result.job.trial] = result
    return found


def both(
    bench: Bench, jobs: Sequence[SegmentJob], runner: SegmentRunner | None = None
) -> tuple[Results, Results, list[str]]:
    """The same jobs inline and stacked, and what the stacked backend had to say."""
    runner = StackableSpecialists(bench.runner) if runner is None else runner
    backend = StackedBackend(runner)
    alone, together = run(InlineBackend(runner), jobs), run(backend, jobs)
    return alone, together, [note.text for note in backend.notes()]


def farthest(a: Any, b: Any) -> float:
    """The largest distance between two nested values of one structure."""
    match a:
        case Tensor():
            assert isinstance(b, Tensor)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        case dict():
            assert a.keys() == b.keys()
            return max((farthest(a[key], b[key]) for key in a), default=0.0)
        case list() | tuple():
            assert len(a) == len(b)
            return max((farthest(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
        case float() | int() if not isinstance(a, bool):
            return abs(a - b)
        case _:
            assert a == b
            return 0.0


def assert_equal(bench: Bench, alone: Results, together: Results) -> None:
    """Values, choices, weights, optimizers, averages and random states agree."""
    assert alone.keys() == together.keys()
    for trial, mine in together.items():
        theirs = alone[trial]
        assert mine.value == pytest.approx(theirs.value, abs=CLOSE)
        assert (mine.choice, mine.stopped_early) == (theirs.choice, theirs.stopped_early)
        assert farthest(bench.weights(mine), bench.weights(theirs)) < CLOSE
        assert farthest(bench.rest(mine), bench.rest(theirs)) < CLOSE


# The same numbers as alone.


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

    def took(segment: StackableSpecialist, loss: float) -> bool:
        seen.setdefault(segment.job.trial, []).append(loss)
        return original(segment, loss)

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


# What runs alone, and why.


class Branching(Perceptron):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return outputs if outputs.sum() > 0 else 2 * outputs


class Counting(Perceptron):
    steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return super().forward(inputs) / self.steps


class Remembering(Perceptron):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += 1
        return super().forward(inputs)


class Chancy(Perceptron):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * random.choice([0.5, 1.0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(inputs.to(self.head.weight.dtype).unsqueeze(-1))[0][:, -1])
        return logits


def hooked() -> nn.Module:
    network = Perceptron()
    network.body[0].register_forward_hook(_pass_through)
    return network


def _pass_through(module: nn.Module, args: Any, output: Tensor) -> None:
    return None


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=1e-3)


def amsgrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True)


def damped(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, dampening=0.1)


def a_part(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(model.parameters())[:2], lr=1e-3)


ALONE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "running statistics": (lambda: Perceptron(norm=True), {}, r"`body.1` \(BatchNorm1d\) updates running"),
    "hooks": (hooked, {}, "has hooks"),
    "a recurrent layer": (Recurrent, {}, "GRU"),
    "control flow": (Branching, {}, "cannot vectorise"),
    "a count": (Counting, {}, "a count or a switch"),
    "a buffer": (Remembering, {}, "changes the buffer `seen`"),
    "foreign chance": (Chancy, {}, "Python's or numpy's random numbers"),
    "another optimizer": (Perceptron, {"optimizer": rmsprop}, "RMSprop is not one of SGD, Adam, AdamW"),
    "amsgrad": (Perceptron, {"optimizer": amsgrad}, "set to `amsgrad`"),
    "dampening": (Perceptron, {"optimizer": damped}, "damps momentum"),
    "parameters left out": (Perceptron, {"optimizer": a_part}, "gather gradients that no optimizer uses"),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("what", ALONE)
def test_what_cannot_be_stacked_runs_inline_and_says_why(what: str, tmp_path: Path) -> None:
    make, how, why = ALONE[what]
    variants = MIXED[:2]
    bench = bench_of(tmp_path, make(), variants, **how)
    alone, together, said = both(bench, jobs_of(bench, variants, end=8))
    assert together.keys() == alone.keys()
    for trial in alone:
        assert identical(bench.weights(together[trial]), bench.weights(alone[trial]))
        assert together[trial].value == alone[trial].value
    assert len(said) >= 1
    for text in said:
        assert text.startswith("trained one after another: ")
    with pytest.raises(AssertionError, match=why):
        raise AssertionError("; ".join(said))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("variant", "why"),
    [
        (Variant(name="sharp", optimizer="sam"), "sharpness-aware"),
        (Variant(name="half", precision="bf16"), "bf16"),
    ],
)
def test_variants_with_steps_of_another_kind_run_beside_the_group(
    variant: Variant, why: str, tmp_path: Path
) -> None:
    variants = [PLAIN, variant, Variant(name="fast", lr_mul=2.0)]
    bench = make_bench(tmp_path)
    bench.card(TrainingRecipe(variants=tuple(variants)))
    runner = StackableSpecialists(bench.runner)
    backend = StackedBackend(runner)
    jobs = jobs_of(bench, variants)
    results = run(backend, jobs)
    (note,) = backend.notes()
    assert (note.card, note.trials) == (jobs[0].card, (1,))
    assert why in note.text
    alone = run(InlineBackend(runner), jobs)
    assert identical(bench.weights(results[1]), bench.weights(alone[1]))
    assert farthest(bench.weights(results[0]), bench.weights(alone[0])) < 1e-4


def test_short_rungs_and_single_trials_are_not_stacked(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    alone, together, said = both(bench, jobs_of(bench, end=6))
    assert len(said) == 1
    assert "too little to repay" in said[0]
    for trial in alone:
        assert identical(bench.weights(together[trial]), bench.weights(alone[trial]))
    backend = StackedBackend(StackableSpecialists(bench.runner))
    run(backend, jobs_of(bench)[:1])
    (note,) = backend.notes()
    assert "no other trial is like it" in note.text


@pytest.mark.usefixtures("always")
def test_batches_that_change_shape_send_the_members_on_alone(tmp_path: Path) -> None:
    class Pooled(Perceptron):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs if inputs.ndim == 2 else inputs.mean(dim=1))

    def ragged(rows: list[Any]) -> list[Tensor]:
        inputs = torch.stack([row[0] for row in rows])
        width = 2 if float(inputs[0, 0]) > -0.6 else 3
        return [inputs.unsqueeze(1).expand(-1, width, -1), torch.stack([row[1] for row in rows])]

    bench = bench_of(tmp_path, Pooled())
    dataset = bench.loader.dataset
    assert isinstance(dataset, TensorDataset)
    bench.runner.source = SampleSource(dataset, ragged, torch.device("cpu"))
    alone, together, said = both(bench, jobs_of(bench))
    assert said == [
        "trained one after another: its batches change shape, and a recorded graph is for one shape"
    ]
    assert_equal(bench, alone, together)


@pytest.mark.usefixtures("always")
def test_a_dataset_that_fails_fails_the_members_and_not_the_run(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    backend = StackedBackend(StackableSpecialists(bench.runner))
    for job in jobs_of(bench):
        backend.submit(job)
    drained(backend, seconds=60, pumps=16)

    class Gone:
        def batch(self, ids: Any) -> Any:
            raise OSError("the disk went away")

    bench.runner.source = Gone()  # type: ignore[assignment]
    for segment in backend._group.segments if backend._group is not None else []:
        segment._runner.source = Gone()  # type: ignore[attr-defined]
    results = drained(backend, seconds=60)
    assert len(results) == 5
    for result in results:
        assert isinstance(result, SegmentFailed)
        assert "the disk went away" in result.error
        assert result.retryable


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
