"""The inline backend: what every backend must do, and the time slices that are its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from automode.backends.base import Backend, SegmentDone, SegmentRunner
from automode.backends.inline import InlineBackend
from automode.testing import BackendConformance
from automode.testing.scripted import PASSES_PER_RESOURCE, ScriptedRunner, scripted_job
from automode.testing.training import TrainingConformance


class TestInline(BackendConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return InlineBackend(runner)


class TestInlineWithRealSpecialists(TrainingConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return InlineBackend(runner)


def test_one_segment_runs_at_a_time_in_the_order_of_submission() -> None:
    backend = InlineBackend(ScriptedRunner())
    for trial in range(3):
        backend.submit(scripted_job(trial, end=4))
    ended = [[r.job.trial for r in backend.pump(1)] for _ in range(12)]
    assert ended == [[], [], [], [0], [], [], [], [1], [], [], [], [2]]


def test_a_pump_trains_no_more_than_its_share_of_the_trunks_steps() -> None:
    backend = InlineBackend(ScriptedRunner())
    job = replace(scripted_job(end=10), per_trunk_step=2.5)
    backend.submit(job)
    assert backend.pump(1) == []
    assert backend.cancel(*job.key) == 2.5 * PASSES_PER_RESOURCE


def test_several_trunk_steps_at_once_buy_as_much_as_one_by_one() -> None:
    backend = InlineBackend(ScriptedRunner())
    backend.submit(scripted_job(end=6))
    (done,) = backend.pump(6)
    assert isinstance(done, SegmentDone)


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted:
        def open(self, job: object) -> object:
            raise KeyboardInterrupt

    backend = InlineBackend(Interrupted())  # type: ignore[arg-type]
    backend.submit(scripted_job())
    with pytest.raises(KeyboardInterrupt):
        backend.pump(1)


def test_a_suite_that_is_not_told_how_to_make_a_backend_says_so() -> None:
    with pytest.raises(NotImplementedError, match="say how your backend is made"):
        BackendConformance().test_a_fresh_backend_is_idle_and_has_a_slot()
