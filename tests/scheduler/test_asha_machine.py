"""ASHA against a slow model that sorts everything anew for every decision, under every message in any order."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from automode.errors import SchedulerError
from automode.scheduler import ASHA, Diverged, Finished, Ignored, Job, Lost, Paused, Promoted, Requeued

VALUES = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, -1.0, math.nan, math.inf, -math.inf, None])


@dataclass
class Known:
    """What the model knows of a trial: its reports by rung, and what it is doing."""

    reports: dict[int, tuple[Any, int]] = field(default_factory=dict)
    state: str = "running"
    target: int = 0
    origin: int = 0
    attempt: int = 1

    @property
    def gone(self) -> bool:
        return self.state in ("lost", "stopped")


@dataclass
class Model:
    """The rules as plainly as they can be written."""

    levels: tuple[int, ...]
    eta: int
    sign: int
    candidates: int | None
    quota: bool
    trials: list[Known] = field(default_factory=list)
    retries: list[int] = field(default_factory=list)
    closed: bool = False
    seq: int = 0

    def ranked(self, rung: int) -> list[int]:
        reports = [
            (t, k.reports[rung]) for t, k in enumerate(self.trials) if not k.gone and rung in k.reports
        ]
        usable = [(self.sign * v, s, t) for t, (v, s) in reports if v is not None and math.isfinite(v)]
        return [t for _, _, t in sorted(usable)]

    def size(self, rung: int) -> int:
        return sum(not k.gone and rung in k.reports for k in self.trials)

    def is_promoted(self, trial: int, rung: int) -> bool:
        return self.trials[trial].target > rung

    def promoted(self, rung: int) -> int:
        return sum(not k.gone and rung in k.reports and k.target > rung for k in self.trials)

    def waiting(self, rung: int) -> list[int]:
        return [t for t in self.ranked(rung) if not self.is_promoted(t, rung)]

    def flying(self, upto: int) -> bool:
        return any(k.state in ("running", "queued") and k.target <= upto for k in self.trials)

    def expected(self) -> tuple[str, int, int] | None:
        if self.retries:
            return ("retry", self.retries[0], self.trials[self.retries[0]].target)
        top = len(self.levels) - 1
        for rung in range(top - 1, -1, -1):
            due = self.size(rung) // self.eta
            free = not self.quota or self.promoted(rung) < due
            best = [t for t in self.ranked(rung)[:due] if not self.is_promoted(t, rung)]
            if best and free:
                return ("rank", best[0], rung + 1)
        if not self.closed and (self.candidates is None or len(self.trials) < self.candidates):
            return ("start", len(self.trials), 0)
        for rung in range(top):
            if self.flying(rung):
                break
            owed = max(1, self.size(rung) // self.eta) - self.promoted(rung)
            if owed > 0 and self.waiting(rung):
                return ("drain", self.waiting(rung)[0], rung + 1)
        if not self.flying(top) and not self.ranked(top):
            for rung in range(top - 1, -1, -1):
                if self.waiting(rung):
                    return ("rescue", self.waiting(rung)[0], rung + 1)
        return None


class AshaMachine(RuleBasedStateMachine):
    """Drives the scheduler and the model side by side."""

    @initialize(
        low=st.integers(1, 3),
        extra=st.integers(0, 30),
        eta=st.integers(2, 4),
        mode=st.sampled_from(["min", "max"]),
        candidates=st.one_of(st.none(), st.integers(1, 12)),
        quota=st.booleans(),
    )
    def begin(self, low: int, extra: int, eta: int, mode: Any, candidates: int | None, quota: bool) -> None:
        self.asha = ASHA(low, low + extra, eta, mode, candidates, seed=1, quota=quota)
        sign = 1 if mode == "min" else -1
        self.model = Model(self.asha.ladder.levels, eta, sign, candidates, quota)
        self.jobs: list[Job] = []
        self.past: list[tuple[Job, Any]] = []
        self.old: list[Job] = []
        self.issued: set[Job] = set()

    def draw_job(self, data: st.DataObject) -> Job:
        return data.draw(st.sampled_from(self.jobs))

    @rule()
    def ask(self) -> None:
        expected = self.model.expected()
        assert self.asha.finished == (expected is None and not self.model.flying(len(self.model.levels)))
        issue = self.asha.decide()
        if expected is None:
            assert issue is None
            return
        assert issue is not None
        how, trial, target = expected
        job = issue.job
        assert job not in self.issued, "one segment was issued twice"
        self.issued.add(job)
        assert (job.trial, job.to_resource) == (trial, self.model.levels[target])
        if how == "start":
            self.model.trials.append(Known())
        known = self.model.trials[trial]
        if how == "retry":
            self.model.retries.pop(0)
        else:
            known.origin = 0 if how == "start" else self.model.levels[target - 1]
            known.attempt = 1
        if isinstance(issue, Promoted):
            assert issue.rule == how
            ranked = self.model.ranked(target - 1)
            assert issue.rank == ranked.index(trial)
            assert issue.size == self.model.size(target - 1)
            if how == "rank":
                assert issue.rank < issue.size // self.model.eta
        known.target, known.state = target, "running"
        assert job == Job(trial, known.origin, self.model.levels[target], known.attempt)
        assert job.from_resource < job.to_resource
        self.jobs.append(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), value=VALUES, by_default=st.booleans())
    def report(self, data: st.DataObject, value: Any, by_default: bool) -> None:
        job = self.draw_job(data)
        self.jobs.remove(job)
        attempt = None if by_default else job.attempt
        outcome = self.asha.report(job.trial, job.to_resource, value, attempt=attempt)
        known = self.model.trials[job.trial]
        self.model.seq += 1
        known.reports[known.target] = (value, self.model.seq)
        self.past.append((job, value))
        if value is None or not math.isfinite(value):
            assert isinstance(outcome, Diverged)
            known.state = "diverged"
            return
        ranked = self.model.ranked(known.target)
        top = known.target == len(self.model.levels) - 1
        assert isinstance(outcome, Finished if top else Paused)
        assert outcome.rank == ranked.index(job.trial)
        assert outcome.size == self.model.size(known.target)
        known.state = "finished" if top else "paused"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), retryable=st.booleans())
    def fail(self, data: st.DataObject, retryable: bool) -> None:
        job = self.draw_job(data)
        self.jobs.remove(job)
        self.old.append(job)
        outcome = self.asha.failed(job.trial, job.attempt, retryable=retryable)
        known = self.model.trials[job.trial]
        if retryable and job.attempt < 3:
            assert isinstance(outcome, Requeued)
            known.state, known.attempt = "queued", job.attempt + 1
            self.model.retries.append(job.trial)
        else:
            assert isinstance(outcome, Lost)
            known.state = "lost"

    @precondition(lambda self: any(k.state in ("running", "queued", "paused") for k in self.model.trials))
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        able = [t for t, k in enumerate(self.model.trials) if k.state in ("running", "queued", "paused")]
        trial = data.draw(st.sampled_from(able))
        self.asha.stop(trial)
        self.model.trials[trial].state = "stopped"
        self.model.retries = [t for t in self.model.retries if t != trial]
        self.old += [job for job in self.jobs if job.trial == trial]
        self.jobs = [job for job in self.jobs if job.trial != trial]

    @rule()
    def close(self) -> None:
        if len(self.model.trials) > 4:
            self.asha.close()
            self.model.closed = True

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def repeat_a_report(self, data: st.DataObject) -> None:
        job, value = data.draw(st.sampled_from(self.past))
        before = self.asha.to_state()
        assert isinstance(self.asha.report(job.trial, job.to_resource, value, attempt=job.attempt), Ignored)
        if not self.model.trials[job.trial].gone:
            with pytest.raises(SchedulerError, match="one segment has one value"):
                self.asha.report(job.trial, job.to_resource, 77.0, attempt=job.attempt)
        assert self.asha.to_state() == before

    @precondition(lambda self: self.old)
    @rule(data=st.data(), value=VALUES)
    def report_an_old_attempt(self, data: st.DataObject, value: Any) -> None:
        job = data.draw(st.sampled_from(self.old))
        before = self.asha.to_state()
        assert isinstance(self.asha.report(job.trial, job.to_resource, value, attempt=job.attempt), Ignored)
        late = self.asha.failed(job.trial, job.attempt, resource=job.to_resource)
        assert isinstance(late, Ignored)
        assert self.asha.to_state() == before

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def fail_after_reporting(self, data: st.DataObject) -> None:
        job, _ = data.draw(st.sampled_from(self.past))
        before = self.asha.to_state()
        late = self.asha.failed(job.trial, job.attempt, resource=job.to_resource)
        assert isinstance(late, Ignored)
        assert self.asha.to_state() == before

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), value=VALUES)
    def report_off_the_rung(self, data: st.DataObject, value: Any) -> None:
        job = self.draw_job(data)
        before = self.asha.to_state()
        for between in range(job.from_resource + 1, job.to_resource):
            assert isinstance(self.asha.report(job.trial, between, value, attempt=job.attempt), Ignored)
        with pytest.raises(SchedulerError, match="evaluate exactly"):
            self.asha.report(job.trial, job.to_resource + 1, value, attempt=job.attempt)
        with pytest.raises(SchedulerError, match="was never issued"):
            self.asha.report(job.trial, job.to_resource, value, attempt=job.attempt + 1)
        with pytest.raises(SchedulerError, match="was never issued"):
            self.asha.failed(job.trial, job.attempt + 1)
        with pytest.raises(SchedulerError, match="nothing there could fail"):
            self.asha.failed(job.trial, job.attempt, resource=job.to_resource + 1)
        assert self.asha.to_state() == before

    @rule()
    def save_and_load(self) -> None:
        state = self.asha.to_state()
        text = json.dumps(state, allow_nan=False)
        self.asha = ASHA.from_state(json.loads(text))
        assert self.asha.to_state() == state == json.loads(text)

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        running = [t for t, k in enumerate(self.model.trials) if k.state == "running"]
        assert [job.trial for job in self.asha.running()] == running
        assert self.asha.in_flight == len(running)
        assert [view.size for view in self.asha.rungs()] == [
            self.model.size(rung) for rung in range(len(self.model.levels))
        ]
        assert [view.promoted for view in self.asha.rungs()] == [
            self.model.promoted(rung) for rung in range(len(self.model.levels))
        ]
        reached = [rung for rung in range(len(self.model.levels)) if self.model.ranked(rung)]
        best = self.asha.best()
        if not reached:
            assert best is None
        else:
            trial = self.model.ranked(reached[-1])[0]
            assert best == (
                trial,
                self.model.levels[reached[-1]],
                self.model.trials[trial].reports[reached[-1]][0],
            )


AshaMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
test_every_decision_is_the_plain_model_s_decision = AshaMachine.TestCase


def finish(asha: ASHA) -> str:
    """Play to the end with values that depend on the trial and the rung alone."""
    while (job := asha.next()) is not None:
        asha.report(
            job.trial, job.to_resource, (job.trial * 7919 + job.to_resource) % 101 / 10, attempt=job.attempt
        )
    return asha.digest


@pytest.mark.parametrize("brackets", [1, 3])
def test_a_state_saved_at_any_moment_has_the_same_future(brackets: int) -> None:
    asha = ASHA(1, 27, 3, candidates=25, brackets=brackets, seed=2, budget=2000)
    moments: list[tuple[ASHA, str]] = []
    jobs: list[Job] = []
    for step in range(60):
        moments.append((copy.deepcopy(asha), json.dumps(asha.to_state(), allow_nan=False)))
        if step % 3 < 2:
            job = asha.next()
            if job is not None:
                jobs.append(job)
        elif jobs:
            job = jobs.pop(step % len(jobs))
            if step % 5 == 0:
                asha.failed(job.trial, job.attempt)
            else:
                value = math.nan if step % 7 == 0 else step * 37 % 11
                asha.report(job.trial, job.to_resource, value, attempt=job.attempt)
    for alive, saved in moments:
        loaded = ASHA.from_state(json.loads(saved))
        for twin in (alive, loaded):
            for job in twin.running():
                twin.failed(job.trial, job.attempt)
        assert finish(alive) == finish(loaded)
        assert alive.to_state() == loaded.to_state()
