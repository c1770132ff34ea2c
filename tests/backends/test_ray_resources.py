"""What a job asks for, an actor has: over the stand-in for Ray, and over Ray itself."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from stand_in_ray import FakeRay, asking, ray_itself, results

from automode.backends import pool
from automode.backends.base import SegmentDone, SegmentFailed, SegmentJob
from automode.backends.pool import Patience
from automode.backends.ray import RayBackend
from automode.backends.remote import ReadyMade
from automode.planner.recipes import Resources
from automode.testing.scripted import (
    Script,
    ScriptedRunner,
    ScriptedSegment,
    scripted_job,
)


def test_an_actor_has_what_its_card_asks_for_and_serves_the_jobs_that_ask_for_the_same(fake: FakeRay) -> None:
    fake.sizes = [(True, {"CPU": 64.0, "GPU": 8.0})]
    with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=3)) as backend:
        jobs = [asking(0, cpus=2.0), scripted_job(1), asking(2, gpus=0.5), asking(3, cpus=2.0)]
        found = results(backend, *jobs, asking(4, cpus=1.0))
        assert all(isinstance(result, SegmentDone) for result in found)
        assert {result.job.trial for result in found} == {0, 1, 2, 3, 4}
        assert results(backend, asking(5, gpus=0.5))[0].job.resources == Resources(gpus=0.5)
    asked = [(given["num_cpus"], given["num_gpus"]) for given in fake.options]
    assert asked[:3] == [(1.0, 0.0), (2.0, 0.0), (1.0, 0.5)]  # the backend's own first
    assert set(asked) == set(asked[:3])


def test_an_idle_actor_of_other_needs_gives_up_its_slot(fake: FakeRay) -> None:
    with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=1)) as backend:
        for jobs in ([scripted_job(0)], [asking(1, cpus=2.0), scripted_job(2), asking(3, cpus=2.0)]):
            assert all(isinstance(result, SegmentDone) for result in results(backend, *jobs))
        assert sum(actor.alive for actor in fake.actors) == 1
    assert [given["num_cpus"] for given in fake.options] == [
        1.0,
        2.0,
        1.0,
        2.0,
    ]  # as they came, none waits for ever


def test_a_busy_actor_of_other_needs_is_waited_for(fake: FakeRay) -> None:
    runner = ScriptedRunner(scripts={0: Script(seconds=0.05)})
    with closing(RayBackend(ReadyMade(runner), slots=1)) as backend:
        found = results(backend, scripted_job(0, end=4), asking(1, cpus=2.0))
    assert [(type(result), result.job.trial) for result in found] == [(SegmentDone, 0), (SegmentDone, 1)]


def test_idle_actors_make_room_for_one_that_the_cluster_has_no_other_place_for(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "ROOM_SECONDS", 0.3)
    fake.sizes = [(True, {"CPU": 2.0})]
    with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=4)) as backend:
        results(backend, scripted_job(0), scripted_job(1))
        (done,) = results(backend, asking(2, cpus=2.0))
        assert isinstance(done, SegmentDone)
        assert backend.notes() == []


def test_what_no_node_has_fails_within_the_patience_and_is_tried_again_when_the_cluster_has_grown(
    fake: FakeRay,
) -> None:
    with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=2)) as backend:
        backend._patience = Patience(start=0.6)
        began = time.monotonic()
        (failed,) = results(backend, asking(0, gpus=2.0))
        assert 0.5 < time.monotonic() - began < 50.0
        backend._patience = Patience()  # for those that can be had
        (note,) = backend.notes()
        assert (note.trials, note.what) == ((0,), "given up unless a worker can be had in 0.6 s")
        for later, said in ((failed, "not ready after 0.6 s"), (*results(backend, asking(1, gpus=2.0)), "")):
            assert isinstance(later, SegmentFailed)
            assert not later.retryable
            assert said in later.error
            assert (
                "no node of the cluster has 1 CPUs and 2 GPUs (its nodes have 4 CPUs, 1 GPUs)" in later.error
            )
        assert isinstance(results(backend, scripted_job(2))[0], SegmentDone)
        fake.sizes.append((True, {"CPU": 8.0, "GPU": 2.0}))
        assert isinstance(results(backend, asking(3, gpus=2.0))[0], SegmentDone)


def test_an_actor_that_cannot_be_made_with_what_a_card_asks_for_is_given_up_though_others_idle(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.02)
    with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=2)) as backend:
        fake.starts_fail = True
        (failed,) = results(backend, asking(0, cpus=2.0))
        assert isinstance(failed, SegmentFailed)
        assert "3 workers in a row did not start: RayError: the cluster has no node" in failed.error
        assert isinstance(results(backend, scripted_job(1))[0], SegmentDone)


# Ray itself.


class TestRay:
    pytestmark = ray_itself

    def test_actors_of_two_cards_have_what_each_asks_for(self) -> None:
        with closing(RayBackend(assigned(), slots=2)) as backend:
            (own,) = results(backend, scripted_job(0))
            found = results(backend, asking(1, cpus=0.25), asking(2, cpus=0.5), asking(3, cpus=0.25))
        told = {r.job.trial: r.choice for r in (own, *found) if isinstance(r, SegmentDone)}
        assert told == {0: "{'CPU': 1.0}", 1: "{'CPU': 0.25}", 2: "{'CPU': 0.5}", 3: "{'CPU': 0.25}"}

    def test_an_idle_actor_makes_room_where_the_cluster_is_full(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pool, "ROOM_SECONDS", 0.5)
        with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=3)) as backend:
            results(
                backend, scripted_job(0), scripted_job(1)
            )  # both nodes are taken now, if only by idle actors
            (done,) = results(backend, asking(2, cpus=0.75))
            assert isinstance(done, SegmentDone), done

    def test_what_no_node_has_fails_within_the_patience(self) -> None:
        with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=2)) as backend:
            backend._patience = Patience(start=2.0)
            began = time.monotonic()
            (failed,) = results(backend, asking(0, gpus=4.0))
            assert time.monotonic() - began < 20.0
            assert isinstance(failed, SegmentFailed)
            assert not failed.retryable
            assert (
                "no node of the cluster has 1 CPUs and 4 GPUs (its nodes have 1 CPUs, 0 GPUs)" in failed.error
            )
            assert [note.trials for note in backend.notes()] == [(0,)]
            assert isinstance(results(backend, scripted_job(1))[0], SegmentDone)


def assigned() -> Any:
    """Makes runners whose segments report what their actor has; defined in a function, so that it travels by value."""

    class Told(ScriptedSegment):
        def finish(self) -> SegmentDone:
            import ray

            has = ray.get_runtime_context().get_assigned_resources()
            return replace(super().finish(), choice=str(dict(has)))

    class Factory:
        def __call__(self, checkpoints: str | None) -> Any:
            return self

        def open(self, job: SegmentJob, brief: Any) -> Any:
            return Told(job, Script())

    return Factory()
