"""The process backend: what every backend must do, workers that fail in every way, and no orphan afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from automode.backends import pool, starting
from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentJob, SegmentRunner
from automode.backends.pool import Patience
from automode.backends.process import ProcessBackend
from automode.backends.remote import BriefOf, ReadyMade, RemoteRunner, no_brief
from automode.backends.starting import Start
from automode.errors import NotExecutableError
from automode.testing import BackendConformance
from automode.testing.backends import drained
from automode.testing.scripted import DIGEST, PASSES_PER_RESOURCE, Script, ScriptedRunner, scripted_job
from automode.testing.training import TrainingConformance

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="forks and /proc as Linux has them")


class TestSent(BackendConformance):
    """Runners that can be pickled go to workers of a clean process."""

    def backend(self, runner: SegmentRunner) -> Backend:
        backend = ProcessBackend(ReadyMade(runner), slots=2)
        assert backend.how in ("forkserver", "spawn")
        return backend


@LINUX
class TestInherited(BackendConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return ProcessBackend(ReadyMade(runner), slots=2, start="fork")


@LINUX
class TestInheritedWithRealSpecialists(TrainingConformance):
    def backend(self, runner: SegmentRunner) -> Backend:
        return ProcessBackend(ReadyMade(runner), slots=2, start="fork")


# Segments that do one thing each; this file is no module that a worker could import, so they are inherited.


class Doing:
    """Runs a function of (job, brief) and reports what it returns as the result's choice."""

    def __init__(self, what: Callable[[SegmentJob, Any], object], steps: int = 1) -> None:
        self.what = what
        self.steps = steps

    def __call__(self, checkpoints: str | None) -> RemoteRunner:
        return self

    def open(self, job: SegmentJob, brief: Any) -> DoingSegment:
        return DoingSegment(self, job, brief)


@dataclass
class DoingSegment:
    doing: Doing
    job: SegmentJob
    brief: Any
    passes: float = 0.0

    def advance(self, resource: float) -> bool:
        self.passes += 1.0
        return self.passes >= self.doing.steps

    def finish(self) -> SegmentDone:
        said = str(self.doing.what(self.job, self.brief))
        return SegmentDone(
            job=self.job,
            value=1.0,
            choice=said,
            checkpoint=DIGEST,
            passes=self.passes,
            stopped_early=False,
            seconds=0.0,
        )


@contextmanager
def doing(
    what: Callable[[SegmentJob, Any], object],
    *,
    slots: int = 1,
    patience: Patience | None = None,
    brief: BriefOf = no_brief,
) -> Iterator[ProcessBackend]:
    with closing(
        ProcessBackend(Doing(what), slots=slots, start="fork", patience=patience, brief=brief)
    ) as backend:
        yield backend


def done(backend: ProcessBackend, *jobs: SegmentJob) -> list[SegmentDone | SegmentFailed]:
    for job in jobs:
        backend.submit(job)
    return drained(backend, seconds=120.0)


def said(backend: ProcessBackend, *jobs: SegmentJob) -> list[str]:
    results = done(backend, *jobs)
    assert all(isinstance(r, SegmentDone) for r in results), results
    return [r.choice for r in results if isinstance(r, SegmentDone)]


