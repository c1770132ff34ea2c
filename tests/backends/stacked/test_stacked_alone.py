"""What the stacked backend trains one after another, and that it says why."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stacked_bench import (
    MIXED,
    PLAIN,
    Perceptron,
    assert_equal,
    bench_of,
    both,
    farthest,
    jobs_of,
    run,
)
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from automode.backends.base import SegmentFailed
from automode.backends.inline import InlineBackend
from automode.backends.stacked import StackedBackend
from automode.planner.recipes import TrainingRecipe, Variant
from automode.testing.backends import drained
from automode.testing.bench import (
    CLASSES,
    identical,
    make_bench,
)
from automode.trainer.sample_source import SampleSource
from automode.trainer.stackable import StackableSpecialists


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
        (Variant(name="mixed", batches="all", loss_weight=3.0), "anywhere in a batch"),
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
