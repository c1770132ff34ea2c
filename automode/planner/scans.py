"""What reading the sample ledger and clustering the probe samples came to."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from automode.planner.recipes import Digest, Part

Detail: TypeAlias = Literal["gradient_norm", "embedding"]
"""What a scan may keep of the samples that it reads, for the ledger's export; nothing is decided by it."""


class Scanned(Part):
    """The sample ledger was read."""

    kind: Literal["scanned"] = "scanned"
    step: int
    n: int = Field(description="samples seen so far")
    visits: float = Field(description="mean visits a sample")
    quantiles: dict[str, tuple[float, ...]] = Field(
        default_factory=dict, description="101-point quantiles by metric"
    )
    tail_mean: float | None = Field(default=None, description="mean EMA loss of the tail without suspects")
    tail_n: int = 0
    suspects: int = 0
    left_out: int = Field(
        default=0, ge=0, description="suspects that the trunk trains on no more, or with another label"
    )
    noise: float | None = Field(
        default=None, description="estimated share of wrong labels; null: cannot tell"
    )
    why: str = Field(default="", description="the estimate, or why there is none, in words")
    artifact: Digest | None = None
    review: Digest | None = Field(
        default=None, description="the list of suspects for a person, one row each (session.suspects.COLUMNS)"
    )
    passes: float = Field(default=0.0, ge=0)
    rest: int = Field(
        default=0,
        ge=0,
        description="steps without a scan that the wall-clock share of the policy asks for now",
    )


class Clustered(Part):
    """The probe samples were clustered by their features."""

    kind: Literal["clustered"] = "clustered"
    step: int
    feature: Literal["embedding", "loss", "margin"]
    k: int
    sizes: tuple[int, ...]
    losses: tuple[float, ...] = Field(description="mean loss of each cluster, suspects left out")
    errors: tuple[float, ...] = Field(description="standard error of each mean")
    tops: tuple[str, ...] = Field(default=(), description="in words, what each cluster mostly holds")
    noise: tuple[float, ...] = Field(default=(), description="share of suspects in each cluster")
    likelihoods: dict[int, float] = Field(
        default_factory=dict,
        description="mean held-out log-likelihood a sample of a mixture of so many, which chose k",
    )
    ari: float | None = Field(default=None, description="agreement with the scan before, on the same samples")
    artifact: Digest | None = None
    passes: float = Field(default=0.0, ge=0)
