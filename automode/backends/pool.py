"""Workers elsewhere, and the jobs that wait for them: what backends share that run segments away from the training process."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from automode.backends.base import Note, SegmentDone, SegmentFailed, SegmentJob
from automode.backends.remote import BriefOf, Dropped, failure, lost, no_brief, refused
from automode.errors import NotExecutableError

Result = SegmentDone | SegmentFailed
Discard: TypeAlias = Callable[[str], object]

CHECK_SECONDS = 0.25
"""How often deadlines are looked at."""

STARTS = 3
"""Workers in a row that may fail to start before the backend gives up, where no other worker is left."""

FIRST_PAUSE = 0.4
LONGEST_PAUSE = 60.0
"""Seconds between two tries to start a worker where the last one failed: four times as many each time, up to the longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a worker is waited for, in seconds; then it is killed.

    Attributes:
        segment: To the end of a segment.
        silence: For a sign of life, of which a process gives two a second.
        start: For its runner.
        cancel: For the cost of a segment that is given up.
    """

    segment: float = 3600.0
    silence: float = 60.0
    start: float = 120.0
    cancel: float = 0.5


@dataclass(slots=True, kw_only=True)
class Worker(ABC):
    """One worker, as the training process sees it.

    Attributes:
        since: When it was started, or given its job (``time.monotonic``).
        ready: Whether it has its runner.
        job: The segment that it is at.
    """

    since: float
    ready: bool = False
    job: SegmentJob | None = None

    @property
    @abstractmethod
    def spent(self) -> float:
        """Sample passes of the segment, as far as they are known."""


W = TypeVar("W", bound=Worker)


class WorkerPool(ABC, Generic[W]):
    """A backend whose segments run in workers, at their own speed beside the trunk.

    A worker trains one segment at a time. One that dies, or is not heard of for too long, costs the segment that it was at,
    which is reported as retryable: whether it is tried again is the scheduler's decision. A worker whose segment failed
    is replaced, since what broke may be broken for the next segment too.

    Args:
        slots: Workers at the most; they are started as they are needed.
        brief: Gives what travels with a job.
        patience: When a worker is given up.
        discard: Called with the checkpoint of a segment that had ended when it was cancelled: nobody will hear of it.

    Raises:
        NotExecutableError: There is no slot.
    """

    def __init__(
        self,
        slots: int,
        brief: BriefOf = no_brief,
        patience: Patience | None = None,
        discard: Discard | None = None,
    ) -> None:
        if slots < 1:
            raise NotExecutableError(f"slots must be at least 1, got {slots}")
        self._slots = slots
        self._brief = brief
        self._patience = patience or Patience()
        self._discard = discard
        self._queue: deque[SegmentJob] = deque()
        self._workers: list[W] = []
        self._ended: list[Result] = []
        self._closed = False
        self._failed_starts = 0
        self._start_at = 0.0
        self._broken: str | None = None
        self._why = ""
        self._check_at = 0.0

    # What the driver calls.

    @property
    def slots(self) -> int:
        """Workers at the most."""
        return self._slots

    @property
    def busy(self) -> bool:
        """Whether any segment is queued, running, or not reported yet."""
        return bool(self._queue or self._ended) or any(w.job is not None for w in self._workers)

    def submit(self, job: SegmentJob) -> None:
        """Queue a job, and hand it out at once where a worker is free.

        Raises:
            NotExecutableError: The backend is closed.
        """
        if self._closed:
            raise NotExecutableError("the backend is closed, so it takes no more jobs")
        self._queue.append(job)
        self._hand_out()

    def cancel(self, card: str, trial: int, attempt: int) -> float:
        """Drop a job; nothing is reported for it.

        Returns:
            The sample passes that it had spent: exact where its worker answers within the patience. Where it does not it
            is killed, and what it spent since it was last heard of is not known.
        """
        key = (card, trial, attempt)
        for job in self._queue:
            if job.key == key:
                self._queue.remove(job)
                return 0.0
        for result in self._ended:
            if result.job.key == key:
                self._ended.remove(result)
                return self._unwanted(result)
        for worker in self._workers:
            if worker.job is not None and worker.job.key == key:
                answer = self._give_up(worker)
                spent = worker.spent if answer is None else self._unwanted(answer)
                if answer is None or isinstance(answer, SegmentFailed):
                    self._retire(worker)
                worker.job = None
                self._hand_out()
                return spent
        return 0.0

    def pump(self, trunk_steps: int) -> list[Result]:
        """Return what has ended; never waits. Workers go at their own speed, whatever the trunk's steps."""
        if self._workers:
            self._listen(0.0)
            now = time.monotonic()
            if now >= self._check_at:
                self._check_at = now + CHECK_SECONDS
                self._check(now)
        if self._queue:
            self._hand_out()
        ended, self._ended = self._ended, []
        return ended

    def wait(self, seconds: float) -> None:
        """Wait until a worker has said something, or so many seconds have passed; ``pump`` then tells what has ended."""
        if not self._ended and self._workers:
            self._listen(seconds)

    def notes(self) -> list[Note]:
        """None: every trial has a worker of its own."""
        return []

    def close(self) -> None:
        """Give up everything; no worker is left when this returns."""
        self._closed = True
        self._queue.clear()
        if self._workers:
            with contextlib.suppress(Exception):  # a cluster may be gone, with everything that it had to say
                self._listen(0.0)
        while self._ended:
            self._unwanted(self._ended.pop())
        while self._workers:
            self._end(self._workers.pop())

    # What a kind of worker needs.

    @abstractmethod
    def _start(self) -> W:
        """Start a worker; its :attr:`Worker.ready` comes later. Raises whatever says that none can be had."""

    @abstractmethod
    def _give(self, worker: W, job: SegmentJob, brief: Any) -> None:
        """Send a ready worker its job. Raises what the brief's pickling raises."""

    @abstractmethod
    def _listen(self, seconds: float) -> None:
        """Hear what workers say, waiting at the most so long for the first to speak."""

    @abstractmethod
    def _give_up(self, worker: W) -> Result | Dropped | None:
        """Make a worker drop its segment; give what it answers, which may be that it had ended, or None."""

    @abstractmethod
    def _end(self, worker: W) -> str:
        """Make sure that a worker is gone; tell how it ended."""

    def _silent(self, worker: W, now: float) -> str | None:
        """Tell why a worker counts as lost although no deadline of its own has passed."""
        return None

    # What kinds of worker share.

    def _first(self) -> str | None:
        """Start the first worker and wait until it is ready; tell why there is none."""
        try:
            self._workers.append(self._start())
        except Exception as error:  # the system, or a cluster, has none to give
            return f"{type(error).__name__}: {error}"
        until = time.monotonic() + self._patience.start
        while self._workers and not self._workers[0].ready and time.monotonic() < until:
            self._listen(CHECK_SECONDS)
        if self._workers and not self._workers[0].ready:
            self._lost(self._workers[0], f"it was not ready after {self._patience.start:g} s")
        self._failed_starts, self._start_at = 0, 0.0
        return None if self._workers else self._why

    def _hand_out(self) -> None:
        if self._broken is not None:
            self._ended += [refused(job, self._broken) for job in self._queue]
            self._queue.clear()
            return
        for worker in self._workers:
            while self._queue and worker.ready and worker.job is None:
                job = self._queue.popleft()
                try:
                    self._give(worker, job, self._brief(job))
                except Exception as error:  # the run cannot say what the worker must know
                    self._ended.append(failure(job, error, 0.0))
                else:
                    worker.job, worker.since = job, time.monotonic()
        if not self._queue or time.monotonic() < self._start_at:
            return
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(self._slots - len(self._workers), len(self._queue) - starting)):
            try:
                self._workers.append(self._start())
            except Exception as error:  # the system, or a cluster, has no more to give
                self._not_started(f"{type(error).__name__}: {error}")
                return

    def _is_ready(self, worker: W) -> None:
        worker.ready = True
        self._failed_starts = 0

    def _take(self, worker: W, result: Result) -> None:
        worker.job = None
        self._ended.append(result)
        if isinstance(result, SegmentFailed):
            self._retire(worker)

    def _check(self, now: float) -> None:
        patience = self._patience
        for worker in list(self._workers):
            if not worker.ready:
                if now - worker.since > patience.start:
                    self._lost(worker, f"it was not ready after {patience.start:g} s")
            elif worker.job is not None and now - worker.since > patience.segment:
                self._lost(worker, f"the segment was not done after {patience.segment:g} s, and was killed")
            elif (why := self._silent(worker, now)) is not None:
                self._lost(worker, why)

    def _lost(self, worker: W, why: str) -> None:
        """Report what a worker was at; ``{end}`` in the reason becomes how it ended."""
        spent = worker.spent
        why = why.replace("{end}", self._retire(worker))
        if worker.job is not None:
            self._ended.append(lost(worker.job, why, spent))
        elif not worker.ready:
            self._not_started(why)

    def _not_started(self, why: str) -> None:
        self._failed_starts += 1
        self._why = why
        self._start_at = time.monotonic() + min(LONGEST_PAUSE, FIRST_PAUSE * 4.0 ** (self._failed_starts - 1))
        if self._failed_starts >= STARTS and not self._workers:
            self._broken = f"{self._failed_starts} workers in a row did not start: {why}"

    def _retire(self, worker: W) -> str:
        self._workers.remove(worker)
        return self._end(worker)

    def _unwanted(self, result: Result | Dropped) -> float:
        if isinstance(result, SegmentDone) and self._discard is not None:
            self._discard(result.checkpoint)
        return result.passes
