"""ASHA by promotion: order of decisions, drain, retries, stopping, budget, brackets."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.errors import SchedulerError, UsageError
from automode.scheduler import (
    ASHA,
    Best,
    Diverged,
    Finished,
    Ignored,
    Job,
    Lost,
    Paused,
    Promoted,
    Requeued,
    Retried,
    Started,
    Status,
    Stopped,
    worst_case_resource,
)


def answer(asha: ASHA, job: Job, value: float | None) -> Any:
    return asha.report(job.trial, job.to_resource, value, attempt=job.attempt)


def run(asha: ASHA, curve: Any) -> list[Job]:
    """Train one segment after the other until nothing is left to do."""
    jobs = []
    while (job := asha.next()) is not None:
        jobs.append(job)
        answer(asha, job, curve(job.trial, job.to_resource))
    return jobs


def test_the_first_rung_fills_before_anyone_is_promoted() -> None:
    asha = ASHA(1, 9, 3)
    for trial, value in enumerate([0.3, 0.1, 0.2]):
        job = asha.next()
        assert job == Job(trial, 0, 1, 1)
        answer(asha, job, value)
    assert asha.next() == Job(1, 1, 3, 1)


def test_promotion_looks_at_the_highest_rung_first() -> None:
    asha = ASHA(1, 4, 2)
    first = [asha.next() for _ in range(4)]
    for job, value in zip(first, [0.4, 0.3, 0.2, 0.1], strict=True):
        assert job is not None
        answer(asha, job, value)
    up = [asha.next(), asha.next()]
    assert [job and job.trial for job in up] == [3, 2]
    for job in up:
        assert job is not None
        answer(asha, job, 0.1)
    assert asha.next() == Job(3, 2, 4, 1)  # equal values: the earlier report ranks first


def test_the_decisions_say_why() -> None:
    asha = ASHA(1, 2, 2, candidates=2)
    started = asha.decide()
    assert isinstance(started, Started)
    assert "starts" in started.reason
    paused = answer(asha, started.job, 0.5)
    assert isinstance(paused, Paused)
    assert (paused.rank, paused.size, paused.due, paused.promotable) == (0, 1, 0, False)
    assert paused.reason == "trial 0 is number 1 of 1 at 1: too few have arrived for any to go on"
    second = asha.decide()
    assert isinstance(second, Started)
    answer(asha, second.job, 0.4)
    promoted = asha.decide()
    assert isinstance(promoted, Promoted)
    assert (promoted.rule, promoted.rank, promoted.size, promoted.due) == ("rank", 0, 2, 1)
    assert promoted.reason == "trial 1 is number 1 of 2 at 1, where the best 1 go on to 2"
    finished = answer(asha, promoted.job, 0.3)
    assert isinstance(finished, Finished)
    assert "fully trained" in finished.reason


@pytest.mark.parametrize(("mode", "winner"), [("min", 0), ("max", 7)])
def test_both_directions_find_their_best(mode: Any, winner: int) -> None:
    asha = ASHA(1, 4, 2, mode, 8)
    run(asha, lambda trial, resource: float(trial))
    assert asha.best() == Best(winner, 4, float(winner))


@given(
    count=st.integers(1, 40),
    eta=st.integers(2, 5),
    top=st.integers(1, 200),
    quota=st.booleans(),
    workers=st.integers(1, 8),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_a_finite_list_always_ends_with_a_fully_trained_trial(
    count: int, eta: int, top: int, quota: bool, workers: int, data: st.DataObject
) -> None:
    asha = ASHA(1, top, eta, candidates=count, quota=quota)
    running: list[Job] = []
    while not asha.finished:
        while len(running) < workers and (job := asha.next()) is not None:
            running.append(job)
        job = running.pop(data.draw(st.integers(0, len(running) - 1)))
        answer(asha, job, data.draw(st.sampled_from([0.0, 1.0, 2.0, 3.0])))
    best = asha.best()
    assert best is not None
    assert best.resource == top
    assert not running
    assert asha.started == count
    assert asha.spent <= worst_case_resource(count, asha.ladder, quota=quota, retries=0)


def test_the_drain_owes_what_the_rule_would_have_given_a_full_rung() -> None:
    asha = ASHA(1, 16, 4, candidates=3)
    jobs = run(asha, lambda trial, resource: float(trial))
    assert [job.to_resource for job in jobs] == [1, 1, 1, 4, 16]
    assert {job.trial for job in jobs[3:]} == {0}


def test_the_drain_waits_for_what_is_still_on_its_way() -> None:
    asha = ASHA(1, 16, 4, candidates=3)
    jobs = [asha.next() for _ in range(3)]
    assert None not in jobs
    answer(asha, jobs[0], 0.9)  # type: ignore[arg-type]
    answer(asha, jobs[1], 0.8)  # type: ignore[arg-type]
    assert asha.next() is None
    assert not asha.finished
    answer(asha, jobs[2], 0.1)  # type: ignore[arg-type]
    drained = asha.decide()
    assert isinstance(drained, Promoted)
    assert (drained.rule, drained.job.trial) == ("drain", 2)
    assert "owes 1" in drained.reason


def test_closing_an_endless_source_drains_it() -> None:
    asha = ASHA(1, 16, 4)
    for _ in range(3):
        job = asha.next()
        assert job is not None
        answer(asha, job, float(job.trial))
    assert not asha.finished
    asha.close()
    assert [job.to_resource for job in run(asha, lambda trial, resource: float(trial))] == [4, 16]
    assert asha.finished


def test_when_all_that_went_up_diverged_the_next_best_goes_after_them() -> None:
    asha = ASHA(1, 4, 2, candidates=4)
    bad = {0, 1, 2}
    jobs = run(asha, lambda trial, resource: float("nan") if trial in bad and resource > 1 else float(trial))
    assert asha.best() == Best(3, 4, 3.0)
    assert asha.finished
    assert max(Counter((job.trial, job.to_resource) for job in jobs).values()) == 1


def test_without_any_finite_value_it_ends_without_a_best() -> None:
    asha = ASHA(1, 4, 2, candidates=4)
    jobs = run(asha, lambda trial, resource: float("nan"))
    assert len(jobs) == 4
    assert asha.finished
    assert asha.best() is None
    assert asha.unusable == 4


def test_a_failed_segment_is_repeated_from_its_checkpoint_before_anything_else() -> None:
    asha = ASHA(1, 4, 2, candidates=4)
    for _ in range(2):
        job = asha.next()
        assert job is not None
        answer(asha, job, float(job.trial))
    up = asha.next()
    assert up == Job(0, 1, 2, 1)
    requeued = asha.failed(0, attempt=1, cause="worker died")
    assert isinstance(requeued, Requeued)
    assert "worker died" in requeued.reason
    assert asha.status(0) is Status.QUEUED
    repeated = asha.decide()
    assert isinstance(repeated, Retried)
    assert repeated.job == Job(0, 1, 2, 2)
    assert "attempt 2" in repeated.reason
    assert isinstance(answer(asha, repeated.job, 0.0), Paused)


def test_after_three_attempts_a_trial_is_lost_and_takes_up_no_promotion() -> None:
    asha = ASHA(1, 2, 2, candidates=4)
    for _ in range(4):
        while (job := asha.next()) is not None and job.to_resource == 2:
            up = job
        assert job is not None
        answer(asha, job, float(job.trial))
    assert up == Job(0, 1, 2, 1)
    assert asha.next() == Job(1, 1, 2, 1)
    for attempt in (1, 2):
        assert isinstance(asha.failed(0, attempt=attempt), Requeued)
        assert asha.next() == Job(0, 1, 2, attempt + 1)
    assert isinstance(asha.failed(0, attempt=3, cause="again"), Lost)
    assert asha.status(0) is Status.LOST
    answer(asha, Job(1, 1, 2, 1), 1.0)
    assert asha.finished  # three trials are left in the rung: one promotion is due, and trial 1 had it
    assert asha.best() == Best(1, 2, 1.0)


def test_a_trial_that_would_fail_the_same_way_is_not_repeated() -> None:
    asha = ASHA(1, 2, 2, candidates=2)
    assert asha.next() == Job(0, 0, 1, 1)
    assert isinstance(asha.failed(0, retryable=False, cause="out of memory"), Lost)
    assert [job.trial for job in run(asha, lambda trial, resource: 1.0)] == [1, 1]


def test_a_lost_trial_hands_its_promotion_to_the_next_best() -> None:
    asha = ASHA(1, 2, 2, candidates=2)
    run_one = [asha.next(), asha.next()]
    for job in run_one:
        assert job is not None
        answer(asha, job, float(job.trial))
    assert asha.next() == Job(0, 1, 2, 1)
    asha.failed(0, retryable=False)
    assert asha.next() == Job(1, 1, 2, 1)


def test_what_was_asked_before_a_loss_is_decided_anew_after_it() -> None:
    asha = ASHA(1, 2, 2, candidates=5)
    jobs = [asha.next() for _ in range(5)]
    for job in jobs:
        assert job is not None
        answer(asha, job, float(job.trial))
    assert [asha.next(), asha.next()] == [Job(0, 1, 2, 1), Job(1, 1, 2, 1)]
    assert asha.next() is None  # two of five are due, and both are on their way
    asha.failed(0, retryable=False)
    assert asha.next() == Job(2, 1, 2, 1)  # two of four are due


def test_a_stopped_trial_competes_no_more_and_its_late_report_is_ignored() -> None:
    asha = ASHA(1, 2, 2, candidates=3)
    jobs = [asha.next() for _ in range(3)]
    answer(asha, jobs[0], 0.0)  # type: ignore[arg-type]
    assert isinstance(asha.stop(0, "looks wrong"), Stopped)
    assert isinstance(asha.stop(1), Stopped)
    assert isinstance(asha.stop(1), Ignored)
    late = answer(asha, jobs[1], 0.0)  # type: ignore[arg-type]
    assert isinstance(late, Ignored)
    assert "stopped" in late.reason
    assert isinstance(asha.failed(1, attempt=1), Ignored)
    answer(asha, jobs[2], 5.0)  # type: ignore[arg-type]
    assert asha.next() == Job(2, 1, 2, 1)


def test_stopping_a_trial_that_waits_for_another_try_frees_its_place() -> None:
    asha = ASHA(1, 2, 2, candidates=1)
    asha.next()
    asha.failed(0)
    spent = asha.spent
    asha.stop(0)
    assert asha.spent == spent - 1
    assert asha.next() is None
    assert asha.finished


def test_cancelling_ends_everything_and_keeps_the_best() -> None:
    asha = ASHA(1, 4, 2, candidates=8)
    first, second = asha.next(), asha.next()
    answer(asha, first, 0.5)  # type: ignore[arg-type]
    asha.cancel()
    assert asha.next() is None
    assert asha.finished
    assert isinstance(answer(asha, second, 0.1), Ignored)  # type: ignore[arg-type]
    assert isinstance(asha.failed(1, attempt=1), Ignored)
    assert asha.best() == Best(0, 1, 0.5)


def test_a_worker_that_still_holds_a_promotable_trial_goes_on_in_place() -> None:
    asha = ASHA(1, 4, 2)
    jobs = [asha.next() for _ in range(4)]
    for job, value in zip(jobs, [0.4, 0.3, 0.2, 0.1], strict=True):
        assert job is not None
        answer(asha, job, value)
    state = asha.to_state()
    assert asha.next() == Job(3, 1, 2, 1)
    again = ASHA.from_state(state)
    assert again.next(prefer=2) == Job(2, 1, 2, 1)
    assert again.next(prefer=0) == Job(3, 1, 2, 1)  # trial 0 is not due: the usual choice


def test_the_quota_never_promotes_more_than_is_due_in_a_rung() -> None:
    improving = [float(-trial) for trial in range(32)]
    for quota, most in ((False, 29), (True, 8)):
        asha = ASHA(1, 4, 4, candidates=32, quota=quota)
        jobs = run(asha, lambda trial, resource: improving[trial])
        assert sum(job.to_resource == 4 for job in jobs) == most


@given(
    budget=st.integers(16, 400),
    count=st.one_of(st.none(), st.integers(1, 60)),
    workers=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_a_budget_is_never_exceeded_and_still_carries_a_trial_to_the_top(
    budget: int, count: int | None, workers: int, seed: int
) -> None:
    asha = ASHA(1, 16, 2, candidates=count, budget=budget)
    chance = random.Random(seed)
    running: list[Job] = []
    went_wrong = False
    while not asha.finished:
        while len(running) < workers and (job := asha.next()) is not None:
            running.append(job)
        job = running.pop(chance.randrange(len(running)))
        fate = chance.choice(["good", "good", "good", "good", "nan", "fails"])
        if fate == "fails":
            went_wrong |= isinstance(asha.failed(job.trial, job.attempt), Lost)
        else:
            value = float("nan") if fate == "nan" else chance.random()
            went_wrong |= isinstance(answer(asha, job, value), Diverged)
        assert asha.spent <= budget
    best = asha.best()
    assert went_wrong or (best is not None and best.resource == 16)


def test_what_a_broken_segment_did_not_train_returns_to_the_budget() -> None:
    asha = ASHA(8, 8, 2, candidates=2, budget=11)
    assert asha.next() == Job(0, 0, 8, 1)
    assert isinstance(asha.failed(0, spent=3), Requeued)
    assert asha.spent == 11
    assert asha.next() == Job(0, 0, 8, 2)
    assert isinstance(asha.failed(0), Lost)  # no room for a third try


def test_brackets_start_at_their_own_rung_and_every_one_drains() -> None:
    asha = ASHA(1, 16, 4, candidates=60, brackets=3, seed=5)
    jobs = run(asha, lambda trial, resource: float(trial))
    starts = Counter(job.to_resource for job in jobs if job.from_resource == 0)
    assert set(starts) == {1, 4, 16}
    assert starts[1] > starts[4] > starts[16]
    assert [view.usable > 0 for view in asha.rungs() if view.level == 16] == [True] * 3
    assert asha.spent <= worst_case_resource(60, asha.ladder, brackets=3, seed=5, retries=0)


def test_brackets_depend_on_the_seed_and_on_nothing_else() -> None:
    def starts(seed: int) -> list[int]:
        asha = ASHA(1, 16, 4, candidates=40, brackets=3, seed=seed)
        return [job.to_resource for job in run(asha, lambda trial, resource: 1.0) if job.from_resource == 0]

    assert starts(1) == starts(1)
    assert starts(1) != starts(2)


def test_every_trial_has_its_own_seed() -> None:
    asha, other = ASHA(1, 4, 2, seed=3), ASHA(1, 4, 2, seed=4)
    seeds = [asha.trial_seed(trial) for trial in range(100)]
    assert len(set(seeds)) == 100
    assert seeds == [ASHA(1, 8, 4, seed=3).trial_seed(trial) for trial in range(100)]
    assert other.trial_seed(0) != seeds[0]


def test_a_single_rung_trains_every_candidate_fully() -> None:
    asha = ASHA(5, 5, 2, candidates=3)
    assert run(asha, lambda trial, resource: float(trial)) == [Job(trial, 0, 5, 1) for trial in range(3)]
    assert asha.best() == Best(0, 5, 0.0)


def test_the_best_compares_like_with_like() -> None:
    asha = ASHA(1, 2, 2, candidates=2)
    run(asha, lambda trial, resource: 0.1 if resource == 1 else 0.7)
    assert asha.best() == Best(0, 2, 0.7)  # 0.1 was measured at another resource


def test_a_lost_segment_list_tells_a_restart_what_to_declare_failed() -> None:
    asha = ASHA(1, 4, 2, candidates=4)
    jobs = [asha.next(), asha.next(), asha.next()]
    answer(asha, jobs[1], 1.0)  # type: ignore[arg-type]
    assert asha.running() == [jobs[0], jobs[2]]
    assert asha.in_flight == 2
    for job in asha.running():
        asha.failed(job.trial, job.attempt, cause="the process was killed")
    assert asha.running() == []
    assert asha.in_flight == 0
    assert not asha.finished
    assert asha.next() == Job(0, 0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "minimum"}, "mode is 'minimum', but must be 'min' or 'max'"),
        ({"candidates": 0}, "candidates is 0, but must be >= 1"),
        ({"candidates": 2.5}, "candidates is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"quota": "yes"}, "quota is 'yes'"),
        ({"brackets": 9}, "has 5 rungs"),
        ({"brackets": 0}, "brackets is 0"),
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"budget": 100}, "training one trial fully takes 256"),
    ],
)
def test_arguments_that_cannot_be_taken_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ASHA(1, 256, 4, **arguments)


@pytest.mark.parametrize("value", ["0.5", True, 1j, [1.0], object(), 10**400])
def test_a_value_that_is_no_number_is_refused(value: object) -> None:
    asha = ASHA(1, 2, 2)
    asha.next()
    with pytest.raises(UsageError, match="value is"):
        asha.report(0, 1, value)


@pytest.mark.parametrize("value", [1, np.float32(1.0), np.int64(1), np.array(1.0)])
def test_numbers_of_any_kind_are_taken(value: object) -> None:
    asha = ASHA(1, 1, 2)
    asha.next()
    asha.report(0, 1, value)
    assert asha.best() == Best(0, 1, 1.0)


def test_a_paused_trial_takes_no_report_but_the_one_that_it_made() -> None:
    asha = ASHA(1, 4, 2)
    asha.next()
    asha.report(0, 1, 0.5, attempt=1)
    with pytest.raises(SchedulerError, match="attempt 2 was never issued, the latest is 1"):
        asha.report(0, 1, 0.5, attempt=2)
    with pytest.raises(SchedulerError, match="but it is paused at 1: evaluate exactly"):
        asha.report(0, 2, 0.5)
    assert isinstance(asha.report(0, 1, 0.5), Ignored)
    asha.next()
    asha.failed(1)
    waits = asha.failed(1, attempt=1)
    assert isinstance(waits, Ignored)
    assert "waits for another try" in waits.reason


def test_brackets_share_the_candidates_as_hyperband_does() -> None:
    asha = ASHA(1, 16, 4, candidates=20_000, brackets=3, seed=1)
    starts = Counter(job.to_resource for job in (asha.next() for _ in range(20_000)) if job is not None)
    # Weights 16, 6, 3 of 25; five standard deviations of a binomial: false alarm below 2e-6 over seeds, and this one is fixed.
    for level, weight in ((1, 16), (4, 6), (16, 3)):
        share = weight / 25
        assert abs(starts[level] / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5


def test_a_trial_that_was_never_started_is_refused() -> None:
    asha = ASHA(1, 2, 2)
    for call in (
        lambda: asha.report(0, 1, 0.5),
        lambda: asha.failed(0),
        lambda: asha.stop(0),
        lambda: asha.status(0),
        lambda: asha.forget(0, 0),
    ):
        with pytest.raises(SchedulerError, match="trial 0 was never started"):
            call()
