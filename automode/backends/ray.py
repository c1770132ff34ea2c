"""The Ray backend: segments run in actors of a Ray cluster, one actor a slot, each living as long as the backend.

Ray places actors and notices what dies; it decides nothing else, and retries nothing. Checkpoints travel by a shared place
(:class:`automode.session.mirror.CheckpointMirror`) and never through Ray's object store.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from automode.backends.actor import SegmentActor
from automode.backends.base import SegmentDone, SegmentFailed, SegmentJob
from automode.backends.pool import Discard, Patience, Result, Worker, WorkerPool
from automode.backends.remote import BriefOf, Dropped, RunnerFactory, failure, no_brief
from automode.errors import NotExecutableError
from automode.session.checkpoints import CheckpointStore
from automode.session.mirror import CheckpointMirror

ASK_SECONDS = 0.02
"""How often Ray is asked what has ended; the asking takes it some tenths of a millisecond."""

SPENT_SECONDS = 1.0
"""How often an actor is asked what its segment has spent, so that a lost one's cost is known."""


SIZES = 4
"""Sizes of nodes that a message names, the largest."""


class _Needs(NamedTuple):
    cpus: float
    gpus: float


@dataclass(slots=True, kw_only=True)
class _Actor(Worker):
    actor: Any
    asked: Any
    answer: Any = None
    number: int = 0
    told: float = 0.0

    @property
    def spent(self) -> float:
        return self.told


class RayBackend(WorkerPool[_Actor]):
    """Runs segments in ``slots`` actors. Made when it returns: one actor is up and has its runner.

    A job that says what its worker must have gets an actor with exactly that many cores and GPUs. Where no node of the cluster has
    so many, one is waited for as long as an actor may take to start (``patience.start``; a cluster may grow), and then the job has
    failed for good, and the next like it at once, until such a node is there.

    Args:
        factory: Makes each actor's runner; Ray pickles it.
        slots: Actors at the most; they are started as they are needed.
        brief: Gives what travels with a job.
        num_cpus: CPU cores of an actor whose job asks for nothing itself.
        num_gpus: GPUs of such an actor.
        checkpoints: The session's store; given together with ``uri``.
        uri: A place that all nodes reach, for checkpoints; None: all nodes see the session's folder itself.
        address: Of the cluster; None: the one that this process is connected to, else what ``RAY_ADDRESS`` names, else a
            local one of our own.
        patience: When an actor is given up; Ray itself notices its death.
        discard: Called with the checkpoint of a segment that had ended when it was cancelled.

    Raises:
        NotExecutableError: Ray is not installed, or no actor can have what the factory needs.
    """

    def __init__(
        self,
        factory: RunnerFactory,
        *,
        slots: int = 2,
        brief: BriefOf = no_brief,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        checkpoints: CheckpointStore | None = None,
        uri: str | None = None,
        address: str | None = None,
        patience: Patience | None = None,
        discard: Discard | None = None,
    ) -> None:
        super().__init__(slots, brief, patience, discard)
        if (uri is None) != (checkpoints is None):
            raise NotExecutableError("`uri` and `checkpoints` are given together or not at all")
        self._mirror = CheckpointMirror(checkpoints, uri) if checkpoints is not None and uri else None
        self._ray = _ray()
        self._ask_at = 0.0
        self._default = _Needs(num_cpus, num_gpus)
        self._mine = not self._ray.is_initialized()
        try:
            if self._mine:
                self._ray.init(address=address, include_dashboard=False, log_to_driver=False)
            self._arguments = (self._ray.put(factory), uri)
            why = self._first(self._default)
        except Exception as error:  # Ray's own errors, and whatever pickling a user's objects raises
            why = f"{type(error).__name__}: {error}"
        if why is not None:
            self.close()
            raise NotExecutableError(f"no Ray actor can have what training needs: {why}")

    def close(self) -> None:
        """Give up everything, and leave Ray as it was found."""
        super().close()
        if self._mine and self._ray.is_initialized():
            self._ray.shutdown()

    @property
    def why_no_resources(self) -> str | None:
        """Each job's actor gets what the job asks for."""
        return None

    def _needs(self, job: SegmentJob) -> _Needs:
        asked = job.resources
        return self._default if asked is None else _Needs(asked.cpus, asked.gpus)

    def _start(self, needs: Any) -> _Actor:
        options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_concurrency": 2}
        actor = self._ray.remote(SegmentActor).options(**options).remote(*self._arguments)
        return _Actor(actor=actor, asked=actor.spent.remote(), since=time.monotonic(), needs=needs)

    def _beyond(self, needs: Any) -> str | None:
        try:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        except Exception:  # the cluster does not answer, which says nothing of its nodes
            return None
        sizes = {(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes}
        if any(needs.cpus <= cpus and needs.gpus <= gpus for cpus, gpus in sizes):
            return None
        most = "; ".join(
            f"{cpus:g} CPUs, {gpus:g} GPUs" for cpus, gpus in sorted(sizes, reverse=True)[:SIZES]
        )
        asked = f"{needs.cpus:g} CPUs and {needs.gpus:g} GPUs"
        return (
            f"no node of the cluster has {asked} ({f'its nodes have {most}' if most else 'it has no node'})"
        )

    def _give(self, worker: _Actor, job: SegmentJob, brief: Any) -> None:
        if self._mirror is not None:
            self._mirror.push(job.checkpoint)
        worker.number += 1
        worker.answer = worker.actor.run.remote(worker.number, job, brief)
        worker.asked, worker.told = None, 0.0

    def _give_up(self, worker: _Actor) -> Result | Dropped | None:
        worker.actor.spent.remote(worker.number)
        try:
            result: Result | Dropped = self._ray.get(worker.answer, timeout=self._patience.cancel)
        except self._ray.exceptions.RayError:  # it took too long, or died
            return None
        worker.answer = None
        return result

    def _listen(self, seconds: float) -> None:
        now = time.monotonic()
        refs = [ref for w in self._workers for ref in (w.asked, w.answer) if ref is not None]
        if refs and (seconds or now >= self._ask_at):
            self._ask_at = now + ASK_SECONDS
            ready, _ = self._ray.wait(refs, timeout=seconds)
            ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0) if ready else (ready, [])
            for worker in list(self._workers):
                self._hear(worker, ready, now)

    def _hear(self, worker: _Actor, ready: list[Any], now: float) -> None:
        try:
            if worker.asked in ready:
                worker.told, worker.asked = self._ray.get(worker.asked), None
                self._is_ready(worker)
            if worker.answer in ready:
                result, worker.answer = self._ray.get(worker.answer), None
                self._take(worker, self._fetched(result))
        except self._ray.exceptions.RayError as error:
            self._lost(worker, f"the actor was lost ({type(error).__name__}: {error})")
            return
        if worker.job is not None and worker.asked is None and now - worker.since > SPENT_SECONDS:
            worker.asked = worker.actor.spent.remote()

    def _fetched(self, result: SegmentDone | SegmentFailed | Dropped) -> SegmentDone | SegmentFailed:
        assert not isinstance(result, Dropped)
        if isinstance(result, SegmentDone) and self._mirror is not None:
            try:
                self._mirror.pull(result.checkpoint)
            except Exception as error:  # the shared place may fail in any way that its driver knows
                return failure(result.job, error, result.passes)
        return result

    def _end(self, worker: _Actor) -> str:
        with contextlib.suppress(self._ray.exceptions.RayError):  # it, or its cluster, is gone already
            self._ray.kill(worker.actor)
        return "kill"


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise NotExecutableError(
            "the ray backend needs Ray: pip install 'automode[ray]', or use the process backend"
        ) from error
    return ray
