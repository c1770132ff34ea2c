"""Workers elsewhere, and the jobs that wait for them: what backends share that run segments away from the training process."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from automode.backends.base import Note, SegmentDone, SegmentFailed, SegmentJob, note, without_resources
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


Needs: TypeAlias = Hashable
"""What a worker must have for a job; workers of equal needs do each other's jobs."""

ROOM_SECONDS = 5.0
"""How long a worker may be starting before idle ones of other needs are ended, whose place it may be waiting for."""


@dataclass(slots=True, kw_only=True)
class _Starts:
    """How workers of one kind of needs have started: failures in a row, the next try, and why no more is tried."""

    failed: int = 0
    at: float = 0.0
    broken: str | None = None


@dataclass(slots=True, kw_only=True)
class Worker(ABC):
    """One worker, as the training process sees it.

    Attributes:
        needs: What it was started with.
        since: When it was started, or given its job (``time.monotonic``).
        ready: Whether it has its runner.
        job: The segment that it is at.
    """

    since: float
    needs: Needs = None
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

    Jobs may need different things of their workers. They are handed out in the order in which they came: each to an idle worker
    that has what it needs, else to a new one, for which an idle worker of other needs is ended where there is no slot.

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
        self._starts: defaultdict[Needs, _Starts] = defaultdict(_Starts)
        self._notes: list[Note] = []
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

    @property
    @abstractmethod
    def why_no_resources(self) -> str | None:
        """Why it cannot give a job's worker the cores and GPUs that the job asks for; None: it can."""

    def submit(self, job: SegmentJob) -> None:
        """Queue a job, and hand it out at once where a worker is free.

        Raises:
            NotExecutableError: The backend is closed, or cannot give the job's worker what the job asks for.
        """
        if self._closed:
            raise NotExecutableError("the backend is closed, so it takes no more jobs")
        self._queue.append(without_resources(job, self.why_no_resources))
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
        """Say which trials wait for a worker that nobody can give now."""
        said, self._notes = self._notes, []
        return said

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
    def _start(self, needs: Needs) -> W:
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

    def _needs(self, job: SegmentJob) -> Needs:
        """Say what a job's worker must have."""
        return None

    def _beyond(self, needs: Needs) -> str | None:
        """Tell why no worker can have this, as things stand; None: one can, now or when others have ended."""
        return None

    # What kinds of worker share.

    def _first(self, needs: Needs = None) -> str | None:
        """Start the first worker and wait until it is ready; tell why there is none."""
        try:
            self._workers.append(self._start(needs))
        except Exception as error:  # the system, or a cluster, has none to give
            return f"{type(error).__name__}: {error}"
        until = time.monotonic() + self._patience.start
        while self._workers and not self._workers[0].ready and time.monotonic() < until:
            self._listen(CHECK_SECONDS)
        if self._workers and not self._workers[0].ready:
            self._lost(self._workers[0], f"it was not ready after {self._patience.start:g} s")
        self._starts.clear()
        return None if self._workers else self._why

    def _hand_out(self) -> None:
        waiting, self._queue = self._queue, deque()
        starting = Counter(worker.needs for worker in self._workers if not worker.ready)
        for job in waiting:
            needs = self._needs(job)
            if (why := self._why_never(needs)) is not None:
                self._ended.append(refused(job, why))
            elif (worker := self._idle(needs)) is not None:
                self._assign(worker, job)
            else:
                self._queue.append(job)
                if starting[needs]:
                    starting[needs] -= 1  # one is on its way for this job already
                else:
                    self._start_for(job, needs)

    def _assign(self, worker: W, job: SegmentJob) -> None:
        try:
            self._give(worker, job, self._brief(job))
        except Exception as error:  # the run cannot say what the worker must know
            self._ended.append(failure(job, error, 0.0))
        else:
            worker.job, worker.since = job, time.monotonic()

    def _idle(self, needs: Needs) -> W | None:
        return next((w for w in self._workers if w.ready and w.job is None and w.needs == needs), None)

    def _start_for(self, job: SegmentJob, needs: Needs) -> None:
        """Start a worker for a job, where there is a slot for it, or an idle worker of other needs has one."""
        starts = self._starts[needs]
        if time.monotonic() < starts.at or not (len(self._workers) < self._slots or self._make_room(needs)):
            return
        if (beyond := self._beyond(needs)) is not None:
            what = f"given up unless a worker can be had in {self._patience.start:g} s"
            self._notes.append(note([job], what, beyond))
        try:
            self._workers.append(self._start(needs))
        except Exception as error:  # the system, or a cluster, has no more to give
            self._not_started(needs, f"{type(error).__name__}: {error}")

    def _make_room(self, needs: Needs) -> bool:
        """End an idle worker of other needs; False: there is none."""
        other = next((w for w in self._workers if w.ready and w.job is None and w.needs != needs), None)
        if other is not None:
            self._retire(other)
        return other is not None

    def _why_never(self, needs: Needs) -> str | None:
        """Tell why no worker is tried any more; a cluster that has grown meanwhile is tried again."""
        starts = self._starts[needs]
        if starts.broken is not None and starts.failed < STARTS and self._beyond(needs) is None:
            starts.broken = None
        return starts.broken

    def _is_ready(self, worker: W) -> None:
        worker.ready = True
        self._starts.pop(worker.needs, None)

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
                elif now - worker.since > ROOM_SECONDS:
                    self._make_room(worker.needs)
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
            self._not_started(worker.needs, why)

    def _not_started(self, needs: Needs, why: str) -> None:
        starts = self._starts[needs]
        starts.failed += 1
        starts.at = time.monotonic() + min(LONGEST_PAUSE, FIRST_PAUSE * 4.0 ** (starts.failed - 1))
        beyond = self._beyond(needs)
        self._why = why if beyond is None else f"{why}: {beyond}"
        if beyond is not None:
            starts.broken, starts.failed, starts.at = self._why, 0, 0.0
        elif starts.failed >= STARTS and not any(w.job or w.needs == needs for w in self._workers):
            starts.broken = f"{starts.failed} workers in a row did not start: {why}"

    def _retire(self, worker: W) -> str:
        self._workers.remove(worker)
        return self._end(worker)

    def _unwanted(self, result: Result | Dropped) -> float:
        if isinstance(result, SegmentDone) and self._discard is not None:
            self._discard(result.checkpoint)
        return result.passes
