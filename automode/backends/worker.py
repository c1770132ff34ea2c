"""What runs in a worker process: it gets its runner's factory once, then one job after the other, until its parent is gone."""

from __future__ import annotations

import contextlib
import os
import sys
from ctypes import c_double
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from typing import Any

from automode.backends.base import SegmentDone, SegmentFailed, SegmentJob
from automode.backends.lifeline import die_with_parent, leave_interrupts_to_parent, own_inherited_files
from automode.backends.remote import LONGEST_ERROR, Dropped, RemoteRunner, RunnerFactory, run_segment

_PASSES, _BEATS, _UNWANTED = range(3)


class Pulse:
    """Three numbers that a worker and its parent share, so that neither waits for the other.

    Args:
        context: Of the processes that share them.
    """

    def __init__(self, context: BaseContext) -> None:
        self._cells = context.RawArray(c_double, 3)

    @property
    def passes(self) -> float:
        """Sample passes that the segment in progress has spent, as of its last slice."""
        return float(self._cells[_PASSES])

    @passes.setter
    def passes(self, passes: float) -> None:
        self._cells[_PASSES] = passes

    @property
    def beats(self) -> float:
        """Signs of life given so far."""
        return float(self._cells[_BEATS])

    def beat(self) -> None:
        """Give a sign of life."""
        self._cells[_BEATS] += 1.0

    @property
    def unwanted(self) -> float:
        """Number of the last task that was given up."""
        return float(self._cells[_UNWANTED])

    @unwanted.setter
    def unwanted(self, number: float) -> None:
        self._cells[_UNWANTED] = number


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A job on its way to a worker, under a number from 1 that no other has."""

    number: int
    job: SegmentJob
    brief: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The worker has its runner and waits for jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The worker cannot have its runner."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a task."""

    number: int
    result: SegmentDone | SegmentFailed | Dropped


@dataclass(frozen=True, slots=True)
class Sent:
    """A factory on its way to a process that shares no memory with this one: pickled by us, for our own child."""

    pickled: bytes

    def open(self) -> RunnerFactory:
        """Unpickle it, in the worker."""
        factory: RunnerFactory = ForkingPickler.loads(self.pickled)
        return factory


@dataclass(frozen=True, slots=True)
class Inherited:
    """A factory that a forked process has already, and the parent's ends of all workers' pipes, which it must let go of."""

    factory: RunnerFactory
    parents_ends: tuple[Connection, ...]

    def open(self) -> RunnerFactory:
        """Make the process's inheritance its own."""
        for end in self.parents_ends:
            end.close()
        own_inherited_files()
        return self.factory


def work(connection: Connection, pulse: Pulse, parcel: Sent | Inherited) -> None:
    """Serve until the parent closes the connection; the whole life of a worker process.

    Args:
        connection: Tasks come in, :class:`Ready` or :class:`Refused` and then an :class:`Ended` for every task go out.
        pulse: Shared with the parent.
        parcel: The factory.
    """
    leave_interrupts_to_parent()
    die_with_parent(pulse.beat)
    with contextlib.suppress(
        EOFError, BrokenPipeError, ConnectionResetError
    ):  # the parent has closed its end
        try:
            one_thread()
            factory = parcel.open()
            one_thread()  # unpickling may be what has imported torch
            runner = factory(None)
        except Exception as error:  # whatever a user's objects raise here is the reason
            connection.send(Refused(reason=f"{type(error).__name__}: {error}"[:LONGEST_ERROR]))
            return
        serve(connection, pulse, runner)


def serve(connection: Connection, pulse: Pulse, runner: RemoteRunner) -> None:
    """Run tasks as they come.

    Raises:
        EOFError: The parent has closed its end.
    """
    connection.send(Ready())
    while True:
        task: Task = connection.recv()

        def go_on(passes: float, number: int = task.number) -> bool:
            pulse.passes = passes
            return pulse.unwanted != number

        result = run_segment(runner, task.job, task.brief, go_on)
        connection.send(Ended(number=task.number, result=result))


def one_thread() -> None:
    """Keep torch to one thread: workers share the cores, and a forked process has none of its parent's thread pool."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for what is not imported yet
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
