"""Checkpoints are collected when nothing can need them, and a forgotten one costs time, never the trial."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.errors import SchedulerError
from automode.scheduler import ASHA, Job, Status


@given(
    count=st.integers(1, 30),
    eta=st.integers(2, 4),
    quota=st.booleans(),
    brackets=st.integers(1, 3),
    workers=st.integers(1, 5),
    closes=st.booleans(),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_no_job_ever_needs_a_checkpoint_that_was_offered_for_deletion(
    count: int, eta: int, quota: bool, brackets: int, workers: int, closes: bool, data: st.DataObject
) -> None:
    source = None if closes else count
    asha = ASHA(1, eta**3, eta, candidates=source, quota=quota, brackets=brackets, seed=3)
    disk: set[tuple[int, int]] = set()
    running: list[Job] = []

    def ask() -> Job | None:
        if closes and asha.started == count:
            asha.close()
        return asha.next() if len(running) < workers else None

    while not asha.finished:
        while (job := ask()) is not None:
            if job.from_resource:
                rung = asha.ladder.rung_of(job.from_resource)
                assert (job.trial, rung) in disk, f"{job} needs a checkpoint that was deleted"
            else:
                assert job.trial == asha.started - 1, f"{job} starts over needlessly"
            running.append(job)
        job = running.pop(data.draw(st.integers(0, len(running) - 1)))
        asha.report(job.trial, job.to_resource, data.draw(st.floats(0, 1)), attempt=job.attempt)
        rung = asha.ladder.rung_of(job.to_resource)
        assert rung is not None
        disk.add((job.trial, rung))
        free = asha.collectable()
        assert free <= disk
        for each in free:
            disk.remove(each)
            asha.forget(*each)
        assert asha.collectable() == set()
        best = asha.best()
        assert best is not None
        assert (best.trial, asha.ladder.rung_of(best.resource)) in disk
    assert disk == {(t, asha.ladder.top) for t in range(asha.started) if asha.status(t) is Status.FINISHED}


def started(asha: ASHA, values: list[float]) -> None:
    for value in values:
        job = asha.next()
        assert job is not None
        asha.report(job.trial, job.to_resource, value, attempt=job.attempt)


def test_a_trial_past_what_the_rung_can_ever_let_go_on_is_collected_early() -> None:
    asha = ASHA(1, 16, 4, candidates=8)
    jobs = [asha.next() for _ in range(7)]
    for job, value in zip(jobs, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], strict=True):
        assert job is not None
        asha.report(job.trial, 1, value, attempt=1)
    # Two of eight can go on in the end; ranks only worsen. Trials 2 to 6 are out.
    assert asha.collectable() == {(trial, 0) for trial in (2, 3, 4, 5, 6)}


def test_an_endless_source_keeps_every_paused_trial() -> None:
    asha = ASHA(1, 16, 4)
    jobs = [asha.next() for _ in range(7)]
    for job in jobs:
        assert job is not None
        asha.report(job.trial, 1, float(job.trial), attempt=1)
    assert asha.collectable() == set()


def test_what_diverged_or_was_stopped_is_collected_but_never_the_best() -> None:
    asha = ASHA(1, 4, 2, candidates=4)
    started(asha, [0.1, 0.2])
    assert asha.next() == Job(0, 1, 2, 1)
    asha.report(0, 2, math.nan, attempt=1)
    assert asha.collectable() == {(0, 1)}  # its first rung holds the best value of all so far
    asha.stop(1)
    assert asha.collectable() == {(0, 1), (1, 0)}


def test_a_forgotten_checkpoint_sends_the_trial_back_to_the_parent() -> None:
    asha = ASHA(1, 4, 2, candidates=2)
    started(asha, [0.1, 0.2])
    asha.forget(0, 0)
    with pytest.raises(SchedulerError, match="holds no checkpoint of rung 0"):
        asha.forget(0, 0)
    asha = ASHA.from_state(json.loads(json.dumps(asha.to_state())))
    job = asha.next()
    assert job == Job(0, 0, 2, 1)
    asha.report(0, 1, 0.15, attempt=1)  # passes the first rung again: a log, no second entry
    assert asha.rungs()[0].size == 2
    asha.report(0, 2, 0.05, attempt=1)
    assert asha.next() == Job(0, 2, 4, 1)


def test_a_checkpoint_that_a_segment_builds_on_cannot_be_forgotten() -> None:
    asha = ASHA(1, 4, 2, candidates=2)
    started(asha, [0.1, 0.2])
    asha.next()
    with pytest.raises(SchedulerError, match="builds on its checkpoint"):
        asha.forget(0, 0)
    asha.failed(0)
    with pytest.raises(SchedulerError, match="builds on its checkpoint"):
        asha.forget(0, 0)
    assert (0, 0) not in asha.collectable()


def test_after_cancelling_only_the_best_and_the_fully_trained_are_kept() -> None:
    asha = ASHA(1, 2, 2, candidates=8)
    started(asha, [0.5, 0.4, 0.3, 0.2, 0.1])
    asha.cancel()
    finished = {t for t in range(asha.started) if asha.status(t) is Status.FINISHED}
    kept = {(t, 0) for t in range(asha.started)} - asha.collectable()
    assert kept.isdisjoint({(t, 0) for t in finished})
    assert all((t, 1) not in asha.collectable() for t in finished)
