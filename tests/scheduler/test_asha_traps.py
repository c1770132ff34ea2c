"""The traps that released schedulers fall into, one test each; the numbers are those of the design study's list."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from automode.errors import SchedulerError
from automode.scheduler import ASHA, Diverged, Ignored, Job, Lost, Requeued


def fill(asha: ASHA, values: list[Any]) -> None:
    """Start one candidate per value and report it at the first rung; nobody is promoted in between."""
    jobs = [asha.next() for _ in values]
    for job, value in zip(jobs, values, strict=True):
        assert job is not None
        assert job.from_resource == 0
        asha.report(job.trial, job.to_resource, value, attempt=job.attempt)


def promotions(asha: ASHA) -> list[int]:
    """Collect the trials that an endless source's scheduler promotes right now."""
    trials = []
    while (job := asha.next()) is not None and job.from_resource > 0:
        trials.append(job.trial)
    return trials


@pytest.mark.parametrize("count", [1, 2, 3, 8, 16, 32, 100])
def test_trap_1_a_finite_list_reaches_the_top_rung(count: int) -> None:
    asha = ASHA(1, 256, 4, candidates=count)
    while (job := asha.next()) is not None:
        asha.report(
            job.trial, job.to_resource, 1.0 / (1 + job.trial) + 1.0 / job.to_resource, attempt=job.attempt
        )
    best = asha.best()
    assert best is not None
    assert best.resource == 256
    assert best.trial == count - 1


def test_trap_2_the_first_trial_gets_no_free_pass_to_the_top() -> None:
    asha = ASHA(1, 256, 4)
    spent = []
    for _ in range(1000):
        job = asha.next()
        assert job is not None
        spent.append(job)
        asha.report(job.trial, job.to_resource, float(job.trial % 13), attempt=job.attempt)
    fours = next(index for index, job in enumerate(spent) if job.to_resource == 4)
    assert fours == 4  # four candidates first, then one promotion
    assert next(index for index, job in enumerate(spent) if job.to_resource == 16) >= 16


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_trap_3_what_cannot_be_ranked_is_counted_and_never_promoted(bad: float | None, mode: Any) -> None:
    asha = ASHA(1, 256, 4, mode)
    fill(asha, [bad] * 40)
    assert promotions(asha) == []
    assert asha.unusable == 40
    mixed = ASHA(1, 256, 4, mode)
    fill(mixed, [bad] * 6 + [1e9] + [bad] * 5)
    assert promotions(mixed) == [6]  # the only finite one, in the best 3 of 12
    assert mixed.rungs()[0].size == 12
    assert mixed.rungs()[0].usable == 1


def test_trap_3_a_nan_among_the_values_does_not_disturb_their_order() -> None:
    asha = ASHA(1, 256, 4)
    fill(asha, [5.0, math.nan, 1.0, math.nan, 4.0, math.nan, 0.5, math.nan])
    assert promotions(asha) == [6, 2]
    assert isinstance(asha.report(6, 4, math.nan, attempt=1), Diverged)


