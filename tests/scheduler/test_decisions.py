"""Every decision says why in words and becomes a record that strict JSON can hold."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest

from automode.scheduler import (
    Decision,
    Diverged,
    Finished,
    Held,
    Ignored,
    Job,
    Lost,
    Paused,
    Promoted,
    Requeued,
    Retried,
    Started,
    Stopped,
    decision_record,
)
from automode.scheduler.decisions import decode_value, encode_value

JOB = Job(3, 4, 16, 2)
EXAMPLES: dict[type, tuple[Decision, str]] = {
    Started: (Started(job=Job(3, 0, 4, 1), bracket=0), "trial 3 starts: nothing is due for promotion"),
    Promoted: (
        Promoted(job=JOB, bracket=0, level=4, rank=0, size=9, due=2, rule="rank"),
        "trial 3 is number 1 of 9 at 4, where the best 2 go on to 16",
    ),
    Retried: (Retried(job=JOB), "trial 3 repeats 4 to 16, attempt 2"),
    Paused: (
        Paused(trial=3, resource=4, value=0.5, rank=2, size=9, due=2),
        "trial 3 is number 3 of 9 at 4: not within the best 2",
    ),
    Finished: (
        Finished(trial=3, resource=16, value=0.5, rank=0, size=1),
        "trial 3 is fully trained (16): number 1 of 1",
    ),
    Diverged: (
        Diverged(trial=3, resource=4, value=math.inf),
        "trial 3 reported inf at 4: counted, never promoted",
    ),
    Requeued: (
        Requeued(trial=3, resource=4, attempt=2, cause="killed"),
        "trial 3 failed on its way to 4 (killed); attempt 2 is next",
    ),
    Lost: (
        Lost(trial=3, resource=4, attempt=3, cause="killed"),
        "trial 3 is given up on its way to 4 after attempt 3: killed",
    ),
    Stopped: (Stopped(trial=3, cause="on request"), "trial 3 was stopped: on request"),
    Ignored: (Ignored(trial=3, resource=None, attempt=1, reason="late"), "late"),
    Held: (
        Held(trial=3, resource=4, attempt=1),
        "trial 3 at 4 waits for slower segments that end before it in virtual time",
    ),
}


def test_every_kind_of_decision_has_its_example() -> None:
    assert set(get_args(Decision)) == set(EXAMPLES)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_decision_says_why_and_becomes_a_record(kind: type) -> None:
    decision, reason = EXAMPLES[kind]
    record = json.loads(json.dumps(decision_record(decision), allow_nan=False))
    assert record["reason"] == decision.reason == reason
    assert record["kind"] == kind.__name__.lower()
    assert record["trial"] == 3


@pytest.mark.parametrize("value", [0.1, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf, None])
def test_values_survive_json(value: float | None) -> None:
    again = decode_value(json.loads(json.dumps(encode_value(value), allow_nan=False)))
    assert repr(again) == repr(value)
