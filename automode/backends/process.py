"""The process backend: segments run in worker processes on this machine, at their own speed beside the trunk.

A worker lives as long as the backend and trains on one thread. Jobs go out as data and results come back as data; weights
are on the disk, named by digest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from automode.backends.base import SegmentJob
from automode.backends.pool import Discard, Needs, Patience, Result, Worker, WorkerPool
from automode.backends.remote import BriefOf, Dropped, RunnerFactory, no_brief
from automode.backends.starting import Start, Started, Starter, ways
from automode.backends.worker import Ended, Ready, Refused, Task
from automode.errors import NotExecutableError

SENT_AT_ONCE = 1 << 16
"""Bytes that a pipe to an idle worker takes without waiting for it."""


@dataclass(slots=True, kw_only=True)
class _Process(Worker):
    started: Started
    number: int = 0
    beats: float = 0.0
    heard: float = 0.0

    @property
    def connection(self) -> Connection:
        return self.started.connection

    @property
    def spent(self) -> float:
        return self.started.pulse.passes


class ProcessBackend(WorkerPool[_Process]):
    """Runs segments in ``slots`` worker processes. Made when it returns: one worker is up and has its runner.

    Args:
        factory: Makes each worker's runner.
        slots: Workers at the most; they are started as they are needed.
        brief: Gives what travels with a job.
        patience: When a worker is given up.
        discard: Called with the checkpoint of a segment that had ended when it was cancelled.
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
        discard: Discard | None = None,
        start: Start = "auto",
    ) -> None:
        super().__init__(slots, brief, patience, discard)
        self._numbers = 0
        reasons = []
        for how in ways(start):
            try:
                self._starter = Starter(factory, how)
                why = self._first()
            except NotExecutableError as error:
                why = str(error)
            if why is None:
                self.how = how
                return
            reasons.append(f"{how}: {why}")
        raise NotExecutableError(
            f"no worker process can have what training needs ({'; '.join(reasons)}); use the inline backend, or define model, "
            "loss and dataset at the top level of a module that workers can import"
        )

    @property
    def why_no_resources(self) -> str | None:
        """A worker has one thread, as has whatever it must agree with bit by bit."""
        return "trials train in worker processes of one thread each"

    def _start(self, needs: Needs) -> _Process:
        started = self._starter.start([worker.connection for worker in self._workers])
        now = time.monotonic()
        return _Process(started=started, since=now, heard=now)

    def _give(self, worker: _Process, job: SegmentJob, brief: Any) -> None:
        self._numbers += 1
        message = ForkingPickler.dumps(Task(number=self._numbers, job=job, brief=brief))
        worker.number = self._numbers
        worker.started.pulse.passes = 0.0
        if len(message) > SENT_AT_ONCE:
            # A worker that has stopped reading must not stop the training.
            threading.Thread(target=_send, args=(worker.connection, message), daemon=True).start()
        else:
            _send(worker.connection, message)

    def _give_up(self, worker: _Process) -> Result | Dropped | None:
        worker.started.pulse.unwanted = float(worker.number)
        if not wait([worker.connection], self._patience.cancel):
            return None
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return None
        assert isinstance(message, Ended)
        return message.result

    def _listen(self, seconds: float) -> None:
        for connection in wait([worker.connection for worker in self._workers], seconds):
            worker = next(w for w in self._workers if w.connection is connection)
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._lost(worker, "the worker died with {end}")
                continue
            match message:
                case Ready():
                    self._is_ready(worker)
                case Refused(reason=reason):
                    self._retire(worker)
                    self._not_started(worker.needs, reason)
                case Ended(result=result):
                    assert not isinstance(result, Dropped)
                    self._take(worker, result)

    def _silent(self, worker: _Process, now: float) -> str | None:
        beats = worker.started.pulse.beats
        if beats != worker.beats:
            worker.beats, worker.heard = beats, now
        if now - worker.heard <= self._patience.silence:
            return None
        return f"the worker gave no sign of life for {self._patience.silence:g} s, and was killed"

    def _end(self, worker: _Process) -> str:
        process = worker.started.process
        if process.is_alive():
            process.kill()
        process.join()
        code = process.exitcode
        process.close()
        worker.connection.close()
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _send(connection: Connection, message: memoryview) -> None:
    # A worker that has died meanwhile is noticed where its answers are read; a connection closed meanwhile has no handle.
    with contextlib.suppress(OSError, TypeError):
        connection.send_bytes(message)