def gone(pid: int, seconds: float = 60.0) -> bool:
    """Whether a process ends within so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def wait_for(file: Path) -> None:
    """Wait until a worker has made a file."""
    until = time.monotonic() + 60.0
    while not file.exists():
        assert time.monotonic() < until, f"no worker has made {file.name}"
        time.sleep(0.01)


@LINUX
def test_a_worker_lives_on_from_segment_to_segment() -> None:
    with doing(lambda job, brief: os.getpid()) as backend:
        pids = said(backend, *(scripted_job(trial) for trial in range(5)))
    assert len(set(pids)) == 1
    assert int(pids[0]) != os.getpid()


@LINUX
def test_as_many_segments_run_at_once_as_there_are_slots(tmp_path: Path) -> None:
    def met(job: SegmentJob, brief: Any) -> bool:
        (tmp_path / str(job.trial)).touch()
        until = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        return len(list(tmp_path.iterdir())) == 2

    with doing(met, slots=2) as backend:
        assert said(backend, scripted_job(0), scripted_job(1)) == ["True", "True"]


@LINUX
def test_a_worker_computes_on_one_thread() -> None:
    with doing(lambda job, brief: torch.get_num_threads()) as backend:
        assert said(backend, scripted_job()) == ["1"]


@LINUX
def test_workers_forked_from_a_process_that_computes_on_several_threads_can_compute() -> None:
    def backward(_: object = None, __: object = None) -> float:
        layer = torch.nn.Linear(512, 512)
        layer(torch.ones(256, 512)).square().mean().backward()
        assert layer.weight.grad is not None
        return float(layer.weight.grad.abs().sum()) > 0

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert backward()
        with doing(backward, patience=Patience(segment=100.0)) as backend:
            assert said(backend, scripted_job()) == ["True"]
    finally:
        torch.set_num_threads(threads)


# What goes wrong in a worker.


@LINUX
def test_a_worker_that_dies_costs_its_segment_and_no_other() -> None:
    def die_once(job: SegmentJob, brief: Any) -> int:
        if job.trial == 1 and job.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    with doing(die_once) as backend:
        first, second, third = done(backend, scripted_job(0), scripted_job(1), scripted_job(2))
        assert isinstance(first, SegmentDone)
        assert isinstance(second, SegmentFailed)
        assert second.retryable
        assert "the worker died with signal 9" in second.error
        assert second.passes == 1.0
        assert isinstance(third, SegmentDone)
        assert third.choice != first.choice
        (again,) = done(backend, scripted_job(1, attempt=2))
        assert isinstance(again, SegmentDone)


@LINUX
def test_a_segment_that_exits_the_process_is_a_death_too() -> None:
    with doing(lambda job, brief: sys.exit(3)) as backend:
        (failed,) = done(backend, scripted_job())
    assert isinstance(failed, SegmentFailed)
    assert failed.retryable
    assert "exit code 3" in failed.error


@LINUX
def test_a_segment_that_takes_too_long_is_killed_and_may_be_tried_again(tmp_path: Path) -> None:
    def hang(job: SegmentJob, brief: Any) -> int:
        (tmp_path / "hangs").touch()
        while job.attempt == 1:
            time.sleep(0.01)
        return os.getpid()

    with doing(hang) as backend:
        backend.submit(scripted_job())
        wait_for(tmp_path / "hangs")
        backend._patience = Patience(segment=0.4)
        (failed,) = done(backend)
        backend._patience = Patience()  # for an attempt that may take as long as it likes
        assert isinstance(failed, SegmentFailed)
        assert failed.retryable
        assert "not done after 0.4 s" in failed.error
        assert failed.passes == 1.0
        assert said(backend, scripted_job(attempt=2))


@LINUX
def test_a_worker_that_gives_no_sign_of_life_is_killed(tmp_path: Path) -> None:
    def freeze(job: SegmentJob, brief: Any) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    with doing(freeze, patience=Patience(silence=1.5)) as backend:
        (failed,) = done(backend, scripted_job())
    assert isinstance(failed, SegmentFailed)
    assert failed.retryable
    assert "no sign of life for 1.5 s" in failed.error
    assert gone(int((tmp_path / "pid").read_text()))


@LINUX
def test_a_worker_whose_segment_failed_is_replaced() -> None:
    def fail_once(job: SegmentJob, brief: Any) -> int:
        if job.trial == 1:
            raise RuntimeError(os.getpid())
        return os.getpid()

    with doing(fail_once) as backend:
        before, failed, after = done(backend, *(scripted_job(trial) for trial in range(3)))
    assert isinstance(before, SegmentDone)
    assert isinstance(failed, SegmentFailed)
    assert isinstance(after, SegmentDone)
    assert before.choice in failed.error
    assert after.choice != before.choice


@LINUX
def test_an_interrupt_from_the_terminal_is_left_to_the_parent() -> None:
    def interrupted(job: SegmentJob, brief: Any) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "went on"

    with doing(interrupted) as backend:
        assert said(backend, scripted_job()) == ["went on"]


@LINUX
def test_workers_that_can_no_longer_be_had_fail_what_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.02)

    class Once(Doing):
        def __call__(self, checkpoints: str | None) -> RemoteRunner:
            if (tmp_path / "used").exists():
                raise RuntimeError("the licence server is gone")
            (tmp_path / "used").touch()
            return super().__call__(checkpoints)

    backend = ProcessBackend(Once(lambda job, brief: sys.exit(1)), slots=1, start="fork")
    with closing(backend):
        first, *rest = done(backend, *(scripted_job(trial) for trial in range(3)))
    assert first.retryable  # type: ignore[union-attr]
    assert [r.job.trial for r in rest] == [1, 2]
    assert all(isinstance(r, SegmentFailed) and not r.retryable for r in rest)
    assert all("the licence server is gone" in r.error for r in rest if isinstance(r, SegmentFailed))


@LINUX
def test_workers_that_die_as_they_start_are_given_up_after_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.02)

    class Once(Doing):
        def __call__(self, checkpoints: str | None) -> RemoteRunner:
            starts = len(list(tmp_path.iterdir()))
            (tmp_path / str(starts)).touch()
            if starts:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(checkpoints)

    with closing(ProcessBackend(Once(lambda job, brief: sys.exit(1)), slots=1, start="fork")) as backend:
        _, failed = done(backend, scripted_job(0), scripted_job(1))
    assert isinstance(failed, SegmentFailed)
    assert not failed.retryable
    assert "3 workers in a row did not start: the worker died with signal 9" in failed.error
    assert len(list(tmp_path.iterdir())) == 4


@LINUX
def test_a_worker_that_goes_on_is_not_given_up_with_those_that_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "FIRST_PAUSE", 0.05)

    class Single(Doing):
        def __call__(self, checkpoints: str | None) -> RemoteRunner:
            starts = len(list(tmp_path.iterdir()))
            (tmp_path / str(starts)).touch()
            if starts:
                raise MemoryError("no second one fits")
            return super().__call__(checkpoints)

    def slow(job: SegmentJob, brief: Any) -> int:
        time.sleep(0.05)
        if job.trial == 14:
            wait_for(tmp_path / "3")  # the fourth start: they are tried again
        return os.getpid()

    began = time.monotonic()
    with closing(ProcessBackend(Single(slow), slots=2, start="fork")) as backend:
        pids = said(backend, *(scripted_job(trial) for trial in range(15)))
        assert len(set(pids)) == 1
    took = time.monotonic() - began
    # The first worker, and then tries at 0, 0.05, 0.25, 1.05 and 4.25 s at the earliest: less and less often, but they go on.
    earliest = [0.0, 0.0, *(0.05 * (4**n - 1) / 3 for n in range(1, 9))]
    assert 4 <= len(list(tmp_path.iterdir())) <= sum(at <= took for at in earliest)


@LINUX
def test_whatever_is_killed_or_cancelled_when_every_job_is_reported_once_or_was_cancelled() -> None:
    rng = np.random.default_rng(7)

    def work(job: SegmentJob, brief: Any) -> int:
        time.sleep(0.001 * (job.trial % 7))
        return job.trial

    with doing(work, slots=3) as backend:
        waiting = [scripted_job(trial) for trial in range(120)]
        seen: list[tuple[int, int]] = []
        cancelled: list[tuple[int, int]] = []
        submitted: list[SegmentJob] = []
        until = time.monotonic() + 200
        while waiting or backend.busy:
            assert time.monotonic() < until
            if waiting and rng.random() < 0.5:
                submitted.append(waiting.pop())
                backend.submit(submitted[-1])
            up = [w for w in backend._workers if w.ready]  # three that die as they start would end it all
            if rng.random() < 0.02 and up:
                up[int(rng.integers(len(up)))].started.process.kill()
            open_jobs = [j for j in submitted if (j.trial, j.attempt) not in {*seen, *cancelled}]
            if rng.random() < 0.02 and open_jobs:
                job = open_jobs[int(rng.integers(len(open_jobs)))]
                assert backend.cancel(*job.key) in (0.0, 1.0)
                cancelled.append((job.trial, job.attempt))
            for result in backend.pump(1):
                seen.append((result.job.trial, result.job.attempt))
                if isinstance(result, SegmentFailed):
                    assert result.retryable
                    waiting.append(replace(result.job, attempt=result.job.attempt + 1))
                else:
                    assert result.choice == str(result.job.trial)
            time.sleep(0.001)
        handed = [(j.trial, j.attempt) for j in submitted]
        assert sorted([*seen, *cancelled]) == sorted(handed)
        assert len(set(handed)) == len(handed)


# Giving up.


def test_what_a_running_segment_has_spent_is_told_when_it_is_cancelled() -> None:
    runner = ScriptedRunner(scripts={0: Script(seconds=0.005)})
    with closing(ProcessBackend(ReadyMade(runner), slots=1, patience=Patience(cancel=30.0))) as backend:
        backend.submit(scripted_job(0, end=100_000))
        while not backend._workers[0].spent:
            time.sleep(0.005)
        spent = backend.cancel(*scripted_job(0).key)
        assert PASSES_PER_RESOURCE <= spent < 100_000 * PASSES_PER_RESOURCE
        assert not backend.busy
        (after,) = done(backend, scripted_job(1))
        assert isinstance(after, SegmentDone)


@LINUX
def test_a_worker_that_does_not_answer_a_cancellation_is_killed(tmp_path: Path) -> None:
    def hang(job: SegmentJob, brief: Any) -> int:
        (tmp_path / str(job.trial)).write_text(str(os.getpid()))
        while job.trial == 0:
            time.sleep(0.01)
        return os.getpid()

    with doing(hang, patience=Patience(cancel=0.1)) as backend:
        backend.submit(scripted_job(0))
        wait_for(tmp_path / "0")
        assert backend.cancel(*scripted_job(0).key) == 1.0
        assert gone(int((tmp_path / "0").read_text()))
        assert said(backend, scripted_job(1)) != [(tmp_path / "0").read_text()]


@LINUX
def test_a_result_that_nobody_has_fetched_yet_can_still_be_cancelled() -> None:
    with doing(lambda job, brief: os.getpid()) as backend:
        backend.submit(scripted_job(0))
        backend.wait(100.0)
        assert backend.cancel(*scripted_job(0).key) == 1.0
        assert backend.pump(1) == []
        assert not backend.busy


@LINUX
@pytest.mark.parametrize("how", ["cancelled as it ends", "cancelled", "closed"])
def test_the_checkpoint_of_a_segment_that_nobody_wants_is_given_up_with_it(how: str) -> None:
    discarded: list[str] = []
    backend = ProcessBackend(
        Doing(lambda job, brief: 0),
        slots=1,
        start="fork",
        discard=discarded.append,
        patience=Patience(cancel=30.0),
    )
    with closing(backend):
        backend.submit(scripted_job(0))
        if how != "cancelled as it ends":
            backend.wait(100.0)
        if how != "closed":
            assert backend.cancel(*scripted_job(0).key) == 1.0
            assert backend.pump(1) == []
    assert discarded in ([DIGEST], []) if how == "cancelled as it ends" else discarded == [DIGEST]


@LINUX
def test_closing_leaves_no_process_behind() -> None:
    before = _forked_children()
    with doing(lambda job, brief: time.sleep(60), slots=2) as backend:
        backend.submit(scripted_job(0))
        backend.submit(scripted_job(1))
        backend.pump(1)
        assert len(_forked_children() - before) == 2
    assert _forked_children() <= before


def _forked_children() -> set[int]:
    """Children that are copies of this process, not servers that it started."""
    mine, found = psutil.Process().cmdline(), set()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # another test's that ends just now
            if child.cmdline() == mine:
                found.add(child.pid)
    return found


def test_a_closed_backend_takes_no_more_jobs() -> None:
    backend = ProcessBackend(ReadyMade(ScriptedRunner()))
    backend.close()
    with pytest.raises(NotExecutableError, match="the backend is closed"):
        backend.submit(scripted_job())


# What travels.


@LINUX
def test_a_brief_travels_with_its_job_however_long_it_is() -> None:
    ids = np.arange(1_000_000)
    with doing(lambda job, brief: brief.sum(), brief=lambda job: ids[: 10 ** (2 * job.trial)]) as backend:
        assert said(backend, scripted_job(1)) == [str(ids[:100].sum())]
        assert said(backend, scripted_job(3)) == [str(ids.sum())]


@LINUX
def test_a_brief_that_cannot_be_had_fails_its_job_alone() -> None:
    def brief(job: SegmentJob) -> object:
        if job.trial == 0:
            raise ValueError("the card is not known")
        return (lambda: 0) if job.trial == 1 else 7

    with doing(lambda job, brief: brief, brief=brief) as backend:
        unknown, unsendable, fine = sorted(
            done(backend, *(scripted_job(trial) for trial in range(3))), key=lambda r: r.job.trial
        )
    assert isinstance(unknown, SegmentFailed)
    assert not unknown.retryable
    assert "the card is not known" in unknown.error
    assert isinstance(unsendable, SegmentFailed)
    assert isinstance(fine, SegmentDone)
    assert fine.choice == "7"


def test_sending_a_runner_leaves_the_users_tensors_where_they_are() -> None:
    tensor = torch.arange(1000.0)
    runner = ReadyMade(ScriptedRunner(scripts={0: Script(error=Exception(tensor))}))
    with closing(ProcessBackend(runner)) as backend:
        assert backend.how in ("forkserver", "spawn")
        assert isinstance(done(backend, scripted_job())[0], SegmentDone)
    assert not tensor.untyped_storage().is_shared()


@LINUX
def test_a_forked_worker_reads_on_without_moving_the_parents_place_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(100)))
    with path.open("rb", buffering=0) as file:
        file.seek(10)

        def read(job: SegmentJob, brief: Any) -> list[int]:
            return list(file.read(5))

        with doing(read) as backend:
            assert said(backend, scripted_job()) == [str([10, 11, 12, 13, 14])]
            assert file.tell() == 10


# How workers are started.


def test_a_runner_that_cannot_be_pickled_is_inherited_where_that_is_safe_and_refused_elsewhere() -> None:
    factory = Doing(lambda job, brief: "here")
    with pytest.raises(NotExecutableError, match=r"spawn: it cannot be pickled .*use the inline backend"):
        ProcessBackend(factory, start="spawn")
    if sys.platform == "linux":
        with closing(ProcessBackend(factory)) as backend:
            assert backend.how == "fork"
            assert said(backend, scripted_job()) == ["here"]


@LINUX
def test_a_runner_that_a_worker_cannot_import_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("known_here_alone")
    exec("class Runner:\n    def open(self, job): return self.inner.open(job)", vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    runner = module.Runner()
    runner.inner = ScriptedRunner()
    with pytest.raises(NotExecutableError, match="No module named 'known_here_alone'"):
        ProcessBackend(ReadyMade(runner), start="forkserver")
    with closing(ProcessBackend(ReadyMade(runner), slots=1)) as backend:
        assert backend.how == "fork"
        assert isinstance(done(backend, scripted_job())[0], SegmentDone)


def test_a_runner_that_cannot_be_made_in_a_worker_is_refused_with_its_own_words() -> None:
    class Broken(Doing):
        def __call__(self, checkpoints: str | None) -> RemoteRunner:
            raise OSError("the data set is not mounted")

    before = _forked_children()
    with pytest.raises(NotExecutableError, match="the data set is not mounted"):
        ProcessBackend(Broken(lambda job, brief: 0))
    assert _forked_children() <= before


def test_nothing_is_forked_once_the_process_uses_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(NotExecutableError, match=r"fork: .*(cuda|not safe)"):
        ProcessBackend(Doing(lambda job, brief: 0), start="fork")


def test_a_platform_without_a_way_of_starting_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(NotExecutableError, match=r"forkserver: .* has no such way"):
        ProcessBackend(ReadyMade(ScriptedRunner()), start="forkserver")


def test_what_is_too_large_to_send_is_inherited_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "LARGEST_SENT", 10)
    with pytest.raises(NotExecutableError, match="every worker would hold a copy"):
        ProcessBackend(ReadyMade(ScriptedRunner()), start="spawn")
    if sys.platform == "linux":
        with closing(ProcessBackend(ReadyMade(ScriptedRunner()))) as backend:
            assert backend.how == "fork"


def test_a_daemonic_process_may_have_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.current_process", lambda: types.SimpleNamespace(daemon=True))
    with pytest.raises(NotExecutableError, match="runs in a daemonic process itself"):
        ProcessBackend(ReadyMade(ScriptedRunner()))


def test_a_backend_without_slots_is_refused() -> None:
    with pytest.raises(NotExecutableError, match="slots must be at least 1, got 0"):
        ProcessBackend(ReadyMade(ScriptedRunner()), slots=0)


@pytest.mark.slow
def test_workers_from_fresh_interpreters_do_the_same() -> None:
    with closing(ProcessBackend(ReadyMade(ScriptedRunner()), slots=1, start="spawn")) as backend:
        assert isinstance(done(backend, scripted_job())[0], SegmentDone)


UNGUARDED = """
import sys, time
print("script", flush=True)
from contextlib import closing
from automode.backends.process import ProcessBackend
from automode.backends.remote import ReadyMade
from automode.testing.scripted import ScriptedRunner, scripted_job

