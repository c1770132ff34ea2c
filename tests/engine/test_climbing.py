"""How far a ladder has come: what is due is what the rule can promote, and a finished ladder has done all of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from automode.engine.climbing import climb_of
from automode.engine.state import Execution
from automode.planner.events import TrialReported
from automode.planner.recipes import Variant
from automode.scheduler import ASHA

DIGEST = "sha256:" + "0" * 64


@given(
    n=st.integers(1, 20),
    eta=st.integers(2, 4),
    top=st.integers(1, 40),
    values=st.lists(st.floats(-1, 1), min_size=60, max_size=60),
)
def test_a_ladder_that_is_climbed_to_its_end_has_done_all_that_was_due(
    n: int, eta: int, top: int, values: list[float]
) -> None:
    asha = ASHA(1, top, eta, mode="max", candidates=n, quota=True)
    execution = Execution(
        card="c",
        action="fork",
        started_at=0,
        variants=tuple(Variant(name=f"v{i}") for i in range(n)),
        asha=asha,
    )
    before = climb_of(execution)
    assert before is not None
    assert before.done == 0
    assert before.best is None
    while (job := asha.next()) is not None:
        value = values[len(execution.reports)]
        asha.report(job.trial, job.to_resource, value, job.attempt)
        execution.reports[(job.trial, job.to_resource)] = TrialReported(
            card="c",
            trial=job.trial,
            rung_attempt=job.attempt,
            resource=job.to_resource,
            value=value,
            choice="raw",
            checkpoint=DIGEST,
            passes=1.0,
            stopped_early=False,
            seconds=0.0,
        )
        now = climb_of(execution)
        assert now is not None
        assert now.total == before.total
        assert 0 < now.done <= now.total
    assert now.done == now.total == asha.spent
    assert all(rung.done == rung.due for rung in now.rungs)
    assert now.best is not None
    assert f"trial {now.best[0]} leads" in now.text
    assert f"{n}/{n} at {asha.ladder.levels[0]}" in now.text


def test_a_card_without_a_ladder_climbs_nothing() -> None:
    assert climb_of(Execution(card="c", action="merge", started_at=0)) is None
