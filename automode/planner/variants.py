"""Ways of training a specialist: variants written out, and spaces that variants are drawn from.

A space maps fields of a variant to what may be drawn for them. Its ends are checked as the variants that they would become, so that
a space which reaches too far is refused when it is read and not when a trial starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from automode.planner.parts import Name, Part, Positive

DRAWN: Final = "draw"
"""Beginning of the names of drawn variants; their number follows, from 0."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Adapter(Part):
    """Low-rank deltas on linear layers, trained in place of the weights (Hu et al. 2022, arXiv:2106.09685).

    The fork stays frozen, and what is offered is the fork with the deltas ``alpha / rank * B A`` merged in. A step is priced as any other.
    Rank-stabilised scales, trained biases and DoRA are no part of it: no sum of deltas could say them.
    """

    rank: int = Field(default=8, ge=1, le=65_536, description="of the deltas; smaller than a layer's sides")
    alpha: Positive = Field(default=16.0, le=1e6, description="the deltas are scaled by alpha / rank")
    targets: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="names of linear layers, `*` for any letters; null: all that are no smaller than the rank",
    )


class Variant(Part):
    """One way of training the specialist. Defaults mean: exactly as the trunk trains."""

    name: Name = Field(description="what tables and stories call it")
    lr_mul: Positive = Field(default=1.0, le=1e4, description="factor on every group's learning rate")
    weight_decay_mul: float = Field(
        default=1.0, ge=0.0, le=1e4, allow_inf_nan=False, description="factor on every group's weight decay"
    )
    weight_decay: float | None = Field(
        default=None, ge=0.0, le=10.0, description="absolute, in place of the factor"
    )
    clip_norm: Positive | None = Field(
        default=None, description="largest gradient norm; null: as the trunk clips"
    )
    optimizer: Literal["keep", "sgd", "adam", "adamw", "sam"] = Field(
        default="keep", description="sam wraps the trunk's own optimizer; a step then costs two"
    )
    sam_rho: Positive = Field(default=0.05, description="radius of a sharpness-aware step")
    ema: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="decay of the weight average that the variant offers as its candidate"
    )
    precision: Literal["keep", "fp32", "bf16"] = Field(
        default="keep",
        description="arithmetic of the forward pass; fp16 would need gradient scaling, which no trial has",
    )
    loss_weight: Positive = Field(
        default=1.0, le=100.0, description="weight of selected samples against the others"
    )
    batches: Literal["selected", "all"] = Field(
        default="selected",
        description="selected: of the selection, with replay; all: of all samples as they come, which loss_weight then weighs",
    )
    batch_mul: Positive = Field(
        default=1.0,
        le=64.0,
        description="factor on the batch size, of the trial alone: a step costs as many ordinary ones; once adopted, the trunk goes on with "
        "its own batches, rates, decay and clipping",
    )
    updates: int = Field(
        default=1,
        ge=1,
        le=64,
        description="parts that each batch is trained on in, with an optimizer step each: as many samples in more steps; once adopted, the "
        "trunk's batches are too",
    )
    schedule: Literal["keep", "constant", "anneal"] = Field(
        default="keep",
        description="keep the trunk's schedule, hold the rate, or go linearly to zero by the top rung",
    )
    labels: Literal["keep", "relabel"] = Field(
        default="keep",
        description="the labels that the data have, or the new ones of `relabel`, with which excluded samples come back",
    )
    adapter: Adapter | None = Field(
        default=None, description="train low-rank adapters on the frozen fork; null: train all of it"
    )
    restart: bool = Field(
        default=False,
        description="start from the run's first weights, with the optimizer state of then and fresh averages, instead of from the trunk",
    )


ANNEALED_CONTROL: Final = Variant(name="control annealed", schedule="anneal")
"""How the control of a card that anneals is trained: as the trunk, but for its rate. No variant may have its name."""


class DrawLogUniform(Part):
    """Any number between two ends, its logarithm evenly: as many draws between 0.1 and 1 as between 1 and 10."""

    kind: Literal["log_uniform"] = "log_uniform"
    low: Positive = Field(description="least value")
    high: Positive = Field(description="greatest value, above `low`")

    @model_validator(mode="after")
    def _ordered(self) -> DrawLogUniform:
        _rising(self.low, self.high)
        return self

    def ends(self) -> tuple[float, ...]:
        """Values that hold for all: what a variant takes at both ends, it takes between them."""
        return (self.low, self.high)

    def points(self) -> int | None:
        """How many values there are; None where a grid could not count them."""
        return None

    def as_space(self) -> dict[str, Any]:
        """Return the entry that :class:`automode.scheduler.Candidates` draws from."""
        return {"low": self.low, "high": self.high, "log": True}


class DrawUniform(Part):
    """Any number between two ends evenly, or with `step` those that lie so far apart from `low` on."""

    kind: Literal["uniform"] = "uniform"
    low: Finite = Field(description="least value")
    high: Finite = Field(description="greatest value, above `low`")
    step: Positive | None = Field(default=None, description="distance of neighbours; null: every number")

    @model_validator(mode="after")
    def _ordered(self) -> DrawUniform:
        _rising(self.low, self.high)
        _fitting(self.step, self.low, self.high)
        return self

    def ends(self) -> tuple[float, ...]:
        """Values that hold for all: what a variant takes at both ends, it takes between them."""
        return (self.low, self.high)

    def points(self) -> int | None:
        """How many values there are; None where a grid could not count them."""
        return None if self.step is None else _count(self.low, self.high, self.step)

    def as_space(self) -> dict[str, Any]:
        """Return the entry that :class:`automode.scheduler.Candidates` draws from."""
        return {"low": self.low, "high": self.high} | ({} if self.step is None else {"step": self.step})