class Mine(ScriptedRunner):
    pass

with closing(ProcessBackend(ReadyMade(ScriptedRunner()), start=sys.argv[1])) as backend:
    backend.submit(scripted_job())
    while backend.busy:
        backend.wait(1.0)
        for result in backend.pump(1):
            print(type(result).__name__, flush=True)
try:
    ProcessBackend(ReadyMade(Mine()), start=sys.argv[1]).close()
    print("started", flush=True)
except Exception as error:
    print(error, flush=True)
"""


@LINUX
@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_a_script_without_a_main_guard_is_not_run_again_in_its_workers(tmp_path: Path, start: Start) -> None:
    script = tmp_path / "train.py"
    script.write_text(UNGUARDED, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(script), start],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[:2] == ["script", "SegmentDone"]
    assert len(lines) == 3
    if start == "fork":
        assert lines[2] == "started"
    else:
        assert "Mine is defined in the script that was started" in lines[2]


# No orphans.

KILLED = """
import os, sys, time
import psutil
from automode.backends.process import ProcessBackend
from automode.backends.remote import ReadyMade
from automode.testing.scripted import Script, ScriptedRunner, scripted_job

runner = ScriptedRunner(scripts={t: Script(seconds=1.0) for t in range(2)})
backend = ProcessBackend(ReadyMade(runner), slots=2, start=sys.argv[1])
backend.submit(scripted_job(0, end=10_000))
backend.submit(scripted_job(1, end=10_000))
while not all(w.ready and w.job for w in backend._workers) or len(backend._workers) < 2:
    backend.wait(0.1)
    backend.pump(1)
