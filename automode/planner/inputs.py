"""Events that come from the world: past participles told by the driver."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from automode.planner.attempts import Checkpointed, Resumed
from automode.planner.controls import Controlled, HealthChecked, LengthSet, Tested
from automode.planner.interventions import ClipSet, Diagnosed, RateSet, Rewound
from automode.planner.metrics import Metric
from automode.planner.recipes import Digest, Part, Variant
from automode.planner.scans import Clustered, Scanned
from automode.planner.trial_inputs import TrialFailed, TrialReported, TrialsNoted

Mode = Literal["off", "observe", "propose", "act"]
Verb = Literal["approve", "refuse", "edit", "revise", "cancel", "submit", "mode", "rollback"]
Task = Literal["classification", "regression", "sequence", "unknown"]


class Weights(Part):
    """A state that can be judged: a checkpoint, and which of its raw weights and averages is meant."""

    checkpoint: Digest
    choice: str = Field(default="raw", description="raw, ema3, ema10, tail, or ema (the variant's own)")


class Group(Part):
    """Paired differences of one group of held-out samples, as sums that a verdict can be recomputed from.

    ``n`` samples, the mean of candidate minus control utility, their sample variance (ddof 1), and how many samples carry the
    weight (``paired.PairedSummary``).
    """

    n: int = Field(ge=0)
    mean: float
    variance: float
    effective_n: float | None = None


class Run(Part):
    """What the fold needs to know of the run before the first step. Lengths in samples and optimizer steps."""

    total_steps: int = Field(ge=0, description="steps that the user asked for")
    batch: float = Field(gt=0, description="mean samples a step")
    train_samples: int | None = None
    val_a: int = Field(default=0, ge=0)
    val_b: int = Field(default=0, ge=0)
    task: Task = "unknown"
    has_ids: bool = False
    why_no_ids: str | None = None
    exact_losses: bool = False
    why_inexact: str | None = None
    overlap: int = Field(default=0, ge=0, description="validation samples that are training samples too")
    why_no_evidence: str | None = None
    why_no_forks: str | None = Field(default=None, description="why no specialist can be trained in this run")
    why_no_restart: str | None = Field(
        default="the run was begun by a version that kept none",
        description="why no specialist can start from the run's first weights",
    )
    why_no_batch_mul: str | None = Field(
        default=None, description="why no trial can draw batches of another size"
    )
    adjusts: bool = Field(
        default=False,
        description="rules may propose to change the trunk's rate and clipping where no specialist can be trained",
    )
    why_no_rate: str | None = Field(default=None, description="why no card can change the rates in this run")
    slices: dict[str, int] = Field(default_factory=dict, description="held-out samples in each named slice")
    train_slices: tuple[str, ...] = Field(
        default=(), description="slices whose training samples can be found too"
    )
    scheduled: bool = Field(default=False, description="the user drives the rate by a scheduler")
    known_drops: tuple[int, ...] = Field(default=(), description="steps at which the schedule drops the rate")
    averages: bool = False
    keeps_best: bool = Field(
        default=False, description="the best validated state is kept for the finishing merge"
    )
    own_step: bool = Field(default=False, description="the training step is the user's own")
    refresh: int = Field(
        default=0, ge=0, description="training samples that recompute norm statistics; 0: the model has none"
    )
    router: float = Field(
        default=1.0,
        gt=0,
        description="size of a router over four networks relative to the trunk, at the most",
    )
    slots: int = Field(default=1, ge=1, description="segments that the backend runs at once")
    why_no_resources: str | None = Field(
        default="the run was begun by a version that gave trials none",
        description="why a trial cannot be given cores and GPUs of its own",
    )
    device: str = Field(default="cpu", description="kind of device that the trunk trains on, and trials too")
    model_mib: float | None = Field(default=None, description="memory of the weights, MiB")
    bf16: bool = False


class SessionStarted(Part):
    """First event of every log: the mode, the policy and the run."""

    kind: Literal["session_started"] = "session_started"
    session: str
    seed: int = Field(ge=0)
    mode: Mode
    asked_mode: Mode
    why_mode: str | None = Field(default=None, description="why the mode is not the one asked for")
    policy: dict[str, Any]
    policy_digest: Digest
    planner_version: int
    plugins: tuple[str, ...] = Field(
        default=(), description="distributions whose rules took part, with their versions"
    )
    run: Run


class Validated(Part):
    """The trunk was evaluated on the first held-out half (never the second)."""

    kind: Literal["validated"] = "validated"
    step: int
    loss: float
    value: float = Field(description="mean utility, higher is better")
    n: int
    slices: dict[str, Group] = Field(
        default_factory=dict, description="utility of each slice minus the rest's: n, mean, variance"
    )
    passes: float = Field(
        default=0.0, ge=0, description="charged to automode; the user's own validation costs 0"
    )


class Decided(Part):
    """A person (or an approver) answered: the content of one inbox request."""

    kind: Literal["decided"] = "decided"
    request: str = Field(description="id of the request; the same id is handled once")
    verb: Verb
    card: str | None = None
    rev: int | None = None
    actor: str
    note: str = ""
    body: dict[str, Any] | None = Field(default=None, description="an edited or submitted card as plain data")
    mode: Mode | None = None


class Snapshotted(Part):
    """Answer to Snapshot: the trunk's complete state is durable."""

    kind: Literal["snapshotted"] = "snapshotted"
    card: str
    purpose: Literal["base", "control"]
    checkpoint: Digest
    step: int
    value: float | None = Field(
        default=None, description="mean of the metric on val-A, of the best of raw weights and averages"
    )
    metric: Metric = Field(default="utility", description="what the value is the mean of")
    choice: str | None = Field(default=None, description="which of raw, ema3, ema10, tail that was")
    passes: float = Field(default=0.0, ge=0)


