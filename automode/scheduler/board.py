"""The board: brackets, trials and spending, and the rules that pick the next move on it."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Literal, NamedTuple

from automode.scheduler.bracket import Assignment, Bracket
from automode.scheduler.decisions import (
    Best,
    Diverged,
    Finished,
    Job,
    Paused,
    Promoted,
    PromotionRule,
    Retried,
    Started,
    encode_value,
)
from automode.scheduler.rung import Entry, Value, is_usable
from automode.scheduler.settings import Settings
from automode.scheduler.trials import IN_FLIGHT, Status, Trial


class Move(NamedTuple):
    """A move that the rules pick: repeat, start, or promote ``trial`` from ``rung``."""

    rule: Literal["retry", "start"] | PromotionRule
    trial: int
    rung: int


class Board:
    """All of the scheduler's state, with the moves that change it; it trusts its callers' arguments.

    Args:
        settings: What the scheduler was told.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ladder = settings.ladder
        self.brackets = [
            Bracket(ladder=settings.ladder, first=b, quota=settings.quota) for b in range(settings.brackets)
        ]
        self.assign = Assignment(ladder=settings.ladder, brackets=settings.brackets, seed=settings.seed)
        self.trials: list[Trial] = []
        self.retries: deque[int] = deque()
        self.in_flight = 0
        self.seq = 0
        self.spent = 0
        self.unusable = 0
        self.closed = False
        self.cancelled = False
        self.chain = b""

    # Picking a move.

    def choose(self, prefer: int | None = None) -> Move | None:
        """Pick the next move, or ``None`` when there is none for now; changes nothing."""
        if self.cancelled:
            return None
        if self.retries:
            return Move("retry", self.retries[0], -1)
        move = self._in_place(prefer) or self._by_rank()
        if move is None and self._can_start():
            return Move("start", len(self.trials), -1)
        return move or self._drain() or self._rescue()

    def affordable(self, cost: int, target: int) -> bool:
        """Tell whether a segment to rung ``target`` leaves enough budget to bring the leading trial to the top."""
        budget = self.settings.budget
        if budget is None:
            return True
        top = self.ladder.top
        if any(bracket.rung(top).usable for bracket in self.brackets):
            return self.spent + cost <= budget
        reach = max([target, *(r for b in self.brackets if (r := b.reached()) is not None)])
        return self.spent + cost + self.ladder.max_resource - self.ladder.levels[reach] <= budget

    def cost(self, trial: Trial) -> int:
        """Give the resource steps of a trial's latest segment."""
        return self.ladder.levels[trial.target] - trial.origin

    def source_open(self) -> bool:
        """Tell whether a candidate is left that was not started."""
        candidates = self.settings.candidates
        return not self.closed and (candidates is None or len(self.trials) < candidates)

    def _can_start(self) -> bool:
        if not self.source_open():
            return False
        first = self.assign(len(self.trials))
        return self.affordable(self.ladder.levels[first], first)

    def _can_promote(self, trial: int, index: int) -> bool:
        return self.affordable(self.ladder.levels[index + 1] - self._origin(trial, index), index + 1)

    def _origin(self, trial: int, index: int) -> int:
        return self.ladder.levels[index] if self.trials[trial].holds(index) else 0

    def _in_place(self, prefer: int | None) -> Move | None:
        if prefer is None or not 0 <= prefer < len(self.trials):
            return None
        trial = self.trials[prefer]
        if trial.status is not Status.PAUSED:
            return None
        rung = self.brackets[trial.bracket].rung(trial.rung)
        rank = rung.rank(prefer)
        due = rank is not None and rank < rung.due and not (self.settings.quota and rung.promoted >= rung.due)
        return Move("rank", prefer, trial.rung) if due and self._can_promote(prefer, trial.rung) else None

    def _by_rank(self) -> Move | None:
        for index in range(self.ladder.top - 1, -1, -1):
            for bracket in self.brackets:
                trial = bracket.promotable(index)
                if trial is not None and self._can_promote(trial, index):
                    return Move("rank", trial, index)
        return None

    def _drain(self) -> Move | None:
        for bracket in self.brackets:
            for index, trial in bracket.drains():
                if self._can_promote(trial, index):
                    return Move("drain", trial, index)
        return None

    def _rescue(self) -> Move | None:
        """When all that went up was lost or diverged, send the next best of the highest rung after them."""
        top = self.ladder.top
        if self.in_flight or any(bracket.rung(top).usable for bracket in self.brackets):
            return None
        for index in range(top - 1, -1, -1):
            waiting = [b.rung(index).waiting() for b in self.brackets if b.first <= index]
            for key in sorted(key for key in waiting if key is not None):
                if self._can_promote(key[2], index):
                    return Move("rescue", key[2], index)
        return None

    # Making a move.

    def make(self, move: Move) -> Started | Promoted | Retried:
        """Carry a picked move out and give the decision with its job."""
        match move.rule:
            case "retry":
                return self._retry()
            case "start":
                return self._start()
            case rule:
                return self._promote(move, rule)

    def _retry(self) -> Retried:
        number = self.retries.popleft()
        trial = self.trials[number]
        trial.status = Status.RUNNING
        return Retried(job=self._job(number))

    def _start(self) -> Started:
        number = len(self.trials)
        first = self.assign(number)
        self.trials.append(
            Trial(bracket=first, status=Status.RUNNING, rung=-1, target=first, origin=0, attempt=1)
        )
        self._depart(number)
        self.note("started", number, self.ladder.levels[first])
        return Started(job=self._job(number), bracket=first)

    def _promote(self, move: Move, rule: PromotionRule) -> Promoted:
        trial = self.trials[move.trial]
        rung = self.brackets[trial.bracket].rung(move.rung)
        rank = rung.rank(move.trial)
        assert rank is not None
        due = rung.due if rule == "rank" else max(1, rung.due)
        rung.promote(move.trial)
        trial.status = Status.RUNNING
        trial.target = move.rung + 1
        trial.origin = self._origin(move.trial, move.rung)
        trial.attempt = 1
        self._depart(move.trial)
        job = self._job(move.trial)
        self.note("promoted", move.trial, job.to_resource)
        return Promoted(
            job=job, bracket=trial.bracket, level=rung.level, rank=rank, size=rung.size, due=due, rule=rule
        )

    def _job(self, number: int) -> Job:
        trial = self.trials[number]
        return Job(number, trial.origin, self.ladder.levels[trial.target], trial.attempt)

    def _depart(self, number: int) -> None:
        trial = self.trials[number]
        self.brackets[trial.bracket].depart(trial.target)
        self.in_flight += 1
        self.spent += self.cost(trial)

    # Taking what came back.

    def record(self, number: int, value: Value) -> Paused | Finished | Diverged:
        """Enter the value that a running trial reached at its target rung."""
        trial = self.trials[number]
        bracket = self.brackets[trial.bracket]
        rung = bracket.rung(trial.target)
        bracket.arrive(trial.target)
        self.in_flight -= 1
        self.seq += 1
        usable = is_usable(value)
        rung.record(number, self.loss(value), Entry(value=value, seq=self.seq, attempt=trial.attempt))
        trial.rung = trial.target
        trial.held |= 1 << trial.rung
        self.note("reported", number, rung.level, value)
        if not usable or value is None:
            self.unusable += 1
            trial.status = Status.DIVERGED
            return Diverged(trial=number, resource=rung.level, value=value)
        rank = rung.rank(number)
        assert rank is not None
        if trial.rung == self.ladder.top:
            trial.status = Status.FINISHED
            return Finished(trial=number, resource=rung.level, value=value, rank=rank, size=rung.size)
        trial.status = Status.PAUSED
        return Paused(trial=number, resource=rung.level, value=value, rank=rank, size=rung.size, due=rung.due)

    def loss(self, value: Value) -> float:
        """Turn a value so that smaller is better; stored values stay as reported."""
        if value is None:
            return 0.0  # takes no rank: never compared
        return value if self.settings.mode == "min" else -value

    def requeue(self, number: int) -> None:
        """Set a running trial's segment aside for another try, its cost with it, so that nothing else can take it."""
        trial = self.trials[number]
        trial.attempt += 1
        trial.status = Status.QUEUED
        self.retries.append(number)
        self.spent += self.cost(trial)

    def withdraw(self, number: int, status: Status) -> None:
        """Take a trial out of everything; the promotions that it used fall to others."""
        trial = self.trials[number]
        if trial.status in IN_FLIGHT:
            self.in_flight -= 1
            self.brackets[trial.bracket].arrive(trial.target)
            if trial.status is Status.QUEUED:
                self.retries.remove(number)
                self.spent -= self.cost(trial)
        self.brackets[trial.bracket].withdraw(number)
        trial.status = status
        self.note(status.value, number)

    # Looking.

    def best(self) -> Best | None:
        """Give the best trial of the highest rung that holds a finite value."""
        for index in range(self.ladder.top, -1, -1):
            keys = [
                key for b in self.brackets if b.first <= index and (key := b.rung(index).best) is not None
            ]
            if keys:
                trial = min(keys)[2]
                value = self.brackets[self.trials[trial].bracket].rung(index).entries[trial].value
                assert value is not None
                return Best(trial, self.ladder.levels[index], value)
        return None

    def running(self) -> list[Job]:
        """List the segments that were issued and have not come back, by trial."""
        return [
            self._job(number) for number, trial in enumerate(self.trials) if trial.status is Status.RUNNING
        ]

    def note(self, kind: str, trial: int, resource: int | None = None, value: Value = None) -> None:
        """Lengthen the chain that the digest is taken from; attempts stay out, so that a retry leaves no trace."""
        link = f"{kind} {trial} {resource} {encode_value(value)!r}".encode()
        self.chain = hashlib.sha256(self.chain + link).digest()
