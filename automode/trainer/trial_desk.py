"""Trials between the log and the backend: commands become jobs, results become the answers to them."""

from __future__ import annotations

from typing import assert_never

from automode.backends.base import Backend, SegmentDone, SegmentFailed, SegmentJob
from automode.backends.stacked import StackedBackend
from automode.errors import NotExecutableError
from automode.planner.events import Acknowledged, StartTrial, StopTrial, TrialFailed, TrialReported


class TrialDesk:
    """Hands segments to a backend, and remembers which command each of them answers.

    Args:
        backend: Runs segments; None where forks are refused.
    """

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend
        self._commands: dict[tuple[str, int, int], str] = {}
        self._lower: dict[str, set[str]] = {}

    @property
    def busy(self) -> bool:
        """Whether any segment is queued or running."""
        return self._backend is not None and self._backend.busy

    def start(self, body: StartTrial, command_id: str) -> None:
        """Submit a segment; its report comes later.

        Raises:
            NotExecutableError: This run has no backend.
        """
        if self._backend is None:
            raise NotExecutableError("this run trains no specialists, so it has no backend for trials")
        job = SegmentJob(
            card=body.card,
            trial=body.trial,
            attempt=body.rung_attempt,
            variant=body.variant,
            base=body.base,
            checkpoint=body.checkpoint,
            from_resource=body.from_resource,
            to_resource=body.to_resource,
            top_resource=body.top_resource,
            per_trunk_step=body.per_trunk_step,
        )
        self._commands[job.key] = command_id
        self._backend.submit(job)

    def stop(self, body: StopTrial) -> Acknowledged:
        """Give a segment up; what it had spent is told."""
        key = (body.card, body.trial, body.rung_attempt)
        self._commands.pop(key, None)
        spent = self._backend.cancel(*key) if self._backend is not None else 0.0
        return Acknowledged(command=body.kind, card=body.card, passes=spent)

    def pump(self, trunk_steps: int) -> list[tuple[TrialReported | TrialFailed, str | None]]:
        """Let the backend work for so many trunk steps; returns what ended, each with the command that it answers."""
        if self._backend is None:
            return []
        ended = self._backend.pump(trunk_steps)
        for result in ended:
            if isinstance(result, SegmentDone) and result.job.to_resource < result.job.top_resource:
                self._lower.setdefault(result.job.card, set()).add(result.checkpoint)
        return [(_reported(r), self._commands.pop(r.job.key, None)) for r in ended]

    def notes(self) -> list[tuple[str, str]]:
        """What the backend has to say since the last call, as (card, text): who trains alone, and why."""
        if not isinstance(self._backend, StackedBackend):
            return []
        return [
            (note.card, f"trials {', '.join(str(trial) for trial in note.trials)}: {note.text}")
            for note in self._backend.notes()
        ]

    def dropped(self, card: str, checkpoints: set[str]) -> set[str]:
        """Of checkpoints that the ladder has dropped, those that are still there; told once."""
        mine = self._lower.get(card, set())
        gone = mine & checkpoints
        mine -= gone
        return gone

    def lower_rungs(self, card: str) -> set[str]:
        """Checkpoints below the top rung of a card that has ended; told once."""
        return self._lower.pop(card, set())

    def close(self) -> None:
        """Give everything up."""
        if self._backend is not None:
            self._backend.close()


def _reported(result: SegmentDone | SegmentFailed) -> TrialReported | TrialFailed:
    job = result.job
    match result:
        case SegmentDone():
            return TrialReported(
                card=job.card,
                trial=job.trial,
                rung_attempt=job.attempt,
                resource=job.to_resource,
                value=result.value,
                choice=result.choice,
                checkpoint=result.checkpoint,
                passes=result.passes,
                stopped_early=result.stopped_early,
                seconds=result.seconds,
            )
        case SegmentFailed():
            return TrialFailed(
                card=job.card,
                trial=job.trial,
                rung_attempt=job.attempt,
                resource=job.to_resource,
                error=result.error,
                retryable=result.retryable,
                passes=result.passes,
            )
        case _:
            assert_never(result)
