"""The parts of the policy that hold the thresholds of one rule each."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from automode.planner.recipes import Fraction, Part, Positive


class SpikePolicy(Part):
    """When a step stands out (robust z in log space)."""

    window: int = Field(default=101, ge=21, le=1001, description="steps that a step is compared with")
    warmup: int = Field(default=25, ge=10, description="steps before the first comparison")
    loss_z: Positive = Field(default=4.5, description="robust z of a loss that is a spike")
    grad_norm_z: Positive = Field(default=6.0, description="robust z of a gradient norm that is a spike")
    joint_z: Positive = Field(
        default=5.5,
        le=8.0,
        description="sum of the two, each cut at 6, over the square root of 2, that is a spike",
    )
    shift_z: Positive = Field(default=7.0, description="rise of the loss's level that makes a card, sigmas")
    count: int = Field(default=3, ge=1, description="spikes within `within` steps that make a card")
    within: int = Field(default=100, ge=1, description="steps over which spikes are counted")
    unapplied: int = Field(default=5, ge=1, description="optimizer steps in a row that were not applied")

    @model_validator(mode="after")
    def _consistent(self) -> SpikePolicy:
        if self.warmup > self.window:
            raise ValueError(f"warmup ({self.warmup}) exceeds window ({self.window})")
        if self.count > self.within:
            raise ValueError(f"{self.count} spikes cannot fit within {self.within} steps")
        return self


class SlicePolicy(Part):
    """When a named slice is worse than the rest for long enough to be worth a card."""

    persist: int = Field(default=3, ge=1, description="validations in a row")
    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        default=0.05, description="chance that one validation calls any slice worse although none is"
    )
    gap: Positive = Field(default=0.02, le=1.0, description="least shortfall in mean utility, at each")


class GapPolicy(Part):
    """When a held-out loss that rises under a falling training loss is worth a card."""

    persist: int = Field(default=2, ge=1, description="validations in a row at which the test holds")
    rise: Positive = Field(default=0.05, description="least relative rise of the held-out loss over its best")
    stop_after: int | None = Field(
        default=8,
        ge=4,
        le=12,
        description="validations since the best from which a stop is proposed; null: never",
    )


class ProbePolicy(Part):
    """When the learning rate is probed, as shares of the run."""

    from_: Fraction = Field(default=0.05, alias="from", description="no probe before this share of the run")
    until: Fraction = Field(default=0.15, description="no probe after this share of the run")
    share: Fraction = Field(
        default=0.025, description="most of the run's compute that each trial of a probe may take"
    )
    restart_share: Fraction = Field(
        default=0.08,
        description="most that all of them may take where the loss has not come down",
    )
    longer_share: Fraction = Field(
        default=0.17,
        description="most that a longer trial may take, of a rate that the probe could not tell from the trunk's; 0: none",
    )
    longer_until: Fraction = Field(default=0.35, description="no longer trial after this share of the run")
    steps_share: Fraction = Field(
        default=0.08,
        description="most that several steps on each batch may take, tried in a run that is too short for a trial of its rate",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ProbePolicy:
        if self.until <= self.from_:
            raise ValueError(f"`until` ({self.until}) must be above `from` ({self.from_})")
        return self


class NoisePolicy(Part):
    """When wrong labels are left out of the training data, or replaced."""

    from_: Fraction = Field(
        default=0.25, alias="from", description="no scan before this share of the run is believed"
    )
    min_noise: Fraction = Field(default=0.10, description="label-noise estimate that is worth a card")
    least_found: Fraction = Field(
        default=0.5, description="suspects must be at least this share of the estimate; else export only"
    )
    most_found: Positive = Field(
        default=1.25,
        description="and at most this multiple: pruning too much costs twice what too little does",
    )
    confidence: Fraction = Field(
        default=0.8, description="least share of a suspect's neighbours that must have its new label"
    )
