"""Answers to what touches the trunk at once (rewinds, rates, caps), and to what only looks at it (diagnostics)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from automode.planner.recipes import Part


class Rewound(Part):
    """Answer to Rewind: a good state is back in the trunk, at the clock of now."""

    kind: Literal["rewound"] = "rewound"
    step: int = Field(description="the trunk's step, which goes on from here")
    to_step: int = Field(description="step that the state was kept at")
    rate_factor: float
    rates: tuple[float, ...] = Field(description="learning rate of each parameter group from here on")


class RateSet(Part):
    """Answer to SetLearningRate, or what a person has set."""

    kind: Literal["rate_set"] = "rate_set"
    step: int
    factor: float
    rates: tuple[float, ...]
    why: str
    card: str | None = None
    actor: str | None = Field(default=None, description="who set it; null: a safeguard")


class ClipSet(Part):
    """Answer to SetClip."""

    kind: Literal["clip_set"] = "clip_set"
    step: int
    norm: float | None
    why: str
    card: str | None = None


class UpdateSize(Part):
    """How far one parameter group moves in a step of Adam, from its optimizer state."""

    rms: float = Field(
        description="root mean square of m / (sqrt(v) + eps), bias-corrected; 1: every sign agrees"
    )
    ratio: float = Field(description="root mean square of a step over that of the weights")
    surprise: float | None = Field(
        default=None, description="root mean square of g / sqrt(v) of the last gradient; well above 1: v lags"
    )


class Diagnosed(Part):
    """Answer to Diagnose: numbers for cards. What could not be had has its reason in ``missing`` and no number."""

    kind: Literal["diagnosed"] = "diagnosed"
    step: int
    gradient_variance: float | None = Field(
        default=None, description="trace of the covariance of one sample's gradient, unbiased"
    )
    gradient_square: float | None = Field(
        default=None, description="squared norm of the mean gradient, unbiased; may fall below 0"
    )
    examples: int = Field(default=0, description="samples behind these two")
    sharpness: float | None = Field(default=None, description="largest eigenvalue of the loss's Hessian")
    residual: float | None = Field(
        default=None, description="|Hv - sharpness v| over |sharpness|; 0: converged"
    )
    stability: float | None = Field(
        default=None, description="sharpness times rate over 2 (1 + momentum); SGD with one rate only"
    )
    updates: tuple[UpdateSize | None, ...] = Field(default=(), description="of each parameter group")
    missing: dict[str, str] = Field(
        default_factory=dict, description="reason by name of what could not be had"
    )
    passes: float = Field(default=0.0, ge=0)
    rest: int = Field(
        default=0,
        ge=0,
        description="steps without a diagnosis that the wall-clock share of the policy asks for now",
    )
