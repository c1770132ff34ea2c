"""Deterministic mode: real speed, failures and restarts leave no trace in the decisions."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.errors import SchedulerError, UsageError
from automode.scheduler import ASHA, Held, Ignored, Job, Lockstep, Lost, Requeued, Stopped, decision_record


def value_of(trial: int, resource: int) -> float:
    """A fixed curve per trial, with a few diverging ones."""
    if trial % 11 == 5 and resource > 1:
        return math.nan
    return (trial * 2654435761 % 97) / 97 + 1.0 / resource


def play(
    slots: int, workers: int, chance: random.Random, *, crashes: float = 0.0, restarts: float = 0.0
) -> tuple[Lockstep, list[str]]:
    """Run with workers that finish in random order and crash, and restarts; give the end and the decision log."""
    lock = Lockstep(ASHA(1, 27, 3, candidates=40, seed=1), slots=slots)
    busy: list[Job] = []
    log: list[str] = []
    while not lock.finished:
        while len(busy) < workers and (job := lock.next()) is not None:
            busy.append(job)
        if busy:
            job = busy.pop(chance.randrange(len(busy)))
            if job.attempt < 3 and chance.random() < crashes:
                assert isinstance(lock.failed(job.trial, job.attempt), Requeued)
            else:
                lock.report(
                    job.trial, job.to_resource, value_of(job.trial, job.to_resource), attempt=job.attempt
                )
        log += [json.dumps(decision_record(each), allow_nan=False) for each in lock.take_decisions()]
        if chance.random() < restarts:
            lock = Lockstep.from_state(json.loads(json.dumps(lock.to_state(), allow_nan=False)))
    return lock, log


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
def test_random_delays_and_worker_counts_give_the_same_decision_log(slots: int) -> None:
    reference, log = play(slots, slots, random.Random(0))
    assert len(log) > 80
    for seed in range(1, 12):
        chance = random.Random(seed)
        again, its_log = play(slots, chance.randint(1, 12), chance)
        assert its_log == log
        assert again.digest == reference.digest
        assert again.to_state() == reference.to_state()


@pytest.mark.parametrize("slots", [1, 4])
def test_crashes_and_restarts_leave_no_trace_in_the_digest(slots: int) -> None:
    reference, _ = play(slots, slots, random.Random(0))
    for seed in range(8):
        chance = random.Random(seed)
        again, _ = play(slots, 5, chance, crashes=0.3, restarts=0.2)
        assert again.digest == reference.digest
        assert again.best() == reference.best()
        assert again.virtual_time == reference.virtual_time
        assert again.asha.spent > reference.asha.spent


def test_the_number_of_slots_is_part_of_what_fixes_the_decisions() -> None:
    digests = {slots: play(slots, 3, random.Random(0))[0].digest for slots in (1, 2, 4)}
    assert len(set(digests.values())) == 3


@given(st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_one_slot_decides_as_the_plain_scheduler_does_on_one_worker(eta: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    plain = ASHA(1, 16, eta + 1, candidates=len(values))
    lock = Lockstep(ASHA(1, 16, eta + 1, candidates=len(values)), slots=1)
    while (job := plain.next()) is not None:
        assert lock.next() == job
        answer = plain.report(job.trial, job.to_resource, values[job.trial], attempt=job.attempt)
        assert lock.report(job.trial, job.to_resource, values[job.trial], attempt=job.attempt) == answer
    assert lock.next() is None
    assert lock.finished
    assert lock.digest == plain.digest


def test_a_report_is_held_until_all_before_it_have_come() -> None:
    lock = Lockstep(ASHA(1, 4, 2, candidates=4), slots=2)
    first, second = lock.next(), lock.next()
    assert first == Job(0, 0, 1, 1)
    assert second == Job(1, 0, 1, 1)
    held = lock.report(1, 1, 0.1, attempt=1)
    assert isinstance(held, Held)
    assert "waits for slower segments" in held.reason
    assert lock.next() is None
    assert lock.running() == [first]
    again = lock.report(1, 1, 0.1, attempt=1)
    assert isinstance(again, Ignored)
    with pytest.raises(SchedulerError, match="one segment has one value"):
        lock.report(1, 1, 0.2, attempt=1)
    assert isinstance(lock.failed(1, attempt=1), Ignored)
    lock.report(0, 1, 0.5, attempt=1)
    assert [type(each).__name__ for each in lock.take_decisions()] == [
        "Started", "Started", "Paused", "Started", "Paused", "Promoted",
    ]  # fmt: skip
    assert lock.take_decisions() == []


def test_a_trial_given_up_for_good_leaves_at_its_place_in_virtual_time() -> None:
    def outcome(order: list[int]) -> str:
        lock = Lockstep(ASHA(1, 4, 2, candidates=4), slots=2)
        assert [lock.next(), lock.next()] == [Job(0, 0, 1, 1), Job(1, 0, 1, 1)]
        for trial in order:
            if trial == 1:
                assert isinstance(lock.failed(1, retryable=False, cause="out of memory"), Held | Lost)
            else:
                lock.report(0, 1, 0.5, attempt=1)
        assert lock.next() == Job(2, 0, 1, 1)
        return lock.digest

    assert outcome([0, 1]) == outcome([1, 0])


def test_what_was_not_handed_out_cannot_come_back() -> None:
    lock = Lockstep(ASHA(1, 4, 2, candidates=4), slots=2)
    assert lock.next() == Job(0, 0, 1, 1)  # trial 1 sits on the second slot, but nobody took it
    with pytest.raises(SchedulerError, match="never handed out"):
        lock.report(1, 1, 0.5)
    with pytest.raises(SchedulerError, match="never handed out"):
        lock.failed(1)


def test_stopping_and_cancelling_free_the_slots() -> None:
    lock = Lockstep(ASHA(1, 4, 2, candidates=4), slots=2)
    lock.next()
    lock.next()
    lock.report(1, 1, 0.5)
    assert isinstance(lock.stop(0), Stopped)
    assert lock.next() == Job(2, 0, 1, 1)
    assert isinstance(lock.report(0, 1, 0.5), Ignored)
    saved = Lockstep.from_state(json.loads(json.dumps(lock.to_state())))
    for each in (lock, saved):
        each.cancel()
        assert each.finished
        assert each.next() is None
        assert isinstance(each.report(2, 1, 0.5), Ignored)
        assert Lockstep.from_state(each.to_state()).finished


def test_closing_an_endless_source_drains_it() -> None:
    lock = Lockstep(ASHA(1, 4, 4), slots=2)
    for _ in range(2):
        job = lock.next()
        assert job is not None
        lock.report(job.trial, job.to_resource, 1.0)
    lock.close()
    while (job := lock.next()) is not None:
        lock.report(job.trial, job.to_resource, 1.0)
    best = lock.best()
    assert best is not None
    assert best.resource == 4


def test_what_cannot_be_taken_is_refused() -> None:
    with pytest.raises(UsageError, match="slots is 0"):
        Lockstep(ASHA(1, 4, 2), slots=0)
    asha = ASHA(1, 4, 2)
    asha.next()
    with pytest.raises(UsageError, match="1 segments in flight"):
        Lockstep(asha, slots=1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.clear(),
        lambda s: s.update(version=3),
        lambda s: s.update(slots=0),
        lambda s: s.update(slots=1),
        lambda s: s["running"].pop(),
        lambda s: s["outbox"].append([9, 0, 1, 1]),
        lambda s: s["arrived"].append([9, 0.5, None]),
        lambda s: s["asha"].update(version=9),
    ],
)
def test_a_damaged_state_is_refused(damage: Any) -> None:
    lock = Lockstep(ASHA(1, 4, 2, candidates=4), slots=2)
    lock.next()
    lock.next()
    lock.report(1, 1, 0.5)
    state = lock.to_state()
    damage(state)
    with pytest.raises(SchedulerError):
        Lockstep.from_state(state)
