"""Who runs a segment of a trial, and where: the contract between the scheduler's jobs and whatever trains them.

A *segment* takes one trial from one rung to the next. The backend receives a :class:`SegmentRunner` by injection and
never imports the trainer; it decides only when and where the runner's work happens. ``pump`` is called in the training
thread at step boundaries and returns what has ended since.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from automode.errors import NotExecutableError
from automode.planner.recipes import Resources, Variant

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentJob:
    """One segment to train.

    Attributes:
        card: Id of the plan card.
        trial: Number of the trial within the card, from 0.
        attempt: Attempt at this segment, from 1; an older attempt's result is ignored by the scheduler.
        variant: How to train.
        base: Digest of the trunk's snapshot that the card started from.
        checkpoint: Digest that this segment starts from (the base, or the trial's last rung).
        from_resource: Resource steps already trained.
        to_resource: Resource steps at the end of the segment; a resource step is one ordinary training step's cost.
        top_resource: The top rung, which schedules end at.
        per_trunk_step: Resource steps to train for each step of the trunk.
        resources: What its worker must have; None: what the backend was told.
    """

    card: str
    trial: int
    attempt: int
    variant: Variant
    base: str
    checkpoint: str
    from_resource: int
    to_resource: int
    top_resource: int
    per_trunk_step: float
    resources: Resources | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """What a cancellation names."""
        return (self.card, self.trial, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentDone:
    """A segment that reached its rung: the candidate's held-out value (higher is better) and its durable checkpoint."""

    job: SegmentJob
    value: float
    choice: str
    checkpoint: str
    passes: float
    stopped_early: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFailed:
    """A segment that ended without a value. ``retryable`` is false where the same work would fail the same way."""

    job: SegmentJob
    error: str
    retryable: bool
    passes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """How some trials are trained, where that is worth saying.

    Attributes:
        card: Id of their card.
        trials: Their numbers.
        resource: The rung that they are on their way to, in resource steps.
        what: What is done with them, in a few words that stay the same from note to note.
        why: The reason.
    """

    card: str
    trials: tuple[int, ...]
    resource: int
    what: str
    why: str

    @property
    def text(self) -> str:
        """What and why."""
        return f"{self.what}: {self.why}"


def note(jobs: Sequence[SegmentJob], what: str, why: str) -> Note:
    """Say something of jobs, at least one, of one card on their way to one rung."""
    trials = tuple(job.trial for job in jobs)
    return Note(card=jobs[0].card, trials=trials, resource=jobs[0].to_resource, what=what, why=why)


def without_resources(job: SegmentJob, why: str | None) -> SegmentJob:
    """Give the job back.

    Args:
        job: What came.
        why: Why its worker cannot be given anything of its own; None: it can.

    Raises:
        NotExecutableError: The job asks for something all the same.
    """
    if job.resources is not None and why is not None:
        raise NotExecutableError(
            f"trial {job.trial} of card {job.card} asks for {job.resources.text}, which only a Ray cluster can give, and here {why}: "
            'train with backend="ray", or leave resources out'
        )
    return job


class Segment(Protocol):
    """A segment in progress."""

    def advance(self, resource: float) -> bool:
        """Train for at most so many resource steps; True when the rung is reached."""
        ...

    def finish(self) -> SegmentDone:
        """Evaluate, save and report. Called once, after ``advance`` returned True."""
        ...

    @property
    def passes(self) -> float:
        """Sample passes spent so far."""
        ...


Fate: TypeAlias = Literal["moves", "stays", "ends"]
"""What becomes of a trial's step: it is made, it is left out, or the trial has diverged and is over."""


@runtime_checkable
class StackableSegment(Segment, Protocol):
    """A segment whose steps the backend may take itself, together with those of its like.

    One step is: :meth:`draw`, :meth:`set_rates`, the gradient of :meth:`loss_of`, :meth:`took`, and where this says so clipping, the optimizer's
    update, :meth:`moved`. ``advance`` does all of it for this segment alone, and may follow or precede any whole step.
    """

    @property
    def job(self) -> SegmentJob:
        """What is being trained."""
        ...

    @property
    def model(self) -> nn.Module:
        """Its own copy, in training mode. The storage of its parameters may be replaced while steps are taken for it."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """Its own, over the parameters of :attr:`model`; its state may be written between two steps."""
        ...

    @property
    def precision(self) -> str:
        """Arithmetic of the forward pass: ``fp32``, ``bf16`` or ``fp16``."""
        ...

    @property
    def clip_norm(self) -> float | None:
        """Largest norm of the gradient over all parameters."""
        ...

    @property
    def done(self) -> bool:
        """Whether no step is left to take."""
        ...

    @property
    def steps_left(self) -> int:
        """Optimizer steps to the rung."""
        ...

    @property
    def batch_key(self) -> Hashable:
        """Names the next batch: segments with equal keys draw equal batches, now and after equally many steps."""
        ...

    def isolated(self) -> AbstractContextManager[None]:
        """The segment's own random states inside, carried on from the last time; the parent's are put back after."""
        ...

    def share_randomness(self, other: StackableSegment) -> None:
        """Go on from another segment's random states, which drew for both."""
        ...

    def draw(self) -> Any:
        """Return the next batch. Draws random numbers where the dataset does; does not count as a step."""
        ...

    def set_rates(self) -> None:
        """Write the coming step's learning rates into the optimizer's groups."""
        ...

    def loss_of(self, model: nn.Module, batch: Any, weight: Tensor | None) -> Tensor:
        """Compute the loss of a batch under any weights: a function of its arguments, which torch may transform.

        Args:
            model: Network to call.
            batch: What :meth:`draw` gave.
            weight: Weight of selected samples against replayed ones, a scalar; None: all alike.
        """
        ...

    @property
    def guarded(self) -> bool:
        """Whether :meth:`took` reads the norm of the gradient."""
        ...

    def took(self, loss: float, norm: float) -> Fate:
        """Count a step whose gradient was taken at this loss, and say what becomes of it.

        Args:
            loss: The training loss.
            norm: Of the gradient over all parameters, before it is clipped; any number where nothing is :attr:`guarded`.
        """
        ...

    def moved(self) -> None:
        """Follow up on moved weights: schedule, averages, early stopping."""
        ...

    def charge(self, steps: int) -> None:
        """Count the sample passes of so many more steps, taken to check the arithmetic and not to train."""
        ...


class SegmentRunner(Protocol):
    """Makes segments; injected by the trainer."""

    def open(self, job: SegmentJob) -> Segment:
        """Load the checkpoint and prepare to train."""
        ...


class Backend(Protocol):
    """Runs segments. One conformance suite covers every implementation."""

    @property
    def slots(self) -> int:
        """How many segments run at once."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any segment is queued or running."""
        ...

    @property
    def why_no_resources(self) -> str | None:
        """Why it cannot give a job's worker the cores and GPUs that the job asks for; None: it can."""
        ...

    def submit(self, job: SegmentJob) -> None:
        """Take a job and return at once.

        Raises:
            NotExecutableError: The job asks for resources that this backend has no way to give.
        """
        ...

    def cancel(self, card: str, trial: int, attempt: int) -> float:
        """Give up a job; nothing is reported for it. Returns the sample passes that it had spent."""
        ...

    def pump(self, trunk_steps: int) -> list[SegmentDone | SegmentFailed]:
        """Let work happen for so many trunk steps' worth of time slices; return what has ended."""
        ...

    def notes(self) -> list[Note]:
        """Say since the last call how trials are trained, where that is not as a person would expect of this backend."""
        ...

    def close(self) -> None:
        """Give up everything and free what is held."""
        ...
