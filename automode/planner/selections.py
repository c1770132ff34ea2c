"""Which training samples a card means: all, between two quantiles of the ledger, of some clusters or slices, or by id."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from automode.planner.parts import Digest, Fraction, Name, Part

INLINE_IDS = 200
"""Longest id list that stands inline on a card; longer ones are artifacts, named by digest."""


class SelectAll(Part):
    """Every training sample."""

    kind: Literal["all"] = "all"


class SelectQuantile(Part):
    """The samples whose ledger metric lies between two quantiles, the likely mislabelled ones left out."""

    kind: Literal["quantile"] = "quantile"
    from_: Fraction = Field(alias="from", description="lower quantile, 0 to 1")
    to: Fraction = Field(description="upper quantile, 0 to 1, above `from`")
    metric: Literal["mean_loss", "last_loss", "ema_loss", "margin"] = Field(
        default="ema_loss", description="which column of the sample ledger"
    )
    exclude_suspects: bool = Field(
        default=True,
        description="leave out samples that are probably label noise; only a person may say false",
    )

    @model_validator(mode="after")
    def _ordered(self) -> SelectQuantile:
        if self.to <= self.from_:
            raise ValueError(f"`to` ({self.to}) must be above `from` ({self.from_})")
        return self


class SelectKMeans(Part):
    """Members of some clusters of the last scan's k-means."""

    kind: Literal["kmeans"] = "kmeans"
    feature: Literal["embedding", "loss", "margin"] = Field(
        default="embedding",
        description="embedding: the input of the last parametric layer; loss and margin: of the sample ledger",
    )
    k: int = Field(ge=2, le=64, description="how many clusters there are")
    clusters: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="which of them, from 0; those of losses and margins from the smallest up"
    )
    window: int = Field(default=4096, ge=16, description="samples that the clusters were fitted on")
    artifact: Digest | None = Field(
        default=None, description="centroids of the scan that the clusters refer to"
    )

    @model_validator(mode="after")
    def _within_k(self) -> SelectKMeans:
        wrong = [c for c in self.clusters if c >= self.k]
        if wrong:
            raise ValueError(
                f"clusters {wrong} do not exist: k is {self.k}, so they run from 0 to {self.k - 1}"
            )
        if len(set(self.clusters)) != len(self.clusters):
            raise ValueError(f"clusters {list(self.clusters)} name one cluster twice")
        return self


class SelectSlices(Part):
    """Members of some named slices; they may overlap."""

    kind: Literal["slices"] = "slices"
    slices: tuple[Name, ...] = Field(
        min_length=1, max_length=64, description="names of slices that are functions of (inputs, targets)"
    )

    @model_validator(mode="after")
    def _once(self) -> SelectSlices:
        if len(set(self.slices)) != len(self.slices):
            raise ValueError(f"slices {list(self.slices)} name one slice twice")
        return self


class SelectIndices(Part):
    """Exact sample ids, inline (at most 200) or as an artifact."""

    kind: Literal["indices"] = "indices"
    ids: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, max_length=INLINE_IDS, description="positions in the dataset under every Subset"
    )
    artifact: Digest | None = Field(default=None, description="a longer list, stored with the session")
    slice: Name | None = Field(default=None, description="the named slice that the ids belong to")

    @model_validator(mode="after")
    def _one_source(self) -> SelectIndices:
        if self.ids is None and self.artifact is None and self.slice is None:
            raise ValueError("needs `ids`, `artifact` or `slice`")
        if self.ids is not None and self.artifact is not None:
            raise ValueError("has both `ids` and `artifact`: keep one")
        if self.ids is not None and not self.ids:
            raise ValueError("`ids` is empty: select at least one sample")
        return self


Selection = Annotated[
    SelectAll | SelectQuantile | SelectKMeans | SelectSlices | SelectIndices, Field(discriminator="kind")
]
