"""What the world tells of a card's trials: a rung reached, a segment failed, and how they are trained where that is worth saying."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from automode.planner.metrics import Metric
from automode.planner.recipes import Digest, Part


class TrialReported(Part):
    """A trial reached a rung: its candidate's value on val-A, and its checkpoint."""

    kind: Literal["trial_reported"] = "trial_reported"
    card: str
    trial: int
    rung_attempt: int = Field(ge=1)
    resource: int
    value: float = Field(description="mean of the metric, higher is better; NaN: never promoted")
    metric: Metric = Field(default="utility", description="what the value is the mean of")
    choice: str = "raw"
    checkpoint: Digest | None = None
    passes: float = Field(ge=0)
    stopped_early: bool = False
    seconds: float = 0.0


class TrialFailed(Part):
    """A segment ended without a report."""

    kind: Literal["trial_failed"] = "trial_failed"
    card: str
    trial: int
    rung_attempt: int = Field(ge=1)
    resource: int | None = Field(default=None, description="the rung that it was on its way to")
    error: str
    retryable: bool = True
    passes: float = Field(default=0.0, ge=0)


class TrialsNoted(Part):
    """A backend says how it trains some trials: which of them could not be trained together, and why. Nothing is decided on it."""

    kind: Literal["trials_noted"] = "trials_noted"
    card: str
    trials: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    resource: int = Field(description="the rung that they are on their way to")
    what: str = Field(description="what is done with them")
    why: str

    @property
    def sentence(self) -> str:
        """The note in words."""
        numbers = ", ".join(map(str, self.trials))
        return f"trial{'s' if len(self.trials) > 1 else ''} {numbers} to {self.resource}: {self.what}: {self.why}"

    def says(self, trial: int, other: TrialsNoted) -> bool:
        """Whether it tells of a trial what another note tells: the same done for the same reason, or on the way to the same rung."""
        return (
            trial in self.trials
            and self.what == other.what
            and (self.why == other.why or self.resource == other.resource)
        )
