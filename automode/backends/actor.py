"""What runs in an actor of a cluster: a runner, one segment at a time, and the checkpoints that come and go with it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from typing import Any

from automode.backends.base import Segment, SegmentDone, SegmentFailed, SegmentJob
from automode.backends.remote import Dropped, RemoteRunner, RunnerFactory, failure, run_segment
from automode.session.checkpoints import CheckpointStore
from automode.session.mirror import CheckpointMirror


@dataclass(frozen=True, slots=True)
class _Cleared:
    """Opens segments and keeps nothing on this machine's disk: an actor that is killed cannot tidy up."""

    runner: RemoteRunner
    store: CheckpointStore

    def open(self, job: SegmentJob, brief: Any) -> Segment:
        segment = self.runner.open(job, brief)
        self.store.collect([])
        return segment


class SegmentActor:
    """Trains segments; ``spent`` may be called from another thread meanwhile.

    Args:
        factory: Makes the runner.
        uri: The shared place of checkpoints; None: this machine sees the session's own folder.
    """

    def __init__(self, factory: RunnerFactory, uri: str | None) -> None:
        self._spent = 0.0
        self._number = self._unwanted = 0
        self._mirror: CheckpointMirror | None = None
        folder = None
        if uri is not None:
            folder = tempfile.mkdtemp(prefix="automode-")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._store = CheckpointStore(folder)
            self._mirror = CheckpointMirror(self._store, uri)
        self._runner = factory(folder)

    def run(self, number: int, job: SegmentJob, brief: Any) -> SegmentDone | SegmentFailed | Dropped:
        """Train a segment to its rung; its checkpoint is at the shared place when this returns.

        Args:
            number: From 1, and of no other segment that this actor gets.
            job: The job.
            brief: What came with it.
        """
        self._spent, self._number = 0.0, number
        if self._mirror is None:
            return run_segment(self._runner, job, brief, self._go_on)
        try:
            self._mirror.pull(job.checkpoint)
            result = run_segment(_Cleared(self._runner, self._store), job, brief, self._go_on)
            if isinstance(result, SegmentDone):
                self._mirror.push(result.checkpoint)
                self._store.collect([])
        except Exception as error:  # the shared place may fail in any way that its driver knows
            return failure(job, error, self._spent)
        return result

    def spent(self, unwanted: int = 0) -> float:
        """Tell the sample passes of the running segment so far.

        Args:
            unwanted: Number of a segment to be given up; 0: of none. It may have ended by now, and the next one goes on.
        """
        if unwanted:
            self._unwanted = unwanted
        return self._spent

    def _go_on(self, passes: float) -> bool:
        self._spent = passes
        return self._number != self._unwanted
