"""The parts of a plan card: what data, which variants, which router, which merge, which evidence.

Every part is a frozen pydantic model that refuses unknown keys. Tagged unions carry a ``kind``. Bounds stand on the fields, so that
the JSON schema, the error messages and the documentation say the same thing. What this version can *run* is a
separate question (:mod:`automode.planner.capability`): the schema lists everything from the start.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from automode.planner.merge_recipes import (
    MergeAdapterFuse,
    MergeDistill,
    MergeFisherSoup,
    MergeGreedy,
    MergeInterpolate,
    MergeRecipe,
    MergeSwa,
    MergeUniform,
)
from automode.planner.metrics import Metric
from automode.planner.parts import Digest, Fraction, Name, Part, Positive
from automode.planner.resources import Resources
from automode.planner.selections import (
    INLINE_IDS,
    SelectAll,
    SelectIndices,
    Selection,
    SelectKMeans,
    SelectQuantile,
    SelectSlices,
)
from automode.planner.variants import ANNEALED_CONTROL, DRAWN, EarlyStopping, SearchSpace, Variant

__all__ = [
    "INLINE_IDS",
    "Acceptance",
    "Adjustment",
    "Asha",
    "Base",
    "Cost",
    "Digest",
    "EarlyStopping",
    "Fraction",
    "GateRecipe",
    "MergeAdapterFuse",
    "MergeDistill",
    "MergeFisherSoup",
    "MergeGreedy",
    "MergeInterpolate",
    "MergeRecipe",
    "MergeSwa",
    "MergeUniform",
    "Name",
    "Part",
    "Positive",
    "Relabel",
    "RelabelGiven",
    "RelabelPredicted",
    "Resources",
    "SearchSpace",
    "SelectAll",
    "SelectIndices",
    "SelectKMeans",
    "SelectQuantile",
    "SelectSlices",
    "Selection",
    "TrainingRecipe",
    "Variant",
]

MOST_TRIALS = 64
"""Most trials of one card, written out and drawn together."""


class RelabelPredicted(Part):
    """New labels for the excluded samples, where the network and the labels of the nearest other samples say the same class.

    Both are asked once, as the card begins: the trunk's average of the weights where it keeps one, and the samples that are nearest
    by its features, excluded ones not counted. Where too few of those have the label that the network says, the sample stays excluded.
    """

    kind: Literal["predicted"] = "predicted"
    confidence: Fraction = Field(
        default=0.8, description="least share of the neighbours with the label that the network says"
    )
    neighbours: int = Field(default=10, ge=1, le=1000, description="nearest samples that are asked")


class RelabelGiven(Part):
    """New labels that a person gives, after a review of the suspects."""

    kind: Literal["given"] = "given"
    ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, max_length=INLINE_IDS, description="positions in the dataset under every Subset"
    )
    labels: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, max_length=INLINE_IDS, description="the class of each, from 0"
    )

    @model_validator(mode="after")
    def _paired(self) -> RelabelGiven:
        if len(self.ids) != len(self.labels):
            raise ValueError(
                f"{len(self.ids)} `ids` and {len(self.labels)} `labels`: give one label for each"
            )
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("`ids` names one sample twice")
        return self


Relabel = Annotated[RelabelPredicted | RelabelGiven, Field(discriminator="kind")]


class TrainingRecipe(Part):
    """How the specialists train: the variants, what is replayed, when a trial stops early."""

    replay: Fraction = Field(default=0.1, description="share of each batch drawn from outside the selection")
    variants: tuple[Variant, ...] = Field(
        default=(), max_length=64, description="a trial each, before those of `search`"
    )
    search: SearchSpace | None = Field(
        default=None, description="variants to draw, beside or in place of those written out"
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="null: every trial reaches its rung"
    )
    per_part: Literal["equal", "by_size"] | None = Field(
        default=None,
        description="null: every trial is for the whole selection; else one specialist for each of its clusters or slices, which together "
        "train as many times asha.max_steps as there are parts: equal, or by_size, .3 of it equally and .7 by their samples",
    )
    exclude: Selection | None = Field(
        default=None,
        description="samples that no batch may hold: not the trials', and not the trunk's once one is adopted",
    )
    relabel: Relabel | None = Field(
        default=None,
        description="where new labels come from, for the variants that take them; the user's data stay as they are",
    )
    judged: Literal["tail"] | None = Field(
        default=None,
        description="null: the best of raw weights and averages of every trial and of the control; tail: the tail average of the steps since "
        "the fork alone, which shows a rate without its noise, and costs a quarter",
    )
    resources: Resources | None = Field(
        default=None, description="what each trial needs, on a Ray cluster; null: what the backend was told"
    )
    retry: bool = Field(
        default=True,
        description="whether a trial that failed is tried again; the card reserves its longest segment once more for that",
    )

    @model_validator(mode="after")
    def _some_variants(self) -> TrainingRecipe:
        if not self.variants and self.search is None:
            raise ValueError("needs `variants`, `search`, or both")
        names = [v.name for v in self.variants]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"variant names {twice} stand twice")
        if self.candidates > MOST_TRIALS:
            raise ValueError(f"{self.candidates} trials are too many: {MOST_TRIALS} at the most")
        if ANNEALED_CONTROL.name in names:
            raise ValueError(f"`{ANNEALED_CONTROL.name}` is the name of a control: give the variant another")
        taken = sorted(n for n in names if self.search is not None and _reserved(n))
        if taken:
            raise ValueError(f"variant names {taken} are those of drawn variants: give others")
        if isinstance(self.relabel, RelabelPredicted) and self.exclude is None:
            raise ValueError("`relabel` predicts labels of the samples of `exclude`, which is missing")
        if (self.relabel is not None) != ("relabel" in self.label_sources):
            raise ValueError(
                "no variant takes the labels of `relabel`: give one `labels: relabel`"
                if self.relabel is not None
                else "a variant takes new labels, and `relabel` does not say where they come from"
            )
        return self

    @property
    def label_sources(self) -> frozenset[str]:
        """What the variants train on: ``keep``, ``relabel``, or both."""
        found: set[str] = {variant.labels for variant in self.variants}
        if self.search is not None:
            drawn = self.search.parameters.get("labels")
            found |= {"keep"} if drawn is None else {str(value) for value in drawn.ends()}
        return frozenset(found)

    @property
    def schedules(self) -> frozenset[str]:
        """How the variants' rates go: ``keep``, ``constant``, ``anneal``, or several of them."""
        found: set[str] = {variant.schedule for variant in self.variants}
        if self.search is not None:
            drawn = self.search.parameters.get("schedule")
            found |= {"keep"} if drawn is None else {str(value) for value in drawn.ends()}
        return frozenset(found)

    @property
    def anneals(self) -> bool:
        """Whether the card needs a control that anneals alike."""
        return "anneal" in self.schedules

    @property
    def restarts(self) -> bool:
        """Whether any trial starts from the run's first weights."""
        drawn = None if self.search is None else self.search.parameters.get("restart")
        return any(v.restart for v in self.variants) or (drawn is not None and any(drawn.ends()))

    @property
    def candidates(self) -> int:
        """How many trials the recipe starts: one a variant, those that are written out first."""
        return len(self.variants) + (self.search.draws if self.search is not None else 0)


