"""Segments away from the training process: what a worker is given, and how it takes a segment to its rung.

A worker gets a :class:`RunnerFactory` once, when it starts, and then jobs. A job names checkpoints by digest; what else
has changed in the run since the factory was made (the card's sample ids, say) travels with it as its *brief*.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from automode.backends.base import Segment, SegmentDone, SegmentFailed, SegmentJob, SegmentRunner
from automode.backends.inline import NOT_RETRYABLE

SLICE_SECONDS = 0.05
"""How long a worker trains between two looks at whether its job is still wanted."""

LONGEST_ERROR = 2000


class RemoteRunner(Protocol):
    """Makes segments inside a worker."""

    def open(self, job: SegmentJob, brief: Any) -> Segment:
        """Load the job's checkpoint and prepare to train."""
        ...


class RunnerFactory(Protocol):
    """Makes a worker's runner. Making it (or unpickling it) touches no accelerator; calling it may."""

    def __call__(self, checkpoints: str | None) -> RemoteRunner:
        """Make the runner, in the worker.

        Args:
            checkpoints: Folder of the checkpoints on this machine; None: the session's own.
        """
        ...


BriefOf: TypeAlias = Callable[[SegmentJob], Any]
"""Gives, in the training process, what a job's worker must know beside the job: plain data that can be pickled."""


def no_brief(job: SegmentJob) -> None:
    """Say nothing beside the job."""


@dataclass(frozen=True, slots=True)
class _Unbriefed:
    runner: SegmentRunner

    def open(self, job: SegmentJob, brief: Any) -> Segment:
        return self.runner.open(job)


@dataclass(frozen=True, slots=True)
class ReadyMade:
    """The factory of a runner that exists already: every worker gets a copy of it as it is now.

    Attributes:
        runner: Plain data, or whatever a forked process may inherit.
    """

    runner: SegmentRunner

    def __call__(self, checkpoints: str | None) -> RemoteRunner:
        """Give the runner; it has its own checkpoints."""
        return _Unbriefed(self.runner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A segment given up because nobody wants it any more, and the sample passes that it had spent."""

    passes: float


def run_segment(
    runner: RemoteRunner, job: SegmentJob, brief: Any, go_on: Callable[[float], bool]
) -> SegmentDone | SegmentFailed | Dropped:
    """Train a segment to its rung, in slices of about :data:`SLICE_SECONDS`.

    Args:
        runner: Makes the segment.
        job: The job.
        brief: What came with it.
        go_on: Told the sample passes spent after every slice; False gives the segment up.
    """
    segment: Segment | None = None
    try:
        segment = runner.open(job, brief)
        resource, over = 1.0, False
        while not over:
            started = time.perf_counter()
            over = segment.advance(resource)
            if not go_on(segment.passes):
                return Dropped(passes=segment.passes)
            spent = time.perf_counter() - started
            resource = max(1.0, min(resource * 2.0, resource * SLICE_SECONDS / max(spent, 1e-6)))
        return segment.finish()
    except Exception as error:  # whatever it is, it fails this segment and no other
        return failure(job, error, segment.passes if segment is not None else 0.0)


def failure(job: SegmentJob, error: Exception, passes: float) -> SegmentFailed:
    """Report an error that a segment raised."""
    return SegmentFailed(
        job=job,
        error=f"{type(error).__name__}: {error}"[:LONGEST_ERROR],
        retryable=not isinstance(error, NOT_RETRYABLE),
        passes=passes,
    )


def lost(job: SegmentJob, why: str, passes: float) -> SegmentFailed:
    """Report a segment whose worker was lost: another attempt may end well."""
    return SegmentFailed(job=job, error=why[:LONGEST_ERROR], retryable=True, passes=passes)


def refused(job: SegmentJob, why: str) -> SegmentFailed:
    """Report a segment that no worker can be had for."""
    return SegmentFailed(job=job, error=why[:LONGEST_ERROR], retryable=False, passes=0.0)
