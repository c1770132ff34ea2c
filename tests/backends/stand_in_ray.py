"""A stand-in for the part of Ray that the backend uses (actors are threads, and what they are given is pickled as Ray would), and
what the tests over it and over Ray itself share."""

from __future__ import annotations

import importlib.util
import pickle
import threading
import types
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from typing import Any

import pytest

from automode.backends.base import SegmentDone, SegmentFailed, SegmentJob
from automode.backends.ray import RayBackend
from automode.planner.recipes import Resources
from automode.testing.backends import drained
from automode.testing.scripted import (
    scripted_job,
)

REAL = importlib.util.find_spec("ray") is not None


ray_itself = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("default"),  # Ray's own warnings are its own
]


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
            actor = self.made.result()
            # Its thread cannot be killed: it stops of itself, also where its segment has not quite begun.
            actor._go_on = lambda passes: False
            actor._unwanted = actor._number
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


def results(backend: RayBackend, *jobs: Any) -> list[SegmentDone | SegmentFailed]:
    for job in jobs:
        backend.submit(job)
    return drained(backend, seconds=60.0)


def asking(trial: int = 0, *, cpus: float = 1.0, gpus: float = 0.0, **how: Any) -> SegmentJob:
    """A job that says what its actor must have."""
    return replace(scripted_job(trial, **how), resources=Resources(cpus=cpus, gpus=gpus))


def a_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=100 * 1024 * 1024)