pids = [w.started.process.pid for w in backend._workers]
holder = os.fork()
if holder == 0:  # what a data loader's worker is: it inherits our ends of the pipes, and lives on
    time.sleep(200)
    os._exit(0)
print(holder, *pids, *(c.pid for c in psutil.Process().children() if c.pid != holder), flush=True)
time.sleep(200)
"""


@LINUX
@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_killing_the_parent_leaves_no_worker_behind(start: Start) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, start], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        holder, *pids = [int(word) for word in parent.stdout.readline().split()]
        try:
            assert len(pids) >= 2
            assert all(psutil.pid_exists(pid) for pid in pids)
            parent.kill()
            workers = pids[:2]
            assert all(gone(pid) for pid in workers)
            os.kill(holder, signal.SIGKILL)
            # The server and the tracker of multiprocessing's own see that their pipe is closed, now by everybody.
            assert all(gone(pid) for pid in pids)
        finally:
            for pid in [holder, *pids]:
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)


@LINUX
def test_jobs_are_told_apart_by_card_trial_and_attempt() -> None:
    with doing(lambda job, brief: (job.card, job.trial, job.attempt)) as backend:
        other = replace(scripted_job(0), card="deadbeef")
        assert said(backend, scripted_job(0), other) == [
            str(("c0ffee00", 0, 1)),
            str(("deadbeef", 0, 1)),
        ]
