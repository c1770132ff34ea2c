"""What the training loop tells whoever observes it, and what it asks; the driver is one."""

from __future__ import annotations

from typing import Final, Protocol

from automode.planner.events import Mode
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.observation_block import Block

BY_CALLBACK: Final = "a callback asked for it"
"""Why a run ends that a callback has ended, before its length and for good."""


class Observer(Protocol):
    """What the loop tells, and what it asks.

    Attributes:
        stop_requested: Why the run shall stop at once, or None; callbacks may set it.
    """

    stop_requested: str | None

    @property
    def limit(self) -> int:
        """Step up to which the trunk may train; may shrink during the run."""
        ...

    @property
    def guard(self) -> bool:
        """Whether a loss or gradient that is not finite must not reach the weights."""
        ...

    @property
    def busy(self) -> bool:
        """Whether something needs a boundary after every batch now."""
        ...

    @property
    def stride(self) -> int:
        """Batches from one :meth:`boundary` to the next while nothing is busy: a number that follows from the run alone."""
        ...

    @property
    def charged_steps(self) -> float:
        """Steps' worth of compute that automode has spent."""
        ...

    @property
    def mode(self) -> Mode:
        """The mode that the run is in."""
        ...

    def block(self, block: Block) -> None:
        """Take the rows of consecutive steps; always before :meth:`boundary` and :meth:`tick`."""
        ...

    def tick(self, step: int) -> bool:
        """Let people's requests and the disk have their turn, when the clock says so; nothing is done to the run here.

        Returns:
            Whether somebody asks for something, so that a :meth:`boundary` is due now.
        """
        ...

    def boundary(self, step: int) -> None:
        """Do everything that may happen between two steps."""
        ...

    def skipped(self, step: int, why: str) -> None:
        """Know that the guard kept a step from the weights."""
        ...

    def stepped(self) -> None:
        """Know that a step reached the weights again after skipped ones."""
        ...

    def validated(self, step: int, scores: PerSampleScores) -> None:
        """Know the scores of all validation samples."""
        ...

    def finish(self, step: int, why: str, *, early: bool = False) -> None:
        """Know that the trunk took its last step, ``early`` where the script ended it for good; bring what is pending to an end."""
        ...

    def abort(self, step: int, error: BaseException) -> None:
        """Know that an exception leaves ``fit``."""
        ...