class ResolvedPart(Part):
    """A cluster or slice that has a specialist of its own."""

    name: str
    n: int = Field(ge=1, description="its training samples")
    artifact: Digest = Field(description="their ids")


class Resolved(Part):
    """Answer to Resolve: the selection became sample ids."""

    kind: Literal["resolved"] = "resolved"
    card: str
    n: int
    pool: int = Field(description="samples that batches are drawn from in all")
    artifact: Digest | None = Field(default=None, description="their ids; null: the card says which they are")
    excluded: Digest | None = Field(
        default=None, description="ids that no batch holds; null: none, or the card says which they are"
    )
    relabelled: Digest | None = Field(
        default=None,
        description="new labels: sample id, class, and 1 where it is among the selected; null: none",
    )
    new_labels: int = Field(default=0, ge=0, description="how many samples have one")
    variants: tuple[Variant, ...] = Field(description="the trials' variants, a search space drawn out")
    parts: tuple[ResolvedPart, ...] = Field(
        default=(), description="of each trial, where each part has its own; else empty"
    )
    passes: float = Field(default=0.0, ge=0)


class GateFitted(Part):
    """Answer to FitGate: the router over the experts, judged on val-A by cross-fitting."""

    kind: Literal["gate_fitted"] = "gate_fitted"
    card: str
    value: float
    metric: Metric = Field(default="utility", description="what the value is the mean of")
    loads: tuple[float, ...]
    entropy: float
    experts: tuple[str, ...]
    checkpoint: Digest | None = None
    passes: float = Field(ge=0)


class Merged(Part):
    """Answer to Merge: one state made of several, with its utility on val-A."""

    kind: Literal["merged"] = "merged"
    card: str
    method: str
    members: tuple[str, ...]
    weights: Weights
    value: float
    control: Weights | None = Field(
        default=None, description="for a merge card: the raw trunk at the same step"
    )
    control_value: float | None = None
    metric: Metric = Field(default="utility", description="what the values are means of")
    noise_at_most: float | None = Field(
        default=None, description="upper limit on the share of wrong labels, which the metric was chosen by"
    )
    guard: Group | None = Field(
        default=None,
        description="of the trunk's own states: differences from the control on val-A by what must agree with the metric",
    )
    best: Digest | None = Field(
        default=None, description="for the finishing merge: the best state of before, one of the members"
    )
    best_step: int | None = Field(default=None, description="the trunk's step at that state")
    why: str = Field(default="", description="how it came about, and what could not be had")
    step: int
    passes: float = Field(ge=0)