class DrawInt(Part):
    """A whole number between two ends, both of them among the draws."""

    kind: Literal["int"] = "int"
    low: int = Field(ge=-(10**9), le=10**9, description="least value")
    high: int = Field(ge=-(10**9), le=10**9, description="greatest value, above `low`")
    step: int = Field(default=1, ge=1, description="distance of neighbours")

    @model_validator(mode="after")
    def _ordered(self) -> DrawInt:
        _rising(self.low, self.high)
        _fitting(self.step, self.low, self.high)
        return self

    def ends(self) -> tuple[float, ...]:
        """Values that hold for all: what a variant takes at both ends, it takes between them."""
        return (self.low, self.high)

    def points(self) -> int | None:
        """How many values there are."""
        return _count(self.low, self.high, self.step)

    def as_space(self) -> dict[str, Any]:
        """Return the entry that :class:`automode.scheduler.Candidates` draws from."""
        return {"low": self.low, "high": self.high, "step": self.step, "integer": True}


class DrawChoice(Part):
    """One of a few values, whatever their kind."""

    kind: Literal["choice"] = "choice"
    choices: tuple[Finite | int | bool | str | None, ...] = Field(
        min_length=1, max_length=64, description="the values"
    )

    @field_validator("choices")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = [v for i, v in enumerate(value) if v in value[:i]]
        if twice:
            raise ValueError(f"`choices` names {twice[0]!r} twice")
        return value

    def ends(self) -> tuple[Any, ...]:
        """Every value: each of them has to be one that a variant takes."""
        return self.choices

    def points(self) -> int | None:
        """How many values there are."""
        return len(self.choices)

    def as_space(self) -> dict[str, Any]:
        """Return the entry that :class:`automode.scheduler.Candidates` draws from."""
        return {"choices": list(self.choices)}


Draw = Annotated[DrawLogUniform | DrawUniform | DrawInt | DrawChoice, Field(discriminator="kind")]


class SearchSpace(Part):
    """Variants drawn by Optuna's samplers, all of them before the first trial starts."""

    parameters: dict[str, Draw] = Field(
        min_length=1, max_length=16, description="fields of a variant, each with what is drawn for it"
    )
    draws: int = Field(ge=1, le=64, description="how many variants to draw")
    sampler: Literal["tpe", "random", "grid"] = Field(
        default="tpe",
        description="tpe draws as random does while it has been told no result; grid takes every combination once",
    )

    @model_validator(mode="after")
    def _drawable(self) -> SearchSpace:
        known = set(Variant.model_fields) - {"name", "adapter"}  # no single value can be drawn for these
        unknown = sorted(set(self.parameters) - known)
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: no such field of a variant; known are {', '.join(sorted(known))}"
            )
        for name, draw in self.parameters.items():
            for value, why in _refused(name, draw):
                raise ValueError(f"`{name}`: {value!r} cannot be taken: {why}")
        if self.sampler == "grid":
            self._counted()
        return self

    def _counted(self) -> None:
        size = 1
        for name, draw in self.parameters.items():
            points = draw.points()
            if points is None:
                raise ValueError(
                    f"a grid needs values that can be counted: give `{name}` as a choice, as int, or uniform with a `step`"
                )
            size *= points
        if self.draws > size:
            raise ValueError(f"the grid has {size} points, and `draws` asks for {self.draws}")

    @cached_property
    def corners(self) -> tuple[tuple[str, Variant], ...]:
        """Each field with each of its ends as the variant that it would become."""
        return tuple(
            (name, Variant.model_validate({"name": "corner", name: value}))
            for name, draw in self.parameters.items()
            for value in draw.ends()
        )

    def as_space(self) -> dict[str, dict[str, Any]]:
        """Return the space that :class:`automode.scheduler.Candidates` draws from."""
        return {name: draw.as_space() for name, draw in self.parameters.items()}


class EarlyStopping(Part):
    """Stop a trial whose training loss no longer falls; it is looked at ten times a rung, as a mean since the last look."""

    patience: int = Field(default=3, ge=1, le=1000, description="looks in a row without a new best")
    min_delta: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="how far below the best a new best must lie"
    )


def _refused(name: str, draw: Draw) -> Iterator[tuple[Any, str]]:
    for value in draw.ends():
        try:
            Variant.model_validate({"name": "corner", name: value}, strict=True)
        except ValidationError as error:
            yield value, error.errors(include_url=False)[0]["msg"]


def _rising(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"`low` ({low:g}) must be below `high` ({high:g})")


def _fitting(step: float | None, low: float, high: float) -> None:
    if step is not None and step > high - low:
        raise ValueError(f"`step` ({step:g}) does not fit between `low` ({low:g}) and `high` ({high:g})")


def _count(low: float, high: float, step: float) -> int:
    return math.floor((Decimal(str(high)) - Decimal(str(low))) / Decimal(str(step))) + 1
