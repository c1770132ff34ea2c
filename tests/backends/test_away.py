"""Backends outside of the training process, by name."""

from __future__ import annotations

import pytest

from automode.backends.away import Away, make_away
from automode.backends.base import SegmentDone
from automode.backends.pool import Patience
from automode.backends.process import ProcessBackend
from automode.backends.remote import ReadyMade
from automode.errors import NotExecutableError, UsageError
from automode.testing.backends import drained
from automode.testing.scripted import ScriptedRunner, scripted_job


def factory() -> ReadyMade:
    return ReadyMade(ScriptedRunner())


def test_a_process_backend_is_made_with_its_options() -> None:
    options = {"patience": Patience(segment=5.0)}
    backend = make_away("process", Away(factory=factory, options=options), slots=3)
    try:
        assert isinstance(backend, ProcessBackend)
        assert backend.slots == 3
        backend.submit(scripted_job())
        assert isinstance(drained(backend, seconds=30.0)[0], SegmentDone)
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("name", "option"), [("process", "uri"), ("ray", "start"), ("process", "brief"), ("ray", "slots")]
)
def test_an_option_that_a_backend_does_not_have_is_refused_before_anything_is_made(
    name: str, option: str
) -> None:
    def never() -> ReadyMade:
        raise AssertionError("nothing is to be copied")

    with pytest.raises(UsageError, match=f"the {name} backend has no option '{option}'; it has "):
        make_away(name, Away(factory=never, options={option: 1}))


def test_a_run_whose_parts_cannot_be_copied_is_told_why() -> None:
    def uncopied() -> ReadyMade:
        raise NotExecutableError("the model cannot be copied")

    with pytest.raises(NotExecutableError, match="the model cannot be copied"):
        make_away("process", Away(factory=uncopied))


def test_a_shared_place_needs_the_sessions_store() -> None:
    with pytest.raises(NotExecutableError, match="given together"):
        make_away("ray", Away(factory=factory, options={"uri": "somewhere"}))
