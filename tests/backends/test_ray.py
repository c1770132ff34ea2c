"""The Ray backend, over a small stand-in for Ray wherever Ray is missing, and over a cluster of two nodes where it is not."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from stand_in_ray import REAL, FakeRay, a_node, ray_itself, results

from automode.backends import pool
from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentRunner
from automode.backends.pool import Patience
from automode.backends.ray import RayBackend
from automode.backends.remote import ReadyMade, RemoteRunner
from automode.errors import NotExecutableError
from automode.planner.recipes import Variant
from automode.session.checkpoints import CheckpointStore
from automode.testing import BackendConformance
from automode.testing.backends import drained
from automode.testing.bench import Bench, identical, make_bench, small_network
from automode.testing.scripted import (
    PASSES_PER_RESOURCE,
    Script,
    ScriptedRunner,
    scripted_job,
)
from automode.testing.training import TrainingConformance
from automode.trainer.worker_runner import CardBriefs


@pytest.mark.usefixtures("fake")
class TestOverTheStandIn(BackendConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return RayBackend(ReadyMade(runner), slots=2)


def test_ray_is_left_as_it_was_found(fake: FakeRay) -> None:
    RayBackend(ReadyMade(ScriptedRunner())).close()
    assert not fake.is_initialized()
    fake.init()
    backend = RayBackend(ReadyMade(ScriptedRunner()))
    backend.close()
    assert fake.is_initialized()
    assert not any(actor.alive for actor in fake.actors)


def test_each_actor_gets_the_cores_that_were_asked_for_and_no_retries_of_rays_own(fake: FakeRay) -> None:
    with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=2, num_cpus=2.0, num_gpus=0.5)) as backend:
        results(backend, scripted_job(0), scripted_job(1))
    assert {tuple(sorted(given.items())) for given in fake.options} == {
        (("max_concurrency", 2), ("num_cpus", 2.0), ("num_gpus", 0.5))
    }


def test_an_actor_that_dies_costs_its_segment_which_may_be_tried_again(fake: FakeRay) -> None:
    runner = ScriptedRunner(scripts={0: Script(seconds=0.02)})
    with closing(RayBackend(ReadyMade(runner), slots=1)) as backend:
        backend.submit(scripted_job(0, end=100_000))
        until = time.monotonic() + 60
        while not backend._workers[0].told and time.monotonic() < until:
            assert backend.pump(1) == []
            time.sleep(0.01)
        fake.actors[0].die()
        (failed,) = drained(backend, seconds=60.0)
        assert isinstance(failed, SegmentFailed)
        assert failed.retryable
        assert "its node died" in failed.error
        assert failed.passes >= 1.0
        (again,) = results(backend, scripted_job(1, attempt=2))
        assert isinstance(again, SegmentDone)
        assert len(fake.actors) == 2


def test_an_actor_that_takes_too_long_is_killed(fake: FakeRay) -> None:
    runner = ScriptedRunner(scripts={0: Script(seconds=0.01)})
    patience = Patience(segment=0.3)
    with closing(RayBackend(ReadyMade(runner), slots=1, patience=patience)) as backend:
        (failed,) = results(backend, scripted_job(0, end=100_000))
    assert isinstance(failed, SegmentFailed)
    assert failed.retryable
    assert "not done after 0.3 s" in failed.error
    assert not fake.actors[0].alive


def test_an_actor_that_does_not_answer_a_cancellation_is_killed(fake: FakeRay) -> None:
    runner = ScriptedRunner(scripts={0: Script(seconds=3.0)})  # far from the end of its first slice
    with closing(RayBackend(ReadyMade(runner), slots=1, patience=Patience(cancel=0.01))) as backend:
        backend.submit(scripted_job(0, end=1000))
        assert backend.cancel(*scripted_job(0).key) == 0.0
        assert not backend.busy
        assert not fake.actors[0].alive


def test_what_a_running_segment_has_spent_is_told_when_it_is_cancelled(fake: FakeRay) -> None:
    runner = ScriptedRunner(scripts={0: Script(seconds=0.005)})
    with closing(RayBackend(ReadyMade(runner), slots=1, patience=Patience(cancel=30.0))) as backend:
        backend.submit(scripted_job(0, end=100_000))
        begun = fake.actors[0].made.result()
        while not begun.spent():
            time.sleep(0.005)
        assert backend.cancel(*scripted_job(0).key) >= PASSES_PER_RESOURCE
        assert fake.actors[0].alive


def test_a_runner_that_no_actor_can_make_is_refused_with_its_own_words(fake: FakeRay) -> None:
    with pytest.raises(NotExecutableError, match=r"no Ray actor can have .*the data set is not mounted"):
        RayBackend(Broken())
    assert not fake.is_initialized()


class Broken:
    def __call__(self, checkpoints: str | None) -> RemoteRunner:
        raise OSError("the data set is not mounted")


def test_a_runner_that_cannot_be_pickled_is_refused(fake: FakeRay) -> None:
    runner = ScriptedRunner(scripts={0: Script(error=Exception(threading.Lock()))})
    with pytest.raises(NotExecutableError, match="cannot pickle"):
        RayBackend(ReadyMade(runner))


def test_a_cluster_that_has_no_more_actors_to_give_fails_what_waits_for_them(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.02)
    with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=1)) as backend:
        fake.actors[0].die()
        fake.starts_fail = True
        (lost, refused) = results(backend, scripted_job(0), scripted_job(1))
    assert isinstance(lost, SegmentFailed)
    assert lost.retryable
    assert isinstance(refused, SegmentFailed)
    assert not refused.retryable
    assert "the cluster has no node" in refused.error


def test_a_place_without_a_store_is_refused(fake: FakeRay, tmp_path: Path) -> None:
    with pytest.raises(NotExecutableError, match="given together"):
        RayBackend(ReadyMade(ScriptedRunner()), uri=str(tmp_path))


@pytest.mark.skipif(REAL, reason="Ray is installed")
def test_without_ray_the_backend_says_how_to_get_it() -> None:
    with pytest.raises(NotExecutableError, match=r"pip install 'automode\[ray\]', or use the process"):
        RayBackend(ReadyMade(ScriptedRunner()))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_checkpoints_travel_by_the_shared_place(fake: FakeRay, tmp_path: Path, scheme: str) -> None:
    check_shared_place(tmp_path, scheme)


def check_shared_place(tmp_path: Path, scheme: str) -> None:
    """Train a specialist from rung to rung where the worker sees nothing of the session's folder."""
    bench = make_bench(tmp_path, model=small_network(norm=True), averages=True)
    plain = Variant(name="plain")
    alone = bench.train(bench.job(plain, end=4))
    bench.checkpoints.delete([alone.checkpoint])
    store = CheckpointStore(tmp_path / "session")
    store.save(*bench.checkpoints.load(bench.base))
    place = f"{scheme}{tmp_path / 'shared'}"
    backend = RayBackend(
        bench.factory(), slots=1, brief=CardBriefs(bench.runner), checkpoints=store, uri=place
    )
    with closing(backend):
        (first,) = results(backend, bench.job(plain, end=4))
        assert isinstance(first, SegmentDone), first
        assert identical(store.load(first.checkpoint)[0], store.load(alone.checkpoint)[0])
        (second,) = results(backend, bench.job(plain, start=4, end=8, checkpoint=first.checkpoint))
        assert isinstance(second, SegmentDone), second
        store.verify(second.checkpoint)
        missing = "sha256:" + "0" * 64
        (failed,) = results(backend, bench.job(plain, start=4, end=8, checkpoint=missing))
        assert isinstance(failed, SegmentFailed)
        assert "there is no checkpoint" in failed.error
    assert bench.checkpoints.digests() == [bench.base]


