"""Deterministic mode: decisions that depend on the reported values and the number of slots, never on real speed.

Segments get virtual durations, namely their resource steps, on W virtual slots. Outcomes are applied in the order of
(virtual completion, issue), each held back until all before it have arrived. Real workers may be fewer or more than W
and finish in any order: the same seed and values give the same decisions, bit for bit. The price is waiting, bounded
by the ratio of the slowest to the typical worker. A failed segment that is tried again keeps its place in virtual
time, so that a crash leaves no trace in the decisions either (a trial given up for good does, as it must, and so
does a budget that the repeats eat into).
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Strict, ValidationError

from automode.errors import SchedulerError, UsageError
from automode.scheduler.asha import ASHA
from automode.scheduler.decisions import (
    Best,
    Decision,
    Diverged,
    Failure,
    Finished,
    Held,
    Ignored,
    Job,
    Lost,
    Outcome,
    Paused,
    Stopped,
    decode_value,
    encode_value,
)
from automode.scheduler.ladder import whole
from automode.scheduler.protocol import metric
from automode.scheduler.rung import Value


class _Arrived(NamedTuple):
    """What came back for a segment and is not applied yet: a value, or a failure with its cause."""

    value: Value
    lost: str | None


class _Slot(NamedTuple):
    """A segment on a virtual slot, ordered by completion, then by issue."""

    finish: int
    number: int
    job: Job


class Lockstep:
    """An :class:`~automode.scheduler.asha.ASHA` whose decisions do not depend on who finishes first.

    Use it in place of the scheduler; its face is the same. :meth:`take_decisions` gives the decisions in the order in
    which they were made, which is what belongs into a log.

    Args:
        asha: The scheduler; nothing of it may be in flight. It must not be used directly from then on.
        slots: Number of virtual slots W, usually the number of workers. Part of what fixes the decisions.

    Raises:
        UsageError: ``slots`` is no whole number >= 1, or the scheduler has segments in flight.
    """

    __slots__ = ("_arrived", "_asha", "_decisions", "_now", "_number", "_outbox", "_running", "slots")

    def __init__(self, asha: ASHA, *, slots: int) -> None:
        self.slots = whole("slots", slots, least=1)
        if asha.in_flight:
            raise UsageError(
                f"the scheduler has {asha.in_flight} segments in flight: take it over when it is idle"
            )
        self._asha = asha
        self._now = 0
        self._number = 0
        self._running: list[_Slot] = []
        self._outbox: deque[Job] = deque()
        self._arrived: dict[int, _Arrived] = {}
        self._decisions: list[Decision] = []

    # What it is asked and told.

    def next(self) -> Job | None:
        """Give the next segment to train, or ``None`` when there is nothing to do for now."""
        self._advance()
        return self._outbox.popleft() if self._outbox else None

    def report(self, trial: int, resource: int, value: object, attempt: int | None = None) -> Outcome | Held:
        """Take the metric that a segment reached; see :meth:`ASHA.report`.

        Returns:
            What follows for this trial, or ``Held`` while earlier segments are missing.

        Raises:
            SchedulerError: No such job was handed out, or another value was already reported for it.
            UsageError: An argument is not a number of its kind.
        """
        number = metric(value)
        ignored = self._asha.screen(trial, resource, number, attempt)
        if ignored is not None:
            return ignored
        job = self._handed_out(trial)
        waiting = self._arrived.get(trial)
        if waiting is not None:
            if waiting.lost is not None:
                reason = f"trial {trial} to {resource}: attempt {job.attempt} was declared failed before it reported"
            elif encode_value(waiting.value) == encode_value(number):
                reason = f"trial {trial} to {resource}: the same value was reported before"
            else:
                raise SchedulerError(
                    f"trial {trial} to {resource}, attempt {job.attempt}: {number} was reported after {waiting.value};"
                    " one segment has one value"
                )
            return Ignored(trial=trial, resource=resource, attempt=attempt, reason=reason)
        self._arrived[trial] = _Arrived(number, None)
        for decision in self._advance():
            if isinstance(decision, Paused | Finished | Diverged) and decision.trial == trial:
                return decision
        return Held(trial=trial, resource=resource, attempt=job.attempt)

    def failed(
        self,
        trial: int,
        attempt: int | None = None,
        *,
        resource: int | None = None,
        retryable: bool = True,
        cause: str = "failed",
    ) -> Failure | Held:
        """Take note that a segment broke off; see :meth:`ASHA.failed`.

        Returns:
            ``Requeued``, ``Ignored``, ``Lost``, or ``Held`` when the trial is given up at its place in virtual time.

        Raises:
            SchedulerError: No such job was handed out.
        """
        ignored = self._asha.screen_failure(trial, attempt, resource=resource)
        if ignored is not None:
            return ignored
        job = self._handed_out(trial)
        if trial in self._arrived:
            reason = f"trial {trial} to {job.to_resource}: its outcome arrived before this failure"
            return Ignored(trial=trial, resource=job.to_resource, attempt=attempt, reason=reason)
        if retryable and self._asha.can_retry(trial):
            requeued = self._asha.failed(trial, attempt, cause=cause)
            issue = self._asha.decide()  # repeats come first, and no other one is waiting
            assert issue is not None, "a requeued segment was not issued"
            assert issue.job.trial == trial, "another segment was issued in place of the requeued one"
            self._running = [
                slot._replace(job=issue.job) if slot.job.trial == trial else slot for slot in self._running
            ]
            self._outbox.appendleft(issue.job)
            self._decisions += [requeued, issue]
            return requeued
        self._arrived[trial] = _Arrived(None, cause)
        for decision in self._advance():
            if isinstance(decision, Lost) and decision.trial == trial:
                return decision
        return Held(trial=trial, resource=job.to_resource, attempt=job.attempt)

    def stop(self, trial: int, cause: str = "on request") -> Stopped | Ignored:
        """Stop a trial at once; see :meth:`ASHA.stop`. What a person does has no place in virtual time.

        Raises:
            SchedulerError: The trial was never started.
        """
        decision = self._asha.stop(trial, cause)
        if isinstance(decision, Stopped):
            self._running = [slot for slot in self._running if slot.job.trial != trial]
            heapify(self._running)
            self._outbox = deque(job for job in self._outbox if job.trial != trial)
            self._arrived.pop(trial, None)
            self._decisions.append(decision)
            self._advance()
        return decision

    def close(self) -> None:
        """Start no further candidates; what was started is drained to the top rung."""
        self._asha.close()
        self._advance()

    def cancel(self) -> None:
        """Issue nothing any more and ignore what still comes in."""
        self._asha.cancel()
        self._running.clear()
        self._outbox.clear()
        self._arrived.clear()

    def take_decisions(self) -> list[Decision]:
        """Hand over the decisions made since the last call, in their order. They are no part of :meth:`to_state`."""
        taken, self._decisions = self._decisions, []
        return taken

    # What it knows.

    @property
    def asha(self) -> ASHA:
        """The scheduler underneath, for reading."""
        return self._asha

    @property
    def finished(self) -> bool:
        """Whether nothing is in flight and nothing will ever be issued again."""
        return self._asha.finished

    def running(self) -> list[Job]:
        """List the segments that were handed out and have not come back: after a crash, each of them has failed."""
        outside = {slot.job for slot in self._running} - set(self._outbox)
        return sorted(job for job in outside if job.trial not in self._arrived)

    @property
    def virtual_time(self) -> int:
        """Virtual time of the latest outcome applied, in resource steps."""
        return self._now

    @property
    def digest(self) -> str:
        """SHA-256 over all decisions in their order."""
        return self._asha.digest

    def best(self) -> Best | None:
        """Give the best trial so far; see :meth:`ASHA.best`."""
        return self._asha.best()

    # The virtual clock.

    def _advance(self) -> list[Decision]:
        """Fill the virtual slots and apply every outcome whose turn has come."""
        made: list[Decision] = []
        while True:
            while len(self._running) < self.slots and (issue := self._asha.decide()) is not None:
                job = issue.job
                self._number += 1
                heappush(
                    self._running, _Slot(self._now + job.to_resource - job.from_resource, self._number, job)
                )
                self._outbox.append(job)
                made.append(issue)
            if not self._running or self._running[0].job.trial not in self._arrived:
                self._decisions += made
                return made
            slot = heappop(self._running)
            self._now = slot.finish
            made.append(self._apply(slot.job, self._arrived.pop(slot.job.trial)))

    def _apply(self, job: Job, arrived: _Arrived) -> Outcome | Failure:
        if arrived.lost is not None:
            return self._asha.failed(job.trial, job.attempt, retryable=False, cause=arrived.lost)
        return self._asha.report(job.trial, job.to_resource, arrived.value, job.attempt)

    def _handed_out(self, trial: int) -> Job:
        if any(job.trial == trial for job in self._outbox):
            raise SchedulerError(
                f"trial {trial} was never handed out in this attempt: nothing of it can come back"
            )
        return next(slot.job for slot in self._running if slot.job.trial == trial)

    # Its state as a value.

    def to_state(self) -> dict[str, Any]:
        """Give the whole state, the scheduler's included, as plain data that strict JSON can hold."""
        return {
            "version": 1,
            "slots": self.slots,
            "now": self._now,
            "number": self._number,
            "running": [[slot.finish, slot.number, *slot.job] for slot in sorted(self._running)],
            "outbox": [list(job) for job in self._outbox],
            "arrived": [
                [trial, encode_value(each.value), each.lost] for trial, each in sorted(self._arrived.items())
            ],
            "asha": self._asha.to_state(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Lockstep:
        """Rebuild it from :meth:`to_state`; it decides the same from there on.

        Raises:
            SchedulerError: The state is no such value, or contradicts itself.
        """
        try:
            read = _LockstepState.model_validate(state)
            slots = whole("slots", read.slots, least=1)
        except (ValidationError, UsageError) as error:
            raise SchedulerError(f"this is no lockstep state that this version can read: {error}") from error
        lockstep = cls.__new__(cls)
        lockstep.slots = slots
        lockstep._restore(read)  # noqa: SLF001 - its own class
        return lockstep

    def _restore(self, read: _LockstepState) -> None:
        self._asha = ASHA.from_state(read.asha)
        self._now, self._number = read.now, read.number
        self._running = [_Slot(finish, number, Job(*job)) for finish, number, *job in read.running]
        heapify(self._running)
        self._outbox = deque(Job(*job) for job in read.outbox)
        self._arrived = {trial: _Arrived(decode_value(value), lost) for trial, value, lost in read.arrived}
        self._decisions = []
        jobs = [slot.job for slot in self._running]
        known = set(self._outbox) <= set(jobs) and self._arrived.keys() <= {job.trial for job in jobs}
        expected = [] if self._asha.cancelled else self._asha.running()
        if not known or sorted(jobs) != expected or len(jobs) > self.slots:
            raise SchedulerError(
                "the lockstep state contradicts itself: its slots are not the scheduler's segments"
            )


class _LockstepState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1]
    slots: int
    now: int
    number: int
    running: list[Annotated[tuple[int, int, int, int, int, int], Strict(False)]]  # JSON has lists only
    outbox: list[Annotated[tuple[int, int, int, int], Strict(False)]]
    arrived: list[
        Annotated[tuple[int, float | Literal["nan", "inf", "-inf"] | None, str | None], Strict(False)]
    ]
    asha: dict[str, Any]
