"""The Ray backend, over a small stand-in for Ray wherever Ray is missing, and over a cluster of two nodes where it is not."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from automode.backends import pool
from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentJob, SegmentRunner
from automode.backends.pool import Patience
from automode.backends.ray import RayBackend
from automode.backends.remote import ReadyMade, RemoteRunner
from automode.errors import NotExecutableError
from automode.planner.recipes import Resources, Variant
from automode.session.checkpoints import CheckpointStore
from automode.testing import BackendConformance
from automode.testing.backends import drained
from automode.testing.bench import Bench, identical, make_bench, small_network
from automode.testing.scripted import (
    PASSES_PER_RESOURCE,
    Script,
    ScriptedRunner,
    ScriptedSegment,
    scripted_job,
)
from automode.testing.training import TrainingConformance
from automode.trainer.worker_runner import CardBriefs

REAL = importlib.util.find_spec("ray") is not None


# A stand-in for the part of Ray that is used: actors are threads, and what they are given is pickled as Ray would.


class RayError(Exception):
    pass


class GetTimeoutError(RayError):
    pass


class ActorDiedError(RayError):
    pass


class Method:
    def __init__(self, actor: Actor, name: str) -> None:
        self.actor, self.name = actor, name

    def remote(self, *arguments: Any) -> Future[Any]:
        return self.actor.call(self.name, pickle.loads(pickle.dumps(arguments)))


class Actor:
    def __init__(self, kind: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.alive, self.placed = True, False
        self.threads = ThreadPoolExecutor(3)
        self.kind, self.arguments, self.options = kind, arguments, options
        self.made: Future[Any] = Future()
        self.pending: list[Future[Any]] = []
        self.lock = threading.Lock()

    def place(self) -> None:
        """Come into being: a node has room."""
        self.placed = True
        try:
            self.made.set_result(self.kind(*self.arguments))
        except Exception as error:
            self.made.set_exception(error)

    def call(self, name: str, arguments: tuple[Any, ...]) -> Future[Any]:
        answer: Future[Any] = Future()
        with self.lock:
            self.pending.append(answer)

        def work() -> None:
            try:
                found = getattr(self.made.result(), name)(*arguments)
            except Exception as error:
                why = str(error)
                self.settle(answer, lambda: answer.set_exception(ActorDiedError(why)))
            else:
                self.settle(answer, lambda: answer.set_result(pickle.loads(pickle.dumps(found))))

        if self.alive:
            self.threads.submit(work)
        else:
            answer.set_exception(ActorDiedError("it was dead"))
        return answer

    def settle(self, answer: Future[Any], how: Callable[[], None]) -> None:
        with self.lock:
            if not answer.done():
                how()

    def die(self) -> None:
        self.alive = False
        for answer in self.pending:
            self.settle(answer, lambda a=answer: a.set_exception(ActorDiedError("its node died")))  # type: ignore[misc]
        if not self.made.cancel() and self.made.exception() is None:
            self.made.result().spent(False)
        self.threads.shutdown(wait=False)

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)


class FakeRay(types.ModuleType):
    """As much of Ray as the backend touches."""

    exceptions = types.SimpleNamespace(RayError=RayError)

    def __init__(self) -> None:
        super().__init__("ray")
        self.up = False
        self.actors: list[Actor] = []
        self.options: list[dict[str, Any]] = []
        self.starts_fail = False
        self.sizes = [(True, {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}), (False, {"CPU": 64.0, "GPU": 8.0})]

    def is_initialized(self) -> bool:
        return self.up

    def init(self, **settings: Any) -> None:
        self.up = True

    def shutdown(self) -> None:
        self.up = False

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": alive, "Resources": size} for alive, size in self.sizes]

    def put(self, value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))

    def remote(self, kind: Callable[..., Any]) -> Any:
        def made(*arguments: Any) -> Actor:
            if self.starts_fail:
                raise RayError("the cluster has no node")
            self.actors.append(Actor(kind, arguments, self.options[-1]))
            self.place()
            return self.actors[-1]

        def options(**given: Any) -> Any:
            self.options.append(given)
            return types.SimpleNamespace(remote=made)

        return types.SimpleNamespace(options=options)

    def place(self) -> None:
        """Let actors come into being as far as the living nodes have room, which here counts as one."""
        for actor in self.actors:
            living = [a for a in self.actors if a.alive and a.placed]
            room = all(
                sum(a.options[asked] for a in [*living, actor])
                <= sum(size.get(name, 0.0) for alive, size in self.sizes if alive)
                for asked, name in (("num_cpus", "CPU"), ("num_gpus", "GPU"))
            )
            if actor.alive and not actor.placed and room:
                actor.place()

    def kill(self, actor: Actor) -> None:
        actor.die()
        self.place()

    def wait(
        self, refs: list[Future[Any]], *, num_returns: int = 1, timeout: float
    ) -> tuple[list[Future[Any]], list[Future[Any]]]:
        wait_for(refs, timeout, return_when="FIRST_COMPLETED")
        ready = [ref for ref in refs if ref.done()][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Future[Any], *, timeout: float | None = None) -> Any:
        try:
            return ref.result(timeout)
        except TimeoutError as error:
            raise GetTimeoutError from error


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


@pytest.mark.usefixtures("fake")
class TestOverTheStandIn(BackendConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return RayBackend(ReadyMade(runner), slots=2)


def results(backend: RayBackend, *jobs: Any) -> list[SegmentDone | SegmentFailed]:
    for job in jobs:
        backend.submit(job)
    return drained(backend, seconds=60.0)


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


def asking(trial: int = 0, *, cpus: float = 1.0, gpus: float = 0.0, **how: Any) -> SegmentJob:
    """A job that says what its actor must have."""
    return replace(scripted_job(trial, **how), resources=Resources(cpus=cpus, gpus=gpus))


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
    with closing(RayBackend(ReadyMade(ScriptedRunner()), slots=2, patience=Patience(start=0.6))) as backend:
        began = time.monotonic()
        (failed,) = results(backend, asking(0, gpus=2.0))
        assert 0.5 < time.monotonic() - began < 10.0
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


def test_an_actor_that_dies_costs_its_segment_which_may_be_tried_again(fake: FakeRay) -> None:
    runner = ScriptedRunner(scripts={0: Script(seconds=0.02)})
    with closing(RayBackend(ReadyMade(runner), slots=1)) as backend:
        backend.submit(scripted_job(0, end=100_000))
        until = time.monotonic() + 20
        while not backend._workers[0].told and time.monotonic() < until:
            assert backend.pump(1) == []
            time.sleep(0.01)
        fake.actors[0].die()
        (failed,) = drained(backend, seconds=20.0)
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
    runner = ScriptedRunner(scripts={0: Script(seconds=0.2)})
    with closing(RayBackend(ReadyMade(runner), slots=1, patience=Patience(cancel=0.01))) as backend:
        backend.submit(scripted_job(0, end=1000))
        assert backend.cancel(*scripted_job(0).key) == 0.0
        assert not backend.busy
        assert not fake.actors[0].alive


def test_what_a_running_segment_has_spent_is_told_when_it_is_cancelled(fake: FakeRay) -> None:
    runner = ScriptedRunner(scripts={0: Script(seconds=0.005)})
    with closing(RayBackend(ReadyMade(runner), slots=1)) as backend:
        backend.submit(scripted_job(0, end=100_000))
        time.sleep(0.1)
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, on this machine."""
    if not REAL:
        pytest.skip("Ray is not installed: pip install automode[ray]")
    import ray
    from ray.cluster_utils import Cluster

    # Without node_ip_address: with 127.0.0.1 the driver waits for another address for ever.
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 1024 * 1024}
    )
    made.worker = a_node(made)
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def a_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=100 * 1024 * 1024)


ray_itself = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("default"),  # Ray's own warnings are its own
]


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