# Ray itself.


class TestOverRay(BackendConformance):
    pytestmark = ray_itself

    def backend(self, runner: SegmentRunner) -> Backend:
        return RayBackend(ReadyMade(runner), slots=2)


class TestOverRayWithRealSpecialists(TrainingConformance):
    pytestmark = ray_itself

    def bench(self, folder: Path) -> Bench:
        self.made = super().bench(folder)
        return self.made

    def backend(self, runner: SegmentRunner) -> Backend:
        return RayBackend(self.made.factory(), slots=2, brief=CardBriefs(self.made.runner))


class TestRay:
    pytestmark = ray_itself

    def test_checkpoints_travel_by_the_shared_place(self, tmp_path: Path) -> None:
        check_shared_place(tmp_path, "")

    def test_a_runner_that_no_actor_can_make_is_refused_with_its_own_words(self) -> None:
        with pytest.raises(NotExecutableError, match="no Ray actor can have"):
            RayBackend(ReadyMade(ScriptedRunner(scripts={0: Script(error=Exception(threading.Lock()))})))

    def test_a_node_that_is_killed_costs_one_segment_which_another_node_trains(self, cluster: Any) -> None:
        runner = ScriptedRunner(scripts={trial: Script(seconds=0.05) for trial in range(2)})
        with closing(RayBackend(ReadyMade(runner), slots=2)) as backend:
            backend.submit(scripted_job(0, end=200))
            backend.submit(scripted_job(1, end=200))
            until = time.monotonic() + 60
            while len([w for w in backend._workers if w.told]) < 2:
                assert backend.pump(1) == []
                assert time.monotonic() < until
                time.sleep(0.05)
            cluster.remove_node(cluster.worker, allow_graceful=False)
            try:
                found = drained(backend, seconds=120.0)
            finally:
                cluster.worker = a_node(cluster)
            (lost,) = [r for r in found if isinstance(r, SegmentFailed)]
            (kept,) = [r for r in found if isinstance(r, SegmentDone)]
            assert lost.retryable
            assert lost.passes >= PASSES_PER_RESOURCE
            assert {lost.job.trial, kept.job.trial} == {0, 1}
            (again,) = results(backend, scripted_job(lost.job.trial, attempt=2, end=10))
            assert isinstance(again, SegmentDone)
            assert again.job.attempt == 2
