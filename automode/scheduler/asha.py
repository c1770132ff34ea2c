"""Asynchronous successive halving by promotion, as a pure state machine.

The algorithm is ASHA (Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020): a free worker
gets the promotion that is due at the highest rung, or else a new candidate. Added to it: a drain rule, so that a
finite list always ends with a fully trained trial; retries from the rung's checkpoint; values that cannot be ranked;
a spending cap; exact ranks with ties to the earlier report.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from automode.errors import SchedulerError
from automode.scheduler.asha_state import dump, load
from automode.scheduler.board import Board
from automode.scheduler.bracket import RungView
from automode.scheduler.collection import collectable
from automode.scheduler.decisions import Best, Failure, Ignored, Issue, Job, Lost, Outcome, Requeued, Stopped
from automode.scheduler.ladder import Ladder, whole
from automode.scheduler.protocol import known, metric, screen_failure, screen_report
from automode.scheduler.settings import Mode, Settings
from automode.scheduler.trials import IN_FLIGHT, Status


class ASHA:
    """Asynchronous successive halving: says which trial trains next, and to which resource.

    No clock, no I/O, no random draw: the same calls in the same order give the same decisions, so a log of the calls
    replays a run. Whoever trains calls :meth:`next`, trains the job's segment, and answers with :meth:`report` or
    :meth:`failed`. Every decision costs O(log n) comparisons. With several workers the decisions depend on who comes
    back first; :class:`~automode.scheduler.lockstep.Lockstep` takes that out.

    Args:
        min_resource: The first rung (r in the paper), in resource steps.
        max_resource: The last rung (R).
        reduction_factor: One trial in this many goes on from each rung (eta).
        mode: ``"min"`` when smaller values are better, ``"max"`` when larger ones are.
        candidates: How many candidates there are; ``None`` for an endless source (see :meth:`close`).
        seed: Fixes brackets and :meth:`trial_seed`; a whole number >= 0.
        quota: Never promote more than floor(size / eta) from a rung. Without it (the paper's rule) a trial promoted
            early and overtaken later counts on top. Bounds the cost tightly, at some loss of quality.
        brackets: Number of Hyperband brackets; bracket b starts at rung b.
        max_attempts: Tries of one segment before its trial is given up.
        budget: Cap on the resource steps of all segments issued, repeats included; ``None`` for no cap. A segment is
            only issued if enough is left afterwards to bring the leading trial to ``max_resource``.

    Raises:
        UsageError: An argument cannot be taken.

    Example:
        >>> asha = ASHA(1, 4, 2, candidates=2)
        >>> while (job := asha.next()) is not None:
        ...     outcome = asha.report(job.trial, job.to_resource, value=float(job.trial), attempt=job.attempt)
        >>> asha.best()
        Best(trial=0, resource=4, value=0.0)
    """

    __slots__ = ("_board",)

    def __init__(
        self,
        min_resource: int,
        max_resource: int,
        reduction_factor: int,
        mode: Mode = "min",
        candidates: int | None = None,
        seed: int = 0,
        quota: bool = False,
        brackets: int = 1,
        *,
        max_attempts: int = 3,
        budget: int | None = None,
    ) -> None:
        self._board = Board(
            Settings(
                ladder=Ladder(min_resource, max_resource, reduction_factor),
                mode=mode,
                candidates=candidates,
                seed=seed,
                quota=quota,
                brackets=brackets,
                max_attempts=max_attempts,
                budget=budget,
            )
        )

    # What it is asked and told.

    def next(self, *, prefer: int | None = None) -> Job | None:
        """Give the next segment to train, or ``None`` when there is nothing to do for now (see :attr:`finished`).

        Args:
            prefer: A trial whose weights the asking worker still holds: if that trial may be promoted at all, it goes
                on in place, which saves storing and restoring it.
        """
        issue = self.decide(prefer=prefer)
        return None if issue is None else issue.job

    def decide(self, *, prefer: int | None = None) -> Issue | None:
        """Do what :meth:`next` does, and say which rule led there."""
        move = self._board.choose(prefer)
        return None if move is None else self._board.make(move)

    def report(self, trial: int, resource: int, value: object, attempt: int | None = None) -> Outcome:
        """Take the metric that a segment reached at its rung.

        Args:
            trial: The job's trial.
            resource: Resource at which the value was measured. Values between the segment's ends are logs and are
                ignored; beyond the segment's end they are refused.
            value: The metric as measured. NaN, infinite or ``None`` counts in the rung and is never promoted.
            attempt: The job's attempt; ``None`` for the latest one.

        Returns:
            What follows for this trial. A repeated identical report, one of an old attempt, and one of a stopped
            trial are ``Ignored``.

        Raises:
            SchedulerError: No such job was issued, or another value was already reported for it.
            UsageError: An argument is not a number of its kind.
        """
        number = metric(value)
        ignored = screen_report(self._board, trial, whole("resource", resource, least=0), number, attempt)
        return ignored if ignored is not None else self._board.record(trial, number)

    def screen(self, trial: int, resource: int, value: object, attempt: int | None = None) -> Ignored | None:
        """Judge a report as :meth:`report` would, without taking it; ``None`` means that it counts.

        Raises:
            SchedulerError: As :meth:`report`.
            UsageError: As :meth:`report`.
        """
        return screen_report(self._board, trial, whole("resource", resource, least=0), metric(value), attempt)

    def screen_failure(
        self, trial: int, attempt: int | None = None, *, resource: int | None = None
    ) -> Ignored | None:
        """Judge a failure as :meth:`failed` would, without taking it; ``None`` means that it counts.

        Raises:
            SchedulerError: As :meth:`failed`.
        """
        return screen_failure(self._board, trial, attempt, resource)

    def failed(
        self,
        trial: int,
        attempt: int | None = None,
        *,
        resource: int | None = None,
        retryable: bool = True,
        cause: str = "failed",
        spent: int | None = None,
    ) -> Failure:
        """Take note that a segment broke off without a value.

        Args:
            trial: The job's trial.
            attempt: The job's attempt; ``None`` for the latest one.
            resource: The job's ``to_resource``. Attempts are counted anew for every segment, so a message that may come
                late has to say which one it means; ``None`` for the latest.
            retryable: ``False`` when the same segment would fail the same way (out of memory).
            cause: A few words for the log.
            spent: Resource steps that the broken segment really trained; the rest of its cost returns to the budget.
                ``None`` when unknown: all of it counts.

        Returns:
            ``Requeued`` (a later :meth:`next` repeats it from the rung's checkpoint), ``Lost`` (the trial is withdrawn
            from every rung, so that it takes up no promotion), or ``Ignored``.

        Raises:
            SchedulerError: No such job was issued.
        """
        board = self._board
        ignored = screen_failure(board, trial, attempt, resource)
        if ignored is not None:
            return ignored
        record = board.trials[trial]
        target = board.ladder.levels[record.target]
        if spent is not None:
            board.spent -= max(0, board.cost(record) - whole("spent", spent, least=0))
        if retryable and self.can_retry(trial):
            board.requeue(trial)
            return Requeued(trial=trial, resource=target, attempt=record.attempt, cause=cause)
        board.withdraw(trial, Status.LOST)
        return Lost(trial=trial, resource=target, attempt=record.attempt, cause=cause)

    def can_retry(self, trial: int) -> bool:
        """Tell whether a running segment would be repeated if it failed now.

        Raises:
            SchedulerError: The trial was never started.
        """
        record = known(self._board, trial)
        attempts_left = record.attempt < self._board.settings.max_attempts
        return attempts_left and self._board.affordable(self._board.cost(record), record.target)

    def stop(self, trial: int, cause: str = "on request") -> Stopped | Ignored:
        """Stop a trial: it competes in no rung any more, and a late report of it is ignored.

        Raises:
            SchedulerError: The trial was never started.
        """
        record = known(self._board, trial)
        if record.status not in (*IN_FLIGHT, Status.PAUSED):
            reason = f"trial {trial} is {record.status.value} already"
            return Ignored(trial=trial, resource=None, attempt=None, reason=reason)
        self._board.withdraw(trial, Status.STOPPED)
        return Stopped(trial=trial, cause=cause)

    def close(self) -> None:
        """Start no further candidates; what was started is drained to the top rung."""
        self._board.closed = True

    def cancel(self) -> None:
        """Issue nothing any more and ignore what still comes in; :meth:`best` keeps its answer."""
        self._board.cancelled = True

    def forget(self, trial: int, rung: int) -> None:
        """Take note that the checkpoint which a trial wrote at a rung is gone.

        Should the trial be needed again all the same, its next job starts from resource 0, the parent.

        Args:
            trial: The trial.
            rung: Index of the rung in ``ladder.levels``.

        Raises:
            SchedulerError: There was no such checkpoint, or a segment in flight builds on it.
        """
        record = known(self._board, trial)
        if not record.holds(whole("rung", rung, least=0)):
            raise SchedulerError(f"trial {trial} holds no checkpoint of rung {rung}: nothing to forget")
        if record.status in IN_FLIGHT and rung == record.rung and record.origin > 0:
            raise SchedulerError(
                f"a segment of trial {trial} builds on its checkpoint of rung {rung}: keep it"
            )
        record.held &= ~(1 << rung)

    def collectable(self) -> set[tuple[int, int]]:
        """List the (trial, rung index) whose stored checkpoints no promotion can need any more.

        Delete them, then call :meth:`forget` for each. See :func:`automode.scheduler.collection.collectable`.
        """
        return collectable(self._board)

    # What it knows.

    @property
    def ladder(self) -> Ladder:
        """The rungs."""
        return self._board.ladder

    @property
    def settings(self) -> Settings:
        """What the scheduler was told."""
        return self._board.settings

    @property
    def finished(self) -> bool:
        """Whether nothing is in flight and nothing will ever be issued again."""
        return self._board.cancelled or (self._board.in_flight == 0 and self._board.choose() is None)

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._board.cancelled

    def running(self) -> list[Job]:
        """List the segments that were issued and have not come back: after a crash, each of them has failed."""
        return self._board.running()

    @property
    def in_flight(self) -> int:
        """How many segments were issued and have not come back; those that wait for another try are not among them."""
        return self._board.in_flight - len(self._board.retries)

    @property
    def started(self) -> int:
        """How many candidates were started."""
        return len(self._board.trials)

    @property
    def spent(self) -> int:
        """Resource steps of all segments issued so far, repeats included."""
        return self._board.spent

    @property
    def unusable(self) -> int:
        """How many reports were NaN, infinite or missing."""
        return self._board.unusable

    @property
    def digest(self) -> str:
        """SHA-256 over all decisions in their order; attempts are left out, so that a retry leaves no trace."""
        return self._board.chain.hex()

    def best(self) -> Best | None:
        """Give the best trial of the highest rung that holds a finite value: like is compared with like."""
        return self._board.best()

    def status(self, trial: int) -> Status:
        """Tell what a started trial is doing.

        Raises:
            SchedulerError: The trial was never started.
        """
        return known(self._board, trial).status

    def rungs(self) -> list[RungView]:
        """Describe every rung of every bracket, lowest first, for progress displays."""
        return [
            RungView(
                bracket.first, rung.level, rung.size, rung.usable, rung.promoted, bracket.in_flight[place]
            )
            for bracket in self._board.brackets
            for place, rung in enumerate(bracket.rungs)
        ]

    def trial_seed(self, trial: int) -> int:
        """Give the seed (64 bits) that everything random in this trial derives from."""
        number = whole("trial", trial, least=0)
        words = np.random.SeedSequence(self._board.settings.seed, spawn_key=(number,)).generate_state(
            1, np.uint64
        )
        return int(words[0])

    # Its state as a value.

    def to_state(self) -> dict[str, Any]:
        """Give the whole state as plain data that strict JSON can hold."""
        return dump(self._board)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ASHA:
        """Rebuild the scheduler from :meth:`to_state`; it decides the same from there on.

        Raises:
            SchedulerError: The state is no such value, or contradicts itself.
        """
        asha = cls.__new__(cls)
        asha._board = load(state)  # noqa: SLF001 - its own class
        return asha