class Evaluated(Part):
    """Answer to Evaluate: candidate against control on a held-out half, as paired sums."""

    kind: Literal["evaluated"] = "evaluated"
    card: str
    candidate: str
    overall: Group
    slices: dict[str, Group] = Field(default_factory=dict)
    metric: Metric = Field(default="utility", description="what the differences are of")
    half: Literal["A", "B"] = Field(default="B", description="A: what the candidate was chosen on")
    guard: Group | None = Field(
        default=None,
        description="of the trunk's own states: differences of accuracy where the log score is compared, and the other way round",
    )
    candidate_metrics: dict[str, float] = Field(default_factory=dict)
    control_metrics: dict[str, float] = Field(default_factory=dict)
    passes: float = Field(ge=0)


class Adopted(Part):
    """Answer to Adopt: the accepted weights are in the trunk (or exported), and durable."""

    kind: Literal["adopted"] = "adopted"
    card: str
    checkpoint: Digest
    before: Digest | None = Field(
        default=None, description="the trunk as it was, for rolling back; null for an export"
    )
    step: int
    into: Literal["trunk", "export"] = Field(description="a mixture of experts is exported beside the trunk")
    left_out: int = Field(
        default=0, ge=0, description="training samples that the trunk now leaves out, in all"
    )
    relabelled: int = Field(
        default=0,
        ge=0,
        description="training samples that the trunk now trains on with another label, in all",
    )


class RolledBack(Part):
    """Answer to RollBack: the state before an adoption is back in the trunk."""

    kind: Literal["rolled_back"] = "rolled_back"
    card: str
    checkpoint: Digest
    step: int


class CommandFailed(Part):
    """A command could not be carried out; its card fails, the run goes on."""

    kind: Literal["command_failed"] = "command_failed"
    command: str = Field(description="kind of the command that failed")
    card: str | None
    error: str
    passes: float = Field(default=0.0, ge=0)


class Safeguarded(Part):
    """A safeguard acted in the loop, at once and without a card."""

    kind: Literal["safeguarded"] = "safeguarded"
    step: int
    what: Literal["skipped", "overflowed", "statistics_restored", "stopped", "averages_reset"] = Field(
        description="overflowed: left out by the gradient scaler of fp16, which lowers its scale by itself"
    )
    why: str


class Acknowledged(Part):
    """Answer to a command with nothing to tell (AskApproval, StopTrial, StopRun)."""

    kind: Literal["acknowledged"] = "acknowledged"
    command: str
    card: str | None = None
    note: str = ""
    passes: float = Field(default=0.0, ge=0, description="spent by what was given up")


class TrunkEnded(Part):
    """The trunk has taken its last training step; what is pending is brought to an end."""

    kind: Literal["trunk_ended"] = "trunk_ended"
    step: int
    why: str
    early: bool = Field(
        default=False,
        description="whoever wrote the script ended the run before its length, and the finish has not come yet",
    )


class RunEnded(Part):
    """Last event of a log that ended well."""

    kind: Literal["run_ended"] = "run_ended"
    step: int
    why: str
    weights: Digest | None = None
    early: bool = Field(
        default=False,
        description="a person stopped it before its length; it can be taken up from its last checkpoint",
    )


Input = Annotated[
    SessionStarted
    | Validated
    | Scanned
    | Clustered
    | Decided
    | Snapshotted
    | Resolved
    | TrialReported
    | TrialFailed
    | TrialsNoted
    | GateFitted
    | Merged
    | Evaluated
    | Adopted
    | RolledBack
    | Rewound
    | RateSet
    | ClipSet
    | Diagnosed
    | CommandFailed
    | Safeguarded
    | Acknowledged
    | Checkpointed
    | Controlled
    | LengthSet
    | Tested
    | HealthChecked
    | Resumed
    | TrunkEnded
    | RunEnded,
    Field(discriminator="kind"),
]
