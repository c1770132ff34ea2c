"""A run that is cut, or sent back, and goes on: from which of its stored states, and how exactly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from automode.planner.recipes import Digest, Part


class Checkpointed(Part):
    """The run's complete state at a step boundary is durable: it can be taken up from here."""

    kind: Literal["checkpointed"] = "checkpointed"
    checkpoint: Digest
    step: int
    why: str


class Resumed(Part):
    """The run was taken up from a checkpoint; what the log held after ``at_seq`` is out of the story."""

    kind: Literal["resumed"] = "resumed"
    checkpoint: Digest
    at_seq: int = Field(ge=1, description="the checkpointed event that the run goes on from")
    step: int
    attempt: int = Field(ge=2)
    exact: bool = Field(description="what follows equals the run that was cut, bit for bit")
    why_approximate: str | None = None
    looks: tuple[str, ...] = Field(
        default=(),
        description="what each look at val-B was at, by its number, superseded ones included (engine.resuming.looked_at)",
    )
    total_steps: int | None = Field(
        default=None, ge=0, description="steps of the run, where it was made longer than it was begun"
    )
    actor: str | None = Field(
        default=None, description="who had an earlier state loaded; null: a run that was cut goes on"
    )