def _reserved(name: str) -> bool:
    return name.startswith(DRAWN) and name[len(DRAWN) :].isdigit()


class GateRecipe(Part):
    """A switch-softmax router over the parent's own features (Fedus et al. 2021, arXiv:2101.03961)."""

    kind: Literal["switch_softmax"] = "switch_softmax"
    temperature: Positive = Field(default=1.0, description="of the softmax over the experts")
    load_balance: float = Field(
        default=0.01, ge=0.0, le=10.0, description="weight of the loss that spreads samples over the experts"
    )
    epochs: int = Field(default=5, ge=1, le=1000, description="passes over val-A")
    top1: bool = Field(default=False, description="answer with the best expert alone, not with the mixture")


class Asha(Part):
    """The ladder above the first rung (Li et al. 2020, arXiv:1810.05934)."""

    reduction_factor: int = Field(
        default=3, ge=2, le=16, description="one trial in so many goes on from a rung, and one at least"
    )
    max_steps: int = Field(ge=1, description="resource of the top rung, in ordinary training steps")


class Adjustment(Part):
    """What is changed about the trunk's own training, at once and for good. No control runs beside it, so that nothing proves it."""

    rate_factor: float = Field(
        default=1.0, gt=0.0, le=100.0, description="every learning rate is multiplied by this"
    )
    clip_norm: Positive | None = Field(
        default=None, description="largest gradient norm from then on; null: as it is"
    )

    @model_validator(mode="after")
    def _changes_something(self) -> Adjustment:
        if self.rate_factor == 1.0 and self.clip_norm is None:
            raise ValueError("it changes nothing: give `rate_factor` or `clip_norm`")
        return self


class Acceptance(Part):
    """The held-out evidence that adoption needs: paired, one-sided, against the control."""

    against: Literal["control"] = Field(
        default="control", description="the trunk itself, simply continued for the same compute"
    )
    metric: Metric = Field(
        default="utility",
        description="what each sample is compared by, on both held-out halves: utility = 0.8 accuracy + 0.2 p(y) for classes, minus Huber loss "
        "for values; accuracy, nll or log_score (clipped at p = .001, from 0 to 1) of classes, huber or mse of values",
    )
    z: float = Field(
        default=1.64, ge=0.0, le=10.0, description="least z; the session's alpha may demand more"
    )
    slices: Literal["no_worse", "ignore"] = Field(
        default="no_worse", description="no_worse: a slice whose z lies below -1.64 forbids adoption"
    )


class Cost(Part):
    """What the card may take at the most; one sample pass is one forward pass of one sample, training three."""

    sample_passes: float = Field(ge=0.0, allow_inf_nan=False, description="the worst case, which is reserved")
    share_of_remaining: float = Field(
        ge=0.0, allow_inf_nan=False, description="of the compute that the rest of the run would take"
    )
    memory_mib: float | None = Field(default=None, ge=0.0, description="extra memory at the most, MiB")
    seconds: float | None = Field(default=None, ge=0.0, description="expected extra wall-clock time")


class Base(Part):
    """What the card was made against."""

    step: int = Field(ge=0, description="the trunk's step")
    checkpoint: Digest | None = Field(
        default=None, description="null: the trials' start is taken, and logged, when the card starts"
    )
    policy: Digest = Field(description="digest of the policy in force")
    lineage: str = Field(default="trunk:0", description="which adopted trunk it belongs to")
