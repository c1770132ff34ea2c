"""The stacked backend: trials of one architecture trained at once, in time slices between the trunk's steps.

Jobs that wait are gathered until the next pump; those with the same way to go whose networks, optimizers and batches are alike
become a group, whose members take every step together: one vectorised gradient, one update, each with its own learning rate,
weight decay, clipping and loss weight. Everything else is the segments' own: schedules, averages, early stopping, evaluation and
checkpoints. A member that diverges, stops early or is cancelled leaves; the others never notice.

Agreement: a member's losses are those of the inline backend to 1e-10 in float64 over 40 steps, and to about 1e-5 in float32
(Adam amplifies rounding where gradients vanish, so that single weights may drift further; ranks follow the metrics). A network
that draws random numbers gets other draws than it would alone, from the same distribution.

What cannot be stacked, or would not be faster, runs one after another as inline does; :meth:`StackedBackend.notes` says which
trials, and why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from automode.backends.base import (
    Note,
    Segment,
    SegmentDone,
    SegmentFailed,
    SegmentJob,
    SegmentRunner,
    StackableSegment,
    note,
    without_resources,
)
from automode.backends.inline import IN_PROCESS, NOT_RETRYABLE, InlineBackend
from automode.backends.stackability import likeness, why_alone, why_network_alone, why_variant_alone
from automode.backends.stacked_gradients import Graphs
from automode.backends.stacked_group import ALONE, StackedGroup

SLOTS = 16
KEPT_NOTES = 256

Key = tuple[str, int, int]


class StackedBackend:
    """Trains alike segments together in the calling thread, and others one after another.

    Args:
        runner: Makes the segments; those that are no :class:`~automode.backends.base.StackableSegment` run alone.
        slots: Segments taken at once, and members of a group at the most.
        compiles: Whether a graph may be compiled where a rung is long enough to repay it (a minute of compiling at most).
    """

    def __init__(self, runner: SegmentRunner, *, slots: int = SLOTS, compiles: bool = True) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}, but must be at least 1")
        self._slots = slots
        self._compiles = compiles
        self._handed = _Handed(runner)
        self._inline = InlineBackend(self._handed)
        self._runner = runner
        self._queue: deque[SegmentJob] = deque()
        self._group: StackedGroup | None = None
        self._graphs = Graphs()
        self._credit = 0.0
        self._never: tuple[str, str] | None = None
        self._notes: deque[Note] = deque(maxlen=KEPT_NOTES)

    @property
    def slots(self) -> int:
        """How many segments it takes at once."""
        return self._slots

    @property
    def busy(self) -> bool:
        """Whether any segment is queued or running."""
        return bool(self._queue) or self._group is not None or self._inline.busy

    def notes(self) -> list[Note]:
        """Return what is worth saying since the last call: who runs alone, and why."""
        found = list(self._notes)
        self._notes.clear()
        return found

    @property
    def why_no_resources(self) -> str | None:
        """Nothing can be given to one trial alone."""
        return IN_PROCESS

    def submit(self, job: SegmentJob) -> None:
        """Take a job; it starts at a coming pump, with all that were submitted until then.

        Raises:
            NotExecutableError: It asks for resources of its own.
        """
        self._queue.append(without_resources(job, self.why_no_resources))

    def cancel(self, card: str, trial: int, attempt: int) -> float:
        """Drop a job wherever it is; returns the sample passes that it had spent. Its group goes on without it."""
        key = (card, trial, attempt)
        self._queue = deque(job for job in self._queue if job.key != key)
        if self._group is not None:
            for segment in self._group.segments:
                if segment.job.key == key:
                    self._group.remove(segment)
                    self._end_group()
                    return segment.passes
        waiting = self._handed.opened.pop(key, None)
        return max(self._inline.cancel(card, trial, attempt), 0.0 if waiting is None else waiting.passes)

    def pump(self, trunk_steps: int) -> list[SegmentDone | SegmentFailed]:
        """Train for the share of so many trunk steps; report whatever has reached its rung or failed."""
        results: list[SegmentDone | SegmentFailed] = []
        if self._group is None and not self._inline.busy:
            self._credit = 0.0
            self._gather(results)
        if self._group is None:
            return [*results, *self._inline.pump(trunk_steps)]
        self._credit += trunk_steps * self._group.segments[0].job.per_trunk_step
        progress = self._group.advance(self._credit)
        self._credit -= progress.spent
        results += [self._failed(segment.job, error, segment.passes) for segment, error in progress.failed]
        results += [self._finished(segment) for segment in progress.ended]
        for segment in progress.alone:
            self._hand_over(segment)
        self._end_group()
        return results

    def close(self) -> None:
        """Give up everything."""
        self._queue.clear()
        self._handed.opened.clear()
        self._inline.close()
        self._group = None
        self._graphs = Graphs()

    # Gathering.

    def _gather(self, results: list[SegmentDone | SegmentFailed]) -> None:
        """Make a group of what waits; what cannot be in it is handed to the inline backend."""
        open_segments: list[StackableSegment] = []
        first: object = None
        later: deque[SegmentJob] = deque()
        while self._queue:
            job = self._queue.popleft()
            if open_segments and (
                len(open_segments) >= self._slots or _way(job) != _way(open_segments[0].job)
            ):
                later.append(job)
                continue
            segment = self._opened(job, results)
            if segment is None:
                continue
            alike = likeness(segment)
            if open_segments and alike != first:
                self._alone([segment], "its network or optimizer is unlike the others'")
                continue
            first = alike
            open_segments.append(segment)
        self._queue = later
        if len(open_segments) > 1:
            self._group = StackedGroup(open_segments, self._graphs, self._tell, compiles=self._compiles)
        elif open_segments:
            self._alone(open_segments, "no other trial is like it")

    def _opened(self, job: SegmentJob, results: list[SegmentDone | SegmentFailed]) -> StackableSegment | None:
        """Open a segment that can be stacked; others go to the inline backend, which opens them in their turn."""
        never = self._never[1] if self._never is not None and self._never[0] == job.base else None
        why = why_variant_alone(job) or never
        if why is not None:
            self._tell_jobs([job], ALONE, why)
            self._inline.submit(job)
            return None
        try:
            segment = self._runner.open(job)
        except Exception as error:
            results.append(self._failed(job, error, 0.0))
            return None
        if not isinstance(segment, StackableSegment):
            why = never = "its segments cannot be taken apart into steps"
        else:
            never = why_network_alone(segment.model)
            why = why_alone(segment)
        if (
            never is not None
        ):  # no other trial from there will fare better: do not open them before their turn
            self._never = (job.base, never)
        if why is not None:
            self._tell_jobs([job], ALONE, why)
            self._handed.opened[job.key] = segment
            self._inline.submit(job)
            return None
        assert isinstance(segment, StackableSegment)
        return segment

    def _alone(self, segments: Sequence[StackableSegment], why: str) -> None:
        self._tell(segments, ALONE, why)
        for segment in segments:
            self._hand_over(segment)

    def _hand_over(self, segment: StackableSegment) -> None:
        self._handed.opened[segment.job.key] = segment
        self._inline.submit(segment.job)

    def _end_group(self) -> None:
        if self._group is not None and not self._group.segments:
            self._group = None
            self._credit = 0.0

    # Ending.

    def _finished(self, segment: StackableSegment) -> SegmentDone | SegmentFailed:
        try:
            return segment.finish()
        except Exception as error:
            return self._failed(segment.job, error, segment.passes)

    def _failed(self, job: SegmentJob, error: Exception, passes: float) -> SegmentFailed:
        return SegmentFailed(
            job=job,
            error=f"{type(error).__name__}: {error}"[:2000],
            retryable=not isinstance(error, NOT_RETRYABLE),
            passes=passes,
        )

    def _tell(self, segments: Sequence[StackableSegment], what: str, why: str) -> None:
        self._tell_jobs([segment.job for segment in segments], what, why)

    def _tell_jobs(self, jobs: Sequence[SegmentJob], what: str, why: str) -> None:
        if jobs:
            self._notes.append(note(jobs, what, why))


class _Handed:
    """The inline backend's runner: a segment that is open already is handed over, others are opened."""

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner = runner
        self.opened: dict[Key, Segment] = {}

    def open(self, job: SegmentJob) -> Segment:
        """Give a segment."""
        ready = self.opened.pop(job.key, None)
        return ready if ready is not None else self._runner.open(job)


def _way(job: SegmentJob) -> object:
    """What jobs must share to go together: the card, where it starts from, and both ends of the way."""
    return (job.card, job.base, job.from_resource, job.to_resource, job.top_resource)
