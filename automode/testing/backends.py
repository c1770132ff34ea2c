"""What every backend must do, as tests: jobs in, exactly one result each, nothing of one job in another."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentRunner
from automode.errors import NotExecutableError
from automode.planner.recipes import Resources
from automode.testing.scripted import PASSES_PER_RESOURCE, Place, Script, ScriptedRunner, scripted_job

Result = SegmentDone | SegmentFailed

LASTING: tuple[Exception, ...] = (
    ValueError("same again"),
    TypeError("same again"),
    NotImplementedError("same again"),
    MemoryError("same again"),
    NotExecutableError("same again"),
)
"""Errors that the same work would raise again."""

PASSING: tuple[Exception, ...] = (RuntimeError("bad luck"), OSError("bad luck"), TimeoutError("bad luck"))
"""Errors that another attempt may not meet."""


UNHURRIED = {trial: Script(seconds=0.01) for trial in range(64)}
"""Segments of 40 resource steps that no backend, wherever it runs them, has done before it is pumped again."""


def drained(backend: Backend, *, seconds: float, pumps: int | None = None) -> list[Result]:
    """Pump one trunk step at a time until nothing is left to do.

    Args:
        backend: The backend.
        seconds: Longest time that it may take.
        pumps: Stop after so many pumps all the same.

    Returns:
        The results, in the order in which they came.
    """
    found: list[Result] = []
    until = time.monotonic() + seconds
    while backend.busy and pumps != 0:
        assert time.monotonic() < until, f"the backend is still busy after {seconds} s of pumping"
        ended = backend.pump(1)
        found += ended
        if pumps is not None:
            pumps -= 1
        elif not ended:
            time.sleep(0.0005)  # for backends that work elsewhere
    return found


def idle(backend: Backend) -> bool:
    """Whether a backend has nothing queued and nothing running now."""
    return not backend.busy


class BackendConformance:
    """Tests for a backend: inherit them, and say how yours is made.

    .. code-block:: python

        class TestMyBackend(BackendConformance):
            def backend(self, runner):
                return MyBackend(runner, workers=2)

    Attributes:
        seconds: Longest time that a handful of segments may take.
    """

    seconds: float = 60.0

    def backend(self, runner: SegmentRunner) -> Backend:
        """Make a fresh backend over a runner."""
        raise NotImplementedError("a conformance suite is inherited: say how your backend is made")

    def run(self, jobs: Iterable[Any], scripts: dict[int, Script] | None = None) -> list[Result]:
        """Submit jobs to a fresh backend and pump until all have ended."""
        backend = self.backend(ScriptedRunner(scripts=scripts or {}))
        try:
            for job in jobs:
                backend.submit(job)
            return drained(backend, seconds=self.seconds)
        finally:
            backend.close()

    def test_a_fresh_backend_is_idle_and_has_a_slot(self) -> None:
        """Nothing is reported that nobody asked for."""
        backend = self.backend(ScriptedRunner())
        try:
            assert backend.slots >= 1
            assert idle(backend)
            assert backend.pump(1) == []
        finally:
            backend.close()

    def test_a_submitted_job_is_reported_once_as_it_was_given(self) -> None:
        """The result names the job, its value and what it cost."""
        job = scripted_job()
        backend = self.backend(ScriptedRunner(scripts={0: Script(value=0.75)}))
        try:
            backend.submit(job)
            assert backend.busy
            (done,) = drained(backend, seconds=self.seconds)
            assert isinstance(done, SegmentDone)
            assert done.job == job
            assert done.value == 0.75
            assert done.passes == 6 * PASSES_PER_RESOURCE
            assert backend.pump(5) == []
            assert idle(backend)
        finally:
            backend.close()

    def test_more_jobs_than_slots_are_all_reported_exactly_once(self) -> None:
        """Jobs wait for a slot; none is lost and none runs twice."""
        jobs = [scripted_job(trial, end=1 + trial % 4) for trial in range(9)]
        results = self.run(jobs, {trial: Script(value=float(trial)) for trial in range(9)})
        assert sorted(r.job.trial for r in results) == list(range(9))
        assert all(isinstance(r, SegmentDone) and r.value == r.job.trial for r in results)

    def test_one_failure_does_not_touch_the_others(self) -> None:
        """Whichever way a segment fails, the jobs before and after it end as if it had never been."""
        places: tuple[Place, ...] = ("open", "advance", "finish")
        for where in places:
            script = Script(fails=where, error=RuntimeError(f"in {where}"))
            results = self.run([scripted_job(trial) for trial in range(3)], {1: script})
            by_trial = {r.job.trial: r for r in results}
            assert sorted(by_trial) == [0, 1, 2]
            failed = by_trial[1]
            assert isinstance(failed, SegmentFailed)
            assert failed.job == scripted_job(1)
            assert f"in {where}" in failed.error
            assert isinstance(by_trial[0], SegmentDone)
            assert isinstance(by_trial[2], SegmentDone)

    def test_a_failure_tells_what_was_spent_until_then(self) -> None:
        """What a failed segment cost is paid for all the same."""
        (early,) = self.run([scripted_job()], {0: Script(fails="open")})
        assert early.passes == 0.0
        (late,) = self.run([scripted_job()], {0: Script(fails="finish")})
        assert late.passes == 6 * PASSES_PER_RESOURCE

    def test_errors_that_would_come_again_are_flagged(self) -> None:
        """A retry is for bad luck alone."""
        for error in LASTING:
            (failed,) = self.run([scripted_job()], {0: Script(fails="advance", error=error)})
            assert isinstance(failed, SegmentFailed)
            assert not failed.retryable, f"{type(error).__name__} would come again"
        for error in PASSING:
            (failed,) = self.run([scripted_job()], {0: Script(fails="advance", error=error)})
            assert isinstance(failed, SegmentFailed)
            assert failed.retryable, f"{type(error).__name__} may not come again"

    def test_a_failed_segment_can_be_tried_again(self) -> None:
        """The next attempt is another job, and is reported as such."""
        backend = self.backend(ScriptedRunner(scripts={0: Script(fails="advance", attempts=1)}))
        try:
            backend.submit(scripted_job(attempt=1))
            (failed,) = drained(backend, seconds=self.seconds)
            assert isinstance(failed, SegmentFailed)
            backend.submit(scripted_job(attempt=2))
            (done,) = drained(backend, seconds=self.seconds)
            assert isinstance(done, SegmentDone)
            assert done.job.attempt == 2
        finally:
            backend.close()

    def test_a_cancelled_job_is_not_reported_and_frees_its_slot(self) -> None:
        """Queued or running: what is given up is silent, and the rest goes on."""
        backend = self.backend(ScriptedRunner(scripts=UNHURRIED))
        try:
            jobs = [scripted_job(trial, end=40) for trial in range(backend.slots + 2)]
            for job in jobs:
                backend.submit(job)
            assert drained(backend, seconds=self.seconds, pumps=2) == []
            running, queued = jobs[0], jobs[-1]
            assert 0.0 <= backend.cancel(*running.key) <= 40 * PASSES_PER_RESOURCE
            assert backend.cancel(*queued.key) == 0.0
            results = drained(backend, seconds=self.seconds)
            assert sorted(r.job.trial for r in results) == [j.trial for j in jobs[1:-1]]
            assert all(isinstance(r, SegmentDone) for r in results)
        finally:
            backend.close()

    def test_what_a_trial_asks_for_is_given_or_refused_and_never_passed_over(self) -> None:
        """A backend that gives each worker the same refuses a job that asks for something of its own, and says why."""
        job = replace(scripted_job(), resources=Resources(cpus=0.5))
        backend = self.backend(ScriptedRunner())
        try:
            why, refused = backend.why_no_resources, ""
            try:
                backend.submit(job)
            except NotExecutableError as error:
                refused = str(error)
            assert bool(refused) == (why is not None), f"{why=}, and the job was {refused or 'taken'}"
            if why is not None:
                assert why in refused
                assert "0.5 cores and 0 GPUs" in refused
                assert idle(backend)
                return
            (done,) = drained(backend, seconds=self.seconds)
            assert isinstance(done, SegmentDone)
            assert done.job == job
        finally:
            backend.close()

    def test_what_it_says_of_trials_is_about_jobs_that_it_had_and_is_said_once(self) -> None:
        """A note names the card, the trials and the rung that they were on their way to, what is done with them, and why."""
        backend = self.backend(ScriptedRunner(scripts={1: Script(fails="advance")}))
        try:
            assert backend.notes() == []
            jobs = [scripted_job(trial, end=4 + 2 * (trial % 2)) for trial in range(4)]
            for job in jobs:
                backend.submit(job)
            drained(backend, seconds=self.seconds)
            had = {(job.card, job.trial, job.to_resource) for job in jobs}
            for note in backend.notes():
                assert note.trials
                assert {(note.card, trial, note.resource) for trial in note.trials} <= had
                assert note.what
                assert note.why
                assert note.text == f"{note.what}: {note.why}"
            assert backend.notes() == []
        finally:
            backend.close()
        assert backend.notes() == []

    def test_cancelling_what_is_not_there_does_nothing(self) -> None:
        """Another card, trial or attempt is another job."""
        backend = self.backend(ScriptedRunner(scripts=UNHURRIED))
        try:
            job = scripted_job(end=40)
            backend.submit(job)
            drained(backend, seconds=self.seconds, pumps=1)
            assert backend.cancel("deadbeef", job.trial, job.attempt) == 0.0
            assert backend.cancel(job.card, job.trial + 1, job.attempt) == 0.0
            assert backend.cancel(job.card, job.trial, job.attempt + 1) == 0.0
            (done,) = drained(backend, seconds=self.seconds)
            assert done.job == job
            assert backend.cancel(*job.key) == 0.0
        finally:
            backend.close()

    def test_a_closed_backend_has_given_up_everything(self) -> None:
        """Closing is silent, complete, and may be done twice."""
        backend = self.backend(ScriptedRunner(scripts=UNHURRIED))
        for trial in range(backend.slots + 2):
            backend.submit(scripted_job(trial, end=40))
        drained(backend, seconds=self.seconds, pumps=1)
        backend.close()
        assert idle(backend)
        assert backend.pump(10) == []
        backend.close()

    def test_the_parents_random_states_are_untouched(self) -> None:
        """A backend draws no chance of its own."""
        python_before = random.getstate()
        numpy_before: Any = np.random.get_state(legacy=True)  # noqa: NPY002  # the global generator is what must not move
        self.run([scripted_job(trial) for trial in range(3)], {1: Script(fails="advance")})
        numpy_after: Any = np.random.get_state(legacy=True)  # noqa: NPY002
        assert random.getstate() == python_before
        assert all(np.array_equal(a, b) for a, b in zip(numpy_before, numpy_after, strict=True))
