"""The process backend: segments run in worker processes on this machine, at their own speed beside the trunk.

A worker lives as long as the backend and trains one segment at a time, on one thread. Jobs go out as data and results come
back as data; weights are on the disk, named by digest. A worker that dies, falls silent or takes too long costs the
segment it was at, which is reported as retryable: whether it is tried again is the scheduler's decision.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler

from automode.backends.base import SegmentDone, SegmentFailed, SegmentJob
from automode.backends.remote import (
    BriefOf,
    Dropped,
    RunnerFactory,
    failure,
    lost,
    no_brief,
    refused,
)
from automode.backends.starting import Start, Started, Starter, ways
from automode.backends.worker import Ended, Ready, Refused, Task
from automode.errors import NotExecutableError

Result = SegmentDone | SegmentFailed

CHECK_SECONDS = 0.25
"""How often deadlines are looked at."""

SENT_AT_ONCE = 1 << 16
"""Bytes that a pipe to an idle worker takes without waiting for it."""

STARTS = 3
"""Workers in a row that may fail to start before the backend gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a worker is waited for, in seconds; then it is killed.

    Attributes:
        segment: To the end of a segment.
        silence: For a sign of life, of which there should be two a second.
        start: For its runner.
        cancel: For the cost of a segment that is given up.
    """

    segment: float = 3600.0
    silence: float = 60.0
    start: float = 120.0
    cancel: float = 0.5


@dataclass(slots=True, kw_only=True)
class _Worker:
    started: Started
    since: float
    ready: bool = False
    task: Task | None = None
    beats: float = 0.0
    heard: float = field(default=0.0)

    @property
    def connection(self) -> Connection:
        return self.started.connection

    def end(self) -> str:
        """Make sure that the process is gone; tell how it ended."""
        process = self.started.process
        if process.is_alive():
            process.kill()
        process.join()
        code = process.exitcode
        process.close()
        self.connection.close()
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


class ProcessBackend:
    """Runs segments in ``slots`` worker processes. Made when it returns: one worker is up and has its runner.

    Args:
        factory: Makes each worker's runner.
        slots: Workers at the most; they are started as they are needed.
        brief: Gives what travels with a job.
        patience: When a worker is given up.
        start: How workers are started; ``auto`` takes the first way that works.

    Attributes:
        how: The way that was taken.

    Raises:
        NotExecutableError: No worker can have what the factory needs; the message says why, way by way.
    """

    def __init__(
        self,
        factory: RunnerFactory,
        *,
        slots: int = 2,
        brief: BriefOf = no_brief,
        patience: Patience | None = None,
        start: Start = "auto",
    ) -> None:
        if slots < 1:
            raise NotExecutableError(f"slots must be at least 1, got {slots}")
        self._slots = slots
        self._brief = brief
        self._patience = patience or Patience()
        self._queue: deque[SegmentJob] = deque()
        self._workers: list[_Worker] = []
        self._ended: list[Result] = []
        self._numbers = 0
        self._failed_starts = 0
        self._broken: str | None = None
        self._why = "the worker said nothing"
        self._look_at = 0.0
        self._starter = self._first_way(factory, start)
        self.how = self._starter.how

    @property
    def slots(self) -> int:
        """Workers at the most."""
        return self._slots

    @property
    def busy(self) -> bool:
        """Whether any segment is queued, running, or not reported yet."""
        return bool(self._queue or self._ended) or any(w.task is not None for w in self._workers)

    def submit(self, job: SegmentJob) -> None:
        """Queue a job, and hand it out at once where a worker is free.

        Raises:
            NotExecutableError: The backend is closed.
        """
        if self._broken == "closed":
            raise NotExecutableError("the backend is closed, so it takes no more jobs")
        self._queue.append(job)
        self._hand_out()

    def cancel(self, card: str, trial: int, attempt: int) -> float:
        """Drop a job; nothing is reported for it.

        Returns:
            The sample passes that it had spent: exact where its worker answers within the patience; the worker is killed
            where it does not, and then what it had spent since its last slice began is not known.
        """
        key = (card, trial, attempt)
        if any(job.key == key for job in self._queue):
            self._queue = deque(job for job in self._queue if job.key != key)
            return 0.0
        for result in self._ended:
            if result.job.key == key:
                self._ended.remove(result)
                return result.passes
        for worker in self._workers:
            if worker.task is not None and worker.task.job.key == key:
                spent = self._give_up(worker, worker.task)
                self._hand_out()
                return spent
        return 0.0

    def pump(self, trunk_steps: int) -> list[Result]:
        """Return what has ended; never waits. Workers go at their own speed, whatever the trunk's steps."""
        if self._workers:
            self._listen(0.0)
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + CHECK_SECONDS
                self._look(now)
        if self._queue:
            self._hand_out()
        ended, self._ended = self._ended, []
        return ended

    def wait(self, seconds: float) -> None:
        """Wait until a worker has something to say, or so many seconds have passed; ``pump`` then tells what it was."""
        if not self._ended:
            wait([w.connection for w in self._workers], seconds)

    def close(self) -> None:
        """Give up everything; no process is left when this returns."""
        self._broken = "closed"
        self._queue.clear()
        self._ended.clear()
        self._end_all()

    # Workers.

    def _first_way(self, factory: RunnerFactory, start: Start) -> Starter:
        """Find the way of starting that gives a worker with a runner, and keep that worker."""
        reasons = []
        for how in ways(start):
            try:
                self._starter = Starter(factory, how)
                self._start()
                until = time.monotonic() + self._patience.start
                while self._workers and not self._workers[0].ready and time.monotonic() < until:
                    self._listen(CHECK_SECONDS)
                if self._workers and self._workers[0].ready:
                    self._failed_starts = 0
                    return self._starter
                why = self._broken or self._why
                self._end_all()
            except (NotExecutableError, OSError, RuntimeError) as error:
                why = str(error)
            self._broken, self._failed_starts = None, 0
            reasons.append(f"{how}: {why}")
        raise NotExecutableError(
            f"no worker process can have what training needs ({'; '.join(reasons)}); use the inline backend, or define model, "
            "loss and dataset at the top level of a module that workers can import"
        )

    def _start(self) -> None:
        started = self._starter.start([w.connection for w in self._workers])
        now = time.monotonic()
        self._workers.append(_Worker(started=started, since=now, heard=now))

    def _hand_out(self) -> None:
        if self._broken is not None:
            self._ended += [refused(job, self._broken) for job in self._queue]
            self._queue.clear()
            return
        for worker in [w for w in self._workers if w.ready and w.task is None]:
            if not self._queue:
                return
            self._give(worker, self._queue.popleft())
        starting = sum(not w.ready for w in self._workers)
        for _ in range(min(self._slots - len(self._workers), len(self._queue) - starting)):
            try:
                self._start()
            except (OSError, RuntimeError) as error:
                self._not_started(f"{type(error).__name__}: {error}")
                return

    def _give(self, worker: _Worker, job: SegmentJob) -> None:
        self._numbers += 1
        try:
            task = Task(number=self._numbers, job=job, brief=self._brief(job))
            message = ForkingPickler.dumps(task)
        except Exception as error:  # the run cannot say what the worker must know
            self._ended.append(failure(job, error, 0.0))
            return
        worker.started.pulse.passes = 0.0
        worker.task = task
        worker.since = time.monotonic()
        if len(message) > SENT_AT_ONCE:
            # A worker that has stopped reading must not stop the training.
            threading.Thread(target=_send, args=(worker.connection, message), daemon=True).start()
        else:
            _send(worker.connection, message)

    def _give_up(self, worker: _Worker, task: Task) -> float:
        pulse = worker.started.pulse
        pulse.unwanted = float(task.number)
        until = time.monotonic() + self._patience.cancel
        while worker.task is not None and wait([worker.connection], max(0.0, until - time.monotonic())):
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, Ended) and message.number == task.number:
                worker.task = None
                if isinstance(message.result, SegmentFailed):
                    self._retire(worker)
                return message.result.passes
        spent = pulse.passes
        self._retire(worker)
        return spent

    def _end_all(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def _retire(self, worker: _Worker) -> str:
        self._workers.remove(worker)
        return worker.end()

    # What workers say, and what they no longer say.

    def _listen(self, seconds: float) -> None:
        for connection in wait([w.connection for w in self._workers], seconds):
            worker = next(w for w in self._workers if w.connection is connection)
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._lost(worker, "the worker died with {end}")
                continue
            match message:
                case Ready():
                    worker.ready = True
                    self._failed_starts = 0
                    worker.heard = time.monotonic()
                case Refused(reason=reason):
                    self._retire(worker)
                    self._broken = reason
                case Ended(result=result):
                    assert worker.task is not None
                    assert not isinstance(result, Dropped)
                    worker.task = None
                    self._ended.append(result)
                    if isinstance(result, SegmentFailed):
                        # What broke may be broken for the next segment too.
                        self._retire(worker)

    def _look(self, now: float) -> None:
        patience = self._patience
        for worker in list(self._workers):
            beats = worker.started.pulse.beats
            if beats != worker.beats:
                worker.beats, worker.heard = beats, now
            if not worker.ready:
                if now - worker.since > patience.start:
                    self._lost(worker, f"no worker was ready after {patience.start:g} s")
            elif worker.task is not None and now - worker.since > patience.segment:
                self._lost(
                    worker, f"the segment was not done after {patience.segment:g} s; its worker was killed"
                )
            elif now - worker.heard > patience.silence:
                self._lost(
                    worker, f"the worker gave no sign of life for {patience.silence:g} s and was killed"
                )

    def _lost(self, worker: _Worker, why: str) -> None:
        spent = worker.started.pulse.passes
        why = why.format(end=self._retire(worker))
        if worker.task is not None:
            self._ended.append(lost(worker.task.job, why, spent))
        elif not worker.ready:
            self._not_started(why)

    def _not_started(self, why: str) -> None:
        self._failed_starts += 1
        self._why = why
        if self._failed_starts >= STARTS:
            self._broken = f"{self._failed_starts} workers in a row did not start: {why}"


def _send(connection: Connection, message: memoryview) -> None:
    # A worker that has died meanwhile is noticed where its answers are read; a connection closed meanwhile has no handle.
    with contextlib.suppress(OSError, TypeError):
        connection.send_bytes(message)
