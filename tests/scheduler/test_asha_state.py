"""A scheduler state that is damaged or foreign is refused; a good one is plain, strict JSON."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from automode.errors import SchedulerError
from automode.scheduler import ASHA

State = dict[str, Any]


def busy() -> ASHA:
    """Give a scheduler that has seen a bit of everything."""
    asha = ASHA(1, 9, 3, candidates=20, seed=4)
    for step in range(14):
        job = asha.next()
        assert job is not None
        if step == 3:
            asha.failed(job.trial, job.attempt)
        elif step == 6:
            asha.failed(job.trial, job.attempt, retryable=False)
        elif step != 10:
            asha.report(
                job.trial, job.to_resource, math.nan if step == 8 else float(step), attempt=job.attempt
            )
    job = asha.next()
    assert job is not None
    asha.failed(job.trial, job.attempt)
    return asha


def test_a_state_is_strict_json_and_comes_back_equal() -> None:
    asha = busy()
    text = json.dumps(asha.to_state(), allow_nan=False)
    again = ASHA.from_state(json.loads(text))
    assert json.dumps(again.to_state(), allow_nan=False) == text
    assert (again.best(), again.spent, again.unusable, again.digest, again.running(), again.in_flight) == (
        asha.best(), asha.spent, asha.unusable, asha.digest, asha.running(), asha.in_flight,
    )  # fmt: skip
    assert again.unusable == 1


def test_a_state_shares_nothing_with_the_scheduler() -> None:
    asha = busy()
    state = asha.to_state()
    kept = copy.deepcopy(state)
    while (job := asha.next()) is not None:
        asha.report(job.trial, job.to_resource, 1.0, attempt=job.attempt)
    assert state == kept


def paused(state: State) -> int:
    return int(state["trials"]["status"].index("paused"))


DAMAGES: dict[str, Callable[[State], Any]] = {
    "no such state": lambda s: s.clear(),
    "another version": lambda s: s.update(version=2),
    "a foreign key": lambda s: s.update(extra=1),
    "a float for an int": lambda s: s.update(seq=3.5),
    "a bad ladder": lambda s: s.update(max_resource=0),
    "too many brackets": lambda s: s.update(brackets=9),
    "a bracket missing": lambda s: s["reports"].clear(),
    "a rung missing": lambda s: s["reports"][0].pop(),
    "a bad digest": lambda s: s.update(chain="xyz"),
    "a NaN in the clear": lambda s: s["reports"][0][0]["value"].__setitem__(0, math.nan),
    "an unknown status": lambda s: s["trials"]["status"].__setitem__(0, "asleep"),
    "a column cut short": lambda s: s["trials"]["rung"].pop(),
    "a report column cut short": lambda s: s["reports"][0][0]["seq"].pop(),
    "an impossible target": lambda s: s["trials"]["target"].__setitem__(0, 7),
    "an impossible rung": lambda s: s["trials"]["rung"].__setitem__(paused(s), 2),
    "an impossible origin": lambda s: s["trials"]["origin"].__setitem__(0, 5),
    "an impossible attempt": lambda s: s["trials"]["attempt"].__setitem__(0, 4),
    "impossible checkpoints": lambda s: s["trials"]["held"].__setitem__(0, 1 << 9),
    "more trials than candidates": lambda s: s.update(candidates=2),
    "a retry too many": lambda s: s["retries"].append(0),
    "a retry forgotten": lambda s: s["retries"].clear(),
    "an unknown trial in a rung": lambda s: s["reports"][0][0]["trial"].__setitem__(0, 99),
    "a trial twice in a rung": lambda s: s["reports"][0][0]["trial"].__setitem__(
        0, s["reports"][0][0]["trial"][1]
    ),
    "a sequence number twice": lambda s: s["reports"][0][0]["seq"].__setitem__(
        0, s["reports"][0][0]["seq"][1]
    ),
    "a promotion undone": lambda s: s["reports"][0][0].update(
        promoted=[False] * len(s["reports"][0][0]["trial"])
    ),
    "a report lost": lambda s: [column.pop() for column in s["reports"][0][0].values()],
    "a lost trial's report kept": lambda s: s["trials"]["status"].__setitem__(paused(s), "lost"),
    "a paused trial that diverged": lambda s: s["trials"]["status"].__setitem__(paused(s), "diverged"),
    "a trial finished below the top": lambda s: s["trials"]["status"].__setitem__(paused(s), "finished"),
    "an impossible attempt of a report": lambda s: s["reports"][0][0]["attempt"].__setitem__(0, 0),
    "a promoted trial without a value": lambda s: s["reports"][0][0]["value"].__setitem__(
        s["reports"][0][0]["promoted"].index(True), None
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused(damage: str) -> None:
    state = busy().to_state()
    DAMAGES[damage](state)
    with pytest.raises(SchedulerError, match=r"no scheduler state|contradicts itself"):
        ASHA.from_state(state)
