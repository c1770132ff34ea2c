"""The parts of a plan card: what data, which variants, which router, which merge, which evidence.

Every part is a frozen pydantic model that refuses unknown keys. Tagged unions carry a ``kind``. Bounds stand on the fields, so that
the JSON schema, the error messages and the documentation say the same thing. What this version can *run* is a
separate question (:mod:`automode.planner.capability`): the schema lists everything from the start.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

INLINE_IDS = 200
"""Longest id list that stands inline on a card; longer ones are artifacts, named by digest."""

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.:/+ -]+$")]


class Part(BaseModel):
    """Base settings of everything that a person may type: frozen, no unknown keys, NaN written as a string."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        populate_by_name=True,
        serialize_by_alias=True,
    )


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


Selection = Annotated[SelectAll | SelectQuantile | SelectKMeans | SelectIndices, Field(discriminator="kind")]


class EarlyStopping(Part):
    """Stop a trial whose training loss no longer falls; it is looked at ten times a rung, as a mean since the last look."""

    patience: int = Field(default=3, ge=1, le=1000, description="looks in a row without a new best")
    min_delta: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="how far below the best a new best must lie"
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
        default="keep", description="arithmetic of the forward pass"
    )
    loss_weight: Positive = Field(
        default=1.0, le=100.0, description="weight of selected samples against replayed ones"
    )
    batch_mul: Positive = Field(default=1.0, le=64.0, description="factor on the batch size")
    schedule: Literal["keep", "constant", "anneal"] = Field(
        default="keep",
        description="keep the trunk's schedule, hold the rate, or go linearly to zero by the top rung",
    )


class SearchSpace(Part):
    """Variants drawn by Optuna's samplers in place of a fixed list, all of them before the first trial starts."""

    parameters: dict[str, dict[str, Any]] = Field(
        min_length=1,
        max_length=16,
        description="field of a variant to its `choices`, or to `low` and `high` (and `log`, `step`, `integer`)",
    )
    n: int = Field(ge=2, le=64, description="how many variants to draw")
    sampler: Literal["tpe", "random", "grid"] = Field(
        default="tpe", description="tpe draws as random does while it has been told no result"
    )

    @field_validator("parameters")
    @classmethod
    def _known(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        unknown = sorted(set(value) - (set(Variant.model_fields) - {"name"}))
        if unknown:
            raise ValueError(f"{unknown} are no fields of a variant")
        for name, spec in value.items():
            if not (set(spec) >= {"choices"} or set(spec) >= {"low", "high"}):
                raise ValueError(f"`{name}` needs `choices` or `low` and `high`, and has {sorted(spec)}")
        return value


class TrainingRecipe(Part):
    """How the specialists train: the variants, what is replayed, when a trial stops early."""

    replay: Fraction = Field(default=0.1, description="share of each batch drawn from outside the selection")
    variants: tuple[Variant, ...] = Field(
        default=(), max_length=64, description="a trial each; either these or `search`"
    )
    search: SearchSpace | None = Field(default=None, description="variants to draw")
    early_stopping: EarlyStopping | None = Field(
        default=None, description="null: every trial reaches its rung"
    )
    exclude: Selection | None = Field(default=None, description="samples that no batch may hold")
    relabel: Digest | None = Field(default=None, description="artifact of new labels by sample id")

    @model_validator(mode="after")
    def _some_variants(self) -> TrainingRecipe:
        if bool(self.variants) == (self.search is not None):
            raise ValueError("needs either `variants` or `search`")
        names = [v.name for v in self.variants]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"variant names {twice} stand twice")
        return self

    @property
    def candidates(self) -> int:
        """How many trials the recipe starts."""
        return self.search.n if self.search is not None else len(self.variants)


class GateRecipe(Part):
    """A switch-softmax router over the parent's own features (Fedus et al. 2021, arXiv:2101.03961)."""

    kind: Literal["switch_softmax"] = "switch_softmax"
    temperature: Positive = Field(default=1.0, description="of the softmax over the experts")
    load_balance: float = Field(
        default=0.01, ge=0.0, le=10.0, description="weight of the loss that spreads samples over the experts"
    )
    epochs: int = Field(default=5, ge=1, le=1000, description="passes over val-A")
    top1: bool = Field(default=False, description="answer with the best expert alone, not with the mixture")


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
    """One network taught by the routed specialists (Hinton et al. 2015, arXiv:1503.02531)."""

    kind: Literal["distill"] = "distill"
    temperature: Positive = Field(default=2.0, description="of the teachers' softmax")
    steps: int = Field(default=200, ge=1, description="training steps of the student")


class MergeAdapterFuse(Part):
    """The sum of low-rank deltas B A, for specialists that trained adapters only."""

    kind: Literal["adapter_fuse"] = "adapter_fuse"


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


class Asha(Part):
    """The ladder above the first rung (Li et al. 2020, arXiv:1810.05934)."""

    reduction_factor: int = Field(
        default=3, ge=2, le=16, description="one trial in so many goes on from a rung, and one at least"
    )
    max_steps: int = Field(ge=1, description="resource of the top rung, in ordinary training steps")


class Acceptance(Part):
    """The held-out evidence that adoption needs: paired, one-sided, against the control."""

    against: Literal["control"] = Field(
        default="control", description="the trunk itself, simply continued for the same compute"
    )
    metric: Literal["utility", "accuracy", "nll", "huber", "mse"] = Field(
        default="utility",
        description="utility = 0.8 accuracy + 0.2 p(y) for classes, minus Huber loss for values",
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
