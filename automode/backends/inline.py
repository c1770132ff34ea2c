"""The inline backend: segments run in the training process, in time slices between the trunk's steps.

One segment at a time. The trunk's weights, optimizer and random state are untouched because the runner works on its
own copies inside a forked random state. An error in a segment fails that segment, never the run.
"""

from __future__ import annotations

from collections import deque

from automode.backends.base import (
    Note,
    Segment,
    SegmentDone,
    SegmentFailed,
    SegmentJob,
    SegmentRunner,
    without_resources,
)

NOT_RETRYABLE = (MemoryError, NotImplementedError, TypeError, ValueError)
"""Errors that the same work would raise again."""


IN_PROCESS = "trials train in the training process, with what that has"


class InlineBackend:
    """Runs one segment at a time in the calling thread.

    Args:
        runner: Makes the segments.
    """

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner = runner
        self._queue: deque[SegmentJob] = deque()
        self._job: SegmentJob | None = None
        self._segment: Segment | None = None
        self._credit = 0.0

    @property
    def slots(self) -> int:
        """One."""
        return 1

    @property
    def busy(self) -> bool:
        """Whether any segment is queued or running."""
        return self._job is not None or bool(self._queue)

    @property
    def why_no_resources(self) -> str | None:
        """Nothing can be given to one trial alone."""
        return IN_PROCESS

    def submit(self, job: SegmentJob) -> None:
        """Queue a job behind the running one.

        Raises:
            NotExecutableError: It asks for resources of its own.
        """
        self._queue.append(without_resources(job, self.why_no_resources))

    def cancel(self, card: str, trial: int, attempt: int) -> float:
        """Drop a queued or running job; returns the sample passes that it had spent."""
        if self._job is not None and self._job.key == (card, trial, attempt):
            spent = self._segment.passes if self._segment is not None else 0.0
            self._clear()
            return spent
        self._queue = deque(j for j in self._queue if j.key != (card, trial, attempt))
        return 0.0

    def pump(self, trunk_steps: int) -> list[SegmentDone | SegmentFailed]:
        """Train the current segment for its share of ``trunk_steps``; report it when it reaches its rung."""
        if self._job is None:
            if not self._queue:
                return []
            self._job = self._queue.popleft()
            self._credit = 0.0
        job = self._job
        self._credit += trunk_steps * job.per_trunk_step
        try:
            if self._segment is None:
                self._segment = self._runner.open(job)
            credit, self._credit = self._credit, 0.0
            if not self._segment.advance(credit):
                return []
            done = self._segment.finish()
        except Exception as error:
            spent = self._segment.passes if self._segment is not None else 0.0
            self._clear()
            text = f"{type(error).__name__}: {error}"
            return [
                SegmentFailed(
                    job=job, error=text[:2000], retryable=not isinstance(error, NOT_RETRYABLE), passes=spent
                )
            ]
        self._clear()
        return [done]

    def notes(self) -> list[Note]:
        """None: every trial trains as every other."""
        return []

    def close(self) -> None:
        """Give up everything."""
        self._queue.clear()
        self._clear()

    def _clear(self) -> None:
        self._job = None
        self._segment = None
        self._credit = 0.0
