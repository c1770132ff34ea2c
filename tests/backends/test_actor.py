"""What an actor of a cluster hears while it trains is about one segment, and about no other."""

from __future__ import annotations

from automode.backends.actor import SegmentActor
from automode.backends.base import SegmentDone, SegmentJob
from automode.backends.remote import Dropped, ReadyMade
from automode.testing.scripted import PASSES_PER_RESOURCE, ScriptedRunner, ScriptedSegment, scripted_job


def test_a_segment_that_is_given_up_ends_with_its_next_slice() -> None:
    actor = SegmentActor(ReadyMade(ScriptedRunner()), None)
    actor.spent(unwanted=1)
    assert actor.run(1, scripted_job(), None) == Dropped(passes=PASSES_PER_RESOURCE)
    assert actor.spent() == PASSES_PER_RESOURCE


def test_giving_up_a_segment_that_has_ended_meanwhile_touches_none_of_the_next_ones() -> None:
    """Another thread hears it, and may be the slower one."""
    later: list[SegmentActor] = []

    class Late(ScriptedRunner):
        def open(self, job: SegmentJob) -> ScriptedSegment:
            if job.trial == 1:
                later[0].spent(unwanted=1)  # after the second segment has begun
            return super().open(job)

    actor = SegmentActor(ReadyMade(Late(scripts={})), None)
    later.append(actor)
    assert isinstance(actor.run(1, scripted_job(0), None), SegmentDone)
    assert isinstance(actor.run(2, scripted_job(1), None), SegmentDone)
    assert actor.spent() == 6 * PASSES_PER_RESOURCE