@pytest.mark.parametrize("count", [4, 37, 100])
def test_trap_4_equal_values_do_not_switch_early_stopping_off(count: int) -> None:
    asha = ASHA(1, 256, 4)
    fill(asha, [0.5] * count)
    assert promotions(asha) == list(range(count // 4))  # exactly floor(n / eta), the earliest reports


def test_trap_5_a_stream_that_only_improves_is_bounded_by_the_quota() -> None:
    counts = {}
    for quota in (False, True):
        asha = ASHA(1, 4, 4, quota=quota)
        promoted = 0
        for _ in range(401):
            job = asha.next()
            assert job is not None
            promoted += job.from_resource > 0
            asha.report(job.trial, job.to_resource, -float(job.trial), attempt=job.attempt)
        counts[quota] = promoted, asha.rungs()[0].size
    assert counts[False][0] == counts[False][1] - 3  # the paper's rule: all but the first eta - 1
    assert counts[True][0] == counts[True][1] // 4


def test_trap_6_a_value_from_between_the_rungs_enters_none() -> None:
    asha = ASHA(1, 16, 4)
    fill(asha, [0.3, 0.1, 0.2, 0.4])
    assert asha.next() == Job(1, 1, 4, 1)
    before = asha.to_state()
    assert isinstance(asha.report(1, 3, 0.05, attempt=1), Ignored)
    for overshoot in (5, 6, 16, 20):
        with pytest.raises(SchedulerError, match="evaluate exactly at the job's to_resource"):
            asha.report(1, overshoot, 0.05, attempt=1)
    assert asha.to_state() == before


def test_trap_6_one_late_value_does_not_fill_the_rungs_below() -> None:
    asha = ASHA(1, 16, 4)
    asha.next()
    with pytest.raises(SchedulerError, match="its segment runs from 0 to 1"):
        asha.report(0, 16, 0.1)
    assert [view.size for view in asha.rungs()] == [0, 0, 0]


def test_trap_7_a_repeated_report_counts_once_and_a_contradicting_one_is_refused() -> None:
    asha = ASHA(1, 16, 4)
    fill(asha, [0.3, math.nan])
    state = asha.to_state()
    for trial, value in ((0, 0.3), (1, math.nan)):
        again = asha.report(trial, 1, value, attempt=1)
        assert isinstance(again, Ignored)
        assert "was reported before" in again.reason
        with pytest.raises(SchedulerError, match="one segment has one value"):
            asha.report(trial, 1, 0.31, attempt=1)
    assert asha.to_state() == state


def test_trap_8_a_failed_trial_s_value_does_not_compete() -> None:
    asha = ASHA(1, 16, 2)
    fill(asha, [0.0, 1.0, 2.0, 3.0])
    assert promotions(asha) == [0, 1]
    assert isinstance(asha.failed(0, attempt=1, retryable=False), Lost)
    assert asha.rungs()[0].size == 3
    fifth = asha.running()[-1]
    asha.report(fifth.trial, 1, 9.0, attempt=1)
    assert promotions(asha) == [2]  # four are left: the best two are trials 1 and 2


def test_trap_8_a_promotion_that_dies_is_repeated_and_not_burned() -> None:
    asha = ASHA(1, 16, 4)
    fill(asha, [0.3, 0.1, 0.2, 0.4])
    assert asha.next() == Job(1, 1, 4, 1)
    assert isinstance(asha.failed(1, attempt=1), Requeued)
    assert asha.next() == Job(1, 1, 4, 2)


def test_trap_9_the_rungs_survive_a_restart() -> None:
    asha = ASHA(1, 16, 4)
    fill(asha, [0.3, 0.1, 0.2, 0.4])
    running = asha.next()
    assert running == Job(1, 1, 4, 1)
    restarted = ASHA.from_state(json.loads(json.dumps(asha.to_state())))
    assert restarted.rungs() == asha.rungs()
    assert restarted.running() == [running]
    assert isinstance(restarted.failed(1, attempt=1, cause="killed"), Requeued)
    assert restarted.next() == Job(1, 1, 4, 2)
    late = restarted.report(1, 4, 0.5, attempt=1)  # the killed worker was alive after all
    assert isinstance(late, Ignored)


def test_trap_11_the_first_candidates_are_neither_pruned_nor_waved_through() -> None:
    asha = ASHA(1, 16, 4)
    fill(asha, [0.1, 0.2, 0.3])
    assert promotions(asha) == []
    assert asha.status(0).value == "paused"


def test_trap_12_the_same_seed_gives_the_same_brackets_whatever_the_global_state() -> None:
    def first_rungs() -> list[int]:
        asha = ASHA(1, 1000, 10, brackets=3, seed=11)
        return [job.to_resource for job in (asha.next() for _ in range(50)) if job is not None]

    random.seed(1)
    one = first_rungs()
    random.seed(2)
    assert first_rungs() == one
    assert ASHA(1, 1000, 10).ladder.levels == (1, 10, 100, 1000)


def test_trap_13_only_paused_trials_are_promoted_and_each_once() -> None:
    asha = ASHA(1, 16, 4)
    fill(asha, [0.3, 0.1, 0.2, 0.4])
    assert promotions(asha) == [1]
    fresh = [job for job in asha.running() if job.from_resource == 0]
    for job in fresh:
        asha.report(job.trial, 1, 0.5, attempt=1)
    assert 1 not in promotions(asha)


def test_trap_14_a_displaced_promotion_counts_against_the_quota() -> None:
    asha = ASHA(1, 4, 4, quota=True)
    fill(asha, [0.5] * 4)
    assert promotions(asha) == [0]  # and a fifth candidate started
    asha.report(4, 1, 0.1, attempt=1)
    assert promotions(asha) == []  # the rule without quota would let trial 4 go on beside trial 0
    assert asha.rungs()[0].promoted == 1


def test_trap_15_an_old_attempt_is_fenced_off() -> None:
    asha = ASHA(1, 16, 4)
    asha.next()
    asha.failed(0, attempt=1)
    early = asha.report(0, 1, 0.1, attempt=1)
    assert isinstance(early, Ignored)
    with pytest.raises(SchedulerError, match="attempt 2 was never issued"):
        asha.report(0, 1, 0.1, attempt=2)
    assert asha.next() == Job(0, 0, 1, 2)
    late = asha.report(0, 1, 0.1, attempt=1)
    assert isinstance(late, Ignored)
    assert "declared failed" in late.reason
    assert isinstance(asha.failed(0, attempt=1), Ignored)
    asha.report(0, 1, 0.2, attempt=2)
    assert isinstance(asha.report(0, 1, 0.1, attempt=1), Ignored)
    assert isinstance(asha.failed(0, attempt=2), Ignored)  # it reported first
    with pytest.raises(SchedulerError, match="no segment of it is in flight"):
        asha.failed(0)
    with pytest.raises(SchedulerError, match="attempt 3 was never issued"):
        asha.failed(0, attempt=3)
    best = asha.best()
    assert best is not None
    assert best.value == 0.2


def test_trap_15_a_worker_that_dies_after_reporting_does_not_kill_the_next_segment() -> None:
    asha = ASHA(1, 16, 4)
    fill(asha, [0.3, 0.1, 0.2, 0.4])
    assert asha.next() == Job(1, 1, 4, 1)
    late = asha.failed(1, attempt=1, resource=1, cause="the connection broke")
    assert isinstance(late, Ignored)
    assert "its value was reported before the failure" in late.reason
    assert asha.running() == [Job(1, 1, 4, 1)]
    with pytest.raises(SchedulerError, match="trial 1 to 1: attempt 2 was never issued"):
        asha.failed(1, attempt=2, resource=1)
    with pytest.raises(SchedulerError, match="no segment that ends at 16"):
        asha.failed(1, attempt=1, resource=16)
    assert isinstance(asha.failed(1, attempt=1, resource=4), Requeued)


def test_trap_16_stored_values_keep_their_sign() -> None:
    asha = ASHA(1, 4, 2, "max")
    fill(asha, [0.5, 0.75])
    assert asha.to_state()["reports"][0][0]["value"] == [0.5, 0.75]
    best = asha.best()
    assert best is not None
    assert (best.trial, best.value) == (1, 0.75)
