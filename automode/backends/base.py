"""Who runs a segment of a trial, and where: the contract between the scheduler's jobs and whatever trains them.

A *segment* takes one trial from one rung to the next. The backend receives a :class:`SegmentRunner` by injection and
never imports the trainer; it decides only when and where the runner's work happens. ``pump`` is called in the training
thread at step boundaries and returns what has ended since.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from automode.planner.recipes import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentJob:
    """One segment to train.

    Attributes:
        card: Id of the plan card.
        trial: Number of the trial within the card, from 0.
        attempt: Attempt at this segment, from 1; an older attempt's result is ignored by the scheduler.
        variant: How to train.
        base: Digest of the trunk's snapshot that the card started from.
        checkpoint: Digest that this segment starts from (the base, or the trial's last rung).
        from_resource: Resource steps already trained.
        to_resource: Resource steps at the end of the segment; a resource step is one ordinary training step's cost.
        top_resource: The top rung, which schedules end at.
        per_trunk_step: Resource steps to train for each step of the trunk.
    """

    card: str
    trial: int
    attempt: int
    variant: Variant
    base: str
    checkpoint: str
    from_resource: int
    to_resource: int
    top_resource: int
    per_trunk_step: float

    @property
    def key(self) -> tuple[str, int, int]:
        """What a cancellation names."""
        return (self.card, self.trial, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentDone:
    """A segment that reached its rung: the candidate's held-out value (higher is better) and its durable checkpoint."""

    job: SegmentJob
    value: float
    choice: str
    checkpoint: str
    passes: float
    stopped_early: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFailed:
    """A segment that ended without a value. ``retryable`` is false where the same work would fail the same way."""

    job: SegmentJob
    error: str
    retryable: bool
    passes: float


class Segment(Protocol):
    """A segment in progress."""

    def advance(self, resource: float) -> bool:
        """Train for at most so many resource steps; True when the rung is reached."""
        ...

    def finish(self) -> SegmentDone:
        """Evaluate, save and report. Called once, after ``advance`` returned True."""
        ...

    @property
    def passes(self) -> float:
        """Sample passes spent so far."""
        ...


class SegmentRunner(Protocol):
    """Makes segments; injected by the trainer."""

    def open(self, job: SegmentJob) -> Segment:
        """Load the checkpoint and prepare to train."""
        ...


class Backend(Protocol):
    """Runs segments. One conformance suite covers every implementation."""

    @property
    def slots(self) -> int:
        """How many segments run at once."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any segment is queued or running."""
        ...

    def submit(self, job: SegmentJob) -> None:
        """Take a job and return at once."""
        ...

    def cancel(self, card: str, trial: int, attempt: int) -> float:
        """Give up a job; nothing is reported for it. Returns the sample passes that it had spent."""
        ...

    def pump(self, trunk_steps: int) -> list[SegmentDone | SegmentFailed]:
        """Let work happen for so many trunk steps' worth of time slices; return what has ended."""
        ...

    def close(self) -> None:
        """Give up everything and free what is held."""
        ...
