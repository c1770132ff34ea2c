"""How several states become one: what a card may say of its merge.

Trained along one trajectory, averages win almost everywhere at equal compute; the other ways are a menu for a person who
knows why, and stand before the same judge.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from automode.planner.parts import Fraction, Part, Positive


class MergeSwa(Part):
    """Averages along the trunk's own trajectory (Izmailov et al. 2018, arXiv:1803.05407): EMA at two horizons and the tail."""

    kind: Literal["swa"] = "swa"


class MergeUniform(Part):
    """The plain mean of the control and the finished specialists."""

    kind: Literal["uniform"] = "uniform"


class MergeGreedy(Part):
    """Greedy soup (Wortsman et al. 2022, arXiv:2203.05482), scored on the first held-out half."""

    kind: Literal["greedy"] = "greedy"


class MergeInterpolate(Part):
    """The best point between the control and the best specialist, by the first held-out half (WiSE-FT)."""

    kind: Literal["interpolate"] = "interpolate"
    weights: tuple[Fraction, ...] = Field(
        default=(0.25, 0.5, 0.75, 1.0),
        min_length=1,
        max_length=16,
        description="shares of the specialist that are tried",
    )


class MergeFisherSoup(Part):
    """Fisher-weighted average (Matena and Raffel 2022, arXiv:2111.09832)."""

    kind: Literal["fisher_soup"] = "fisher_soup"
    samples: int = Field(
        default=256,
        ge=1,
        le=1_000_000,
        description="training samples that each state's Fisher information is estimated on",
    )
    floor: Positive = Field(
        default=1e-3, le=1.0, description="smallest Fisher value, as a share of its tensor's mean"
    )


class MergeDistill(Part):
    """One network that learns what the control and the specialists say together (Hinton et al. 2015, arXiv:1503.02531).

    The student trains at the control's own rates, held constant, on the trunk's training samples; labels are not read. Its steps and
    its teachers' passes are paid by the card, and the control is given as much. Measured: below half of the run's compute it
    ties with or loses to simply training on.
    """

    kind: Literal["distill"] = "distill"
    temperature: Positive = Field(default=2.0, description="of both softmaxes; for values it has no meaning")
    steps: int = Field(default=200, ge=1, description="training steps of the student")
    teacher: Literal["ensemble", "mixture"] = Field(
        default="ensemble",
        description="ensemble: the mean answer of control and specialists; mixture: the card's router over them",
    )
    student: Literal["control", "specialist"] = Field(
        default="control", description="which weights it starts from: the control's, or the best specialist's"
    )
    lr_mul: Positive = Field(default=1.0, le=1e4, description="factor on the control's rates")


class MergeAdapterFuse(Part):
    """The sum of low-rank deltas B A, for specialists that trained adapters only, each times one weight."""

    kind: Literal["adapter_fuse"] = "adapter_fuse"
    weights: tuple[Positive, ...] = Field(
        default=(0.5, 1.0),
        min_length=1,
        max_length=16,
        description="weights that are tried, the same for every adapter; the best by the first held-out half",
    )
    onto: Literal["base", "control"] = Field(
        default="base",
        description="what the sum is added to: the fork that the adapters were trained on, or the control",
    )


MergeRecipe = Annotated[
    MergeSwa
    | MergeUniform
    | MergeGreedy
    | MergeInterpolate
    | MergeFisherSoup
    | MergeDistill
    | MergeAdapterFuse,
    Field(discriminator="kind"),
]
