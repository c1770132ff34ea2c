"""What every backend must do with real specialists: train them as the runner would alone, and leave the parent as it was."""

from __future__ import annotations

from pathlib import Path

from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentRunner
from automode.planner.recipes import TrainingRecipe, Variant
from automode.testing.backends import drained
from automode.testing.bench import Bench, Memory, identical, make_bench, small_network

PLAIN = Variant(name="plain")
FAST = Variant(name="fast", lr_mul=2.0)


class TrainingConformance:
    """Inherit it beside :class:`automode.testing.backends.BackendConformance`; the same ``backend`` method serves both.

    Attributes:
        seconds: Longest time that a handful of short segments may take.
    """

    seconds: float = 60.0

    def backend(self, runner: SegmentRunner) -> Backend:
        """Make a fresh backend over a runner."""
        raise NotImplementedError("a conformance suite is inherited: say how your backend is made")

    def bench(self, folder: Path) -> Bench:
        """Make a run whose network draws random numbers and keeps running statistics."""
        bench = make_bench(folder, model=small_network(norm=True, dropout=0.3), averages=True)
        bench.card(TrainingRecipe(variants=(PLAIN, FAST)))
        return bench

    def test_the_parent_is_untouched_bit_by_bit(self, tmp_path: Path) -> None:
        """Weights, optimizer, schedule, gradients, flags, averages and every random state are what they were."""
        bench = self.bench(tmp_path)
        bench.step()  # the parent goes on after its snapshot, and holds gradients
        before = Memory.of(bench.trunk)
        backend = self.backend(bench.runner)
        try:
            backend.submit(bench.job(PLAIN, trial=0))
            backend.submit(bench.job(FAST, trial=1))
            results = drained(backend, seconds=self.seconds)
        finally:
            backend.close()
        assert all(isinstance(r, SegmentDone) for r in results), results
        assert before.differences(Memory.of(bench.trunk)) == []

    def test_a_backend_changes_no_result(self, tmp_path: Path) -> None:
        """A specialist is what the runner trains by itself, whoever runs it and in whatever slices."""
        bench = self.bench(tmp_path)
        alone = bench.train(bench.job(FAST, trial=1), slices=6)
        backend = self.backend(bench.runner)
        try:
            for trial, variant in enumerate((PLAIN, FAST)):
                backend.submit(bench.job(variant, trial=trial))
            results = {r.job.trial: r for r in drained(backend, seconds=self.seconds)}
        finally:
            backend.close()
        mine = results[1]
        assert isinstance(mine, SegmentDone)
        assert (mine.value, mine.choice, mine.passes) == (alone.value, alone.choice, alone.passes)
        assert identical(bench.weights(mine), bench.weights(alone))

    def test_a_specialist_that_cannot_be_trained_fails_alone(self, tmp_path: Path) -> None:
        """The variant asks for what the run does not have: no retry, and no harm to the others or the parent."""
        bench = self.bench(tmp_path)
        bench.runner.per_sample = None
        before = Memory.of(bench.trunk)
        backend = self.backend(bench.runner)
        weighted = Variant(name="weighted", loss_weight=2.0)
        try:
            for trial, variant in enumerate((PLAIN, weighted, FAST)):
                backend.submit(bench.job(variant, trial=trial))
            results = {r.job.trial: r for r in drained(backend, seconds=self.seconds)}
        finally:
            backend.close()
        failed = results[1]
        assert isinstance(failed, SegmentFailed)
        assert not failed.retryable
        assert "per-sample losses" in failed.error
        assert isinstance(results[0], SegmentDone)
        assert isinstance(results[2], SegmentDone)
        assert before.differences(Memory.of(bench.trunk)) == []

    def test_a_cancelled_specialist_leaves_no_trace(self, tmp_path: Path) -> None:
        """Given up half-way: the parent is as it was, and the next specialist as if the first had never been."""
        bench = self.bench(tmp_path)
        alone = bench.train(bench.job(FAST, trial=1))
        before = Memory.of(bench.trunk)
        backend = self.backend(bench.runner)
        try:
            given_up = bench.job(PLAIN, trial=0, end=60)
            backend.submit(given_up)
            drained(backend, seconds=self.seconds, pumps=3)
            backend.cancel(*given_up.key)
            backend.submit(bench.job(FAST, trial=1))
            (mine,) = drained(backend, seconds=self.seconds)
        finally:
            backend.close()
        assert isinstance(mine, SegmentDone)
        assert identical(bench.weights(mine), bench.weights(alone))
        assert before.differences(Memory.of(bench.trunk)) == []
