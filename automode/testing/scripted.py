"""Segments that train nothing: each does what its script says, so that a backend can be tested without a model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from automode.backends.base import SegmentDone, SegmentJob
from automode.planner.recipes import Variant

Place = Literal["never", "open", "advance", "finish"]

PASSES_PER_RESOURCE = 30.0
"""Sample passes that one resource step of a scripted segment costs."""

DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What the segments of one trial do.

    Attributes:
        value: Held-out value that is reported.
        fails: Where an error is raised: when the segment is opened, half-way through its training, or when it is judged.
        error: The error.
        attempts: Attempts that fail; later ones succeed.
        seconds: How long one resource step takes.
    """

    value: float = 0.5
    fails: Place = "never"
    error: Exception = field(default_factory=lambda: RuntimeError("scripted"))
    attempts: int = 1_000_000
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedRunner:
    """Opens scripted segments; plain data, so that it can be sent to another process.

    Attributes:
        scripts: By trial; a trial without one succeeds.
    """

    scripts: Mapping[int, Script] = field(default_factory=dict)

    def open(self, job: SegmentJob) -> ScriptedSegment:
        """Open a segment, or fail as its script says."""
        script = self.scripts.get(job.trial, Script())
        if script.fails == "open" and job.attempt <= script.attempts:
            raise script.error
        return ScriptedSegment(job, script)


class ScriptedSegment:
    """A segment that counts instead of training.

    Args:
        job: The job.
        script: What happens.
    """

    def __init__(self, job: SegmentJob, script: Script) -> None:
        self._job = job
        self._script = script
        self._trained = 0.0

    @property
    def passes(self) -> float:
        """Sample passes spent so far."""
        return self._trained * PASSES_PER_RESOURCE

    def advance(self, resource: float) -> bool:
        """Count on by at most so many resource steps; True when the rung is reached."""
        length = self._job.to_resource - self._job.from_resource
        before, self._trained = self._trained, min(float(length), self._trained + resource)
        if self._script.seconds:
            time.sleep(self._script.seconds * (self._trained - before))
        if self._fails("advance") and self._trained >= length / 2:
            raise self._script.error
        return self._trained >= length

    def finish(self) -> SegmentDone:
        """Report what the script says."""
        if self._fails("finish"):
            raise self._script.error
        return SegmentDone(
            job=self._job,
            value=self._script.value,
            choice="raw",
            checkpoint=DIGEST,
            passes=self.passes,
            stopped_early=False,
            seconds=0.0,
        )

    def _fails(self, where: str) -> bool:
        return self._script.fails == where and self._job.attempt <= self._script.attempts


def scripted_job(trial: int = 0, *, attempt: int = 1, start: int = 0, end: int = 6) -> SegmentJob:
    """Make a job for a scripted segment of ``end - start`` resource steps, one for each step of the trunk."""
    return SegmentJob(
        card="c0ffee00",
        trial=trial,
        attempt=attempt,
        variant=Variant(name=f"variant{trial}"),
        base=DIGEST,
        checkpoint=DIGEST,
        from_resource=start,
        to_resource=end,
        top_resource=max(end, 54),
        per_trunk_step=1.0,
    )
