"""Trials between the log and the backend: what a command says is what the backend is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from automode.backends.inline import InlineBackend
from automode.errors import NotExecutableError
from automode.planner.events import StartTrial
from automode.planner.recipes import Resources, Variant
from automode.testing.scripted import DIGEST, ScriptedRunner
from automode.trainer.trial_desk import TrialDesk


class Giving(InlineBackend):
    """A backend that takes every job, and keeps it."""

    def __init__(self) -> None:
        super().__init__(ScriptedRunner())
        self.jobs: list[Any] = []

    @property
    def why_no_resources(self) -> str | None:
        return None

    def submit(self, job: Any) -> None:
        self.jobs.append(job)


def command(resources: Resources | None) -> StartTrial:
    return StartTrial(
        card="c0ffee00",
        trial=0,
        rung_attempt=1,
        variant=Variant(name="plain"),
        base=DIGEST,
        checkpoint=DIGEST,
        from_resource=0,
        to_resource=6,
        top_resource=18,
        per_trunk_step=1.0,
        resources=resources,
    )


def test_a_job_asks_for_what_its_command_says() -> None:
    for resources in (None, Resources(cpus=2.0, gpus=1.0)):
        backend = Giving()
        desk = TrialDesk(backend)
        desk.start(command(resources), "1")
        assert [job.resources for job in backend.jobs] == [resources]
        assert desk.progress() == [["c0ffee00", 0, 1, 0]]


def test_a_command_that_the_backend_cannot_follow_leaves_nothing_behind() -> None:
    desk = TrialDesk(InlineBackend(ScriptedRunner()))
    with pytest.raises(
        NotExecutableError, match=r"asks for 2 cores and 0 GPUs, .*training process.*leave resources out"
    ):
        desk.start(command(Resources(cpus=2.0)), "1")
    assert not desk.busy
    assert desk.progress() == []
    assert desk.pump(1, 1, {}) == []


def test_a_command_of_an_older_session_asks_for_nothing() -> None:
    stored = command(None).model_dump(mode="json")
    del stored["resources"]
    assert StartTrial.model_validate(stored) == command(None)
