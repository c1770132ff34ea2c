"""What the log holds: inputs come from the world, facts are decided, commands ask the world to act.

Inputs are past participles told by the driver; facts are past participles told by the machine; commands are
imperatives whose answer is an input with the same ``command_id``. Bodies are frozen pydantic models tagged by a stable
``kind`` (not a class name). Everything about when, where and why stands on the :class:`Envelope`.

Per-step observations are no pydantic objects: they come as :class:`Rows`, a block of the trunk's frame.

To add an event, add the class to its union: ``match`` with ``assert_never`` in the machine then fails the type check
until it is handled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from automode.planner.cards import CardState, PlanCard
from automode.planner.recipes import Digest, Part, Selection, Variant

Mode = Literal["observe", "propose", "act"]
Verb = Literal["approve", "refuse", "edit", "revise", "cancel", "submit", "mode", "rollback"]
Task = Literal["classification", "regression", "sequence", "unknown"]


class Group(Part):
    """Paired differences of one group of held-out samples, as sums that a verdict can be recomputed from.

    ``n`` samples, the mean of candidate minus control utility, and their sample variance (ddof 1).
    """

    n: int = Field(ge=0)
    mean: float
    variance: float


# ----------------------------------------------------------------------------------------------------------------------- inputs


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
    slices: dict[str, int] = Field(default_factory=dict, description="held-out samples in each named slice")
    scheduled: bool = Field(default=False, description="the user drives the rate by a scheduler")
    known_drops: tuple[int, ...] = Field(default=(), description="steps at which the schedule drops the rate")
    averages: bool = False
    slots: int = Field(default=1, ge=1, description="segments that the backend runs at once")
    seconds: float | None = None
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
    noise: float | None = Field(
        default=None, description="estimated share of wrong labels; null: cannot tell"
    )
    artifact: Digest | None = None
    passes: float = Field(default=0.0, ge=0)


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
    ari: float | None = Field(default=None, description="agreement with the scan before, on the same samples")
    artifact: Digest | None = None
    passes: float = Field(default=0.0, ge=0)


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
        default=None, description="utility on val-A of the best of raw weights and averages"
    )
    choice: str | None = Field(default=None, description="which of raw, ema3, ema10, tail that was")
    passes: float = Field(default=0.0, ge=0)


class Resolved(Part):
    """Answer to Resolve: the selection became sample ids."""

    kind: Literal["resolved"] = "resolved"
    card: str
    n: int
    pool: int = Field(description="samples that batches are drawn from in all")
    artifact: Digest | None = None
    variants: tuple[Variant, ...] = Field(description="the trials' variants, a search space drawn out")


class TrialReported(Part):
    """A trial reached a rung: its candidate's value on val-A, and its checkpoint."""

    kind: Literal["trial_reported"] = "trial_reported"
    card: str
    trial: int
    rung_attempt: int = Field(ge=1)
    resource: int
    value: float = Field(description="mean utility, higher is better; NaN: never promoted")
    choice: str = "raw"
    checkpoint: Digest | None = None
    passes: float = Field(ge=0)
    stopped_early: bool = False
    seconds: float = 0.0


class TrialFailed(Part):
    """A segment ended without a report."""

    kind: Literal["trial_failed"] = "trial_failed"
    card: str
    trial: int
    rung_attempt: int = Field(ge=1)
    error: str
    retryable: bool = True
    passes: float = Field(default=0.0, ge=0)


class GateFitted(Part):
    """Answer to FitGate: the router over the experts, judged on val-A by cross-fitting."""

    kind: Literal["gate_fitted"] = "gate_fitted"
    card: str
    value: float
    loads: tuple[float, ...]
    entropy: float
    experts: tuple[str, ...]
    checkpoint: Digest | None = None
    passes: float = Field(ge=0)


class Merged(Part):
    """Answer to Merge: one state made of several."""

    kind: Literal["merged"] = "merged"
    card: str
    method: str
    members: tuple[str, ...]
    choice: str
    value: float
    control_value: float | None = Field(default=None, description="for a merge card: the raw trunk on val-A")
    checkpoint: Digest
    control_checkpoint: Digest | None = None
    step: int
    passes: float = Field(ge=0)


class Evaluated(Part):
    """Answer to Evaluate: candidate against control on the second held-out half, as paired sums."""

    kind: Literal["evaluated"] = "evaluated"
    card: str
    candidate: str
    overall: Group
    slices: dict[str, Group] = Field(default_factory=dict)
    candidate_metrics: dict[str, float] = Field(default_factory=dict)
    control_metrics: dict[str, float] = Field(default_factory=dict)
    passes: float = Field(ge=0)


class Adopted(Part):
    """Answer to Adopt: the accepted weights are in the trunk (or exported), and durable."""

    kind: Literal["adopted"] = "adopted"
    card: str
    checkpoint: Digest
    step: int
    into: Literal["trunk", "export"] = Field(description="a mixture of experts is exported beside the trunk")


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
    what: Literal["skipped", "stopped", "averages_reset"]
    why: str


class Acknowledged(Part):
    """Answer to a command with nothing to tell (AskApproval, StopTrial, SetLearningRate, StopRun)."""

    kind: Literal["acknowledged"] = "acknowledged"
    command: str
    note: str = ""


class Resumed(Part):
    """The run goes on from a checkpoint; later rows of earlier attempts are superseded."""

    kind: Literal["resumed"] = "resumed"
    attempt: int = Field(ge=2)
    at_seq: int
    step: int


class TrunkEnded(Part):
    """The trunk has taken its last training step; what is pending is brought to an end."""

    kind: Literal["trunk_ended"] = "trunk_ended"
    step: int
    why: str


class RunEnded(Part):
    """Last event of a log that ended well."""

    kind: Literal["run_ended"] = "run_ended"
    step: int
    why: str
    weights: Digest | None = None


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
    | GateFitted
    | Merged
    | Evaluated
    | Adopted
    | RolledBack
    | CommandFailed
    | Safeguarded
    | Acknowledged
    | Resumed
    | TrunkEnded
    | RunEnded,
    Field(discriminator="kind"),
]

# ------------------------------------------------------------------------------------------------------------------------- facts


class ReadingChanged(Part):
    """A signal changed its state."""

    kind: Literal["reading_changed"] = "reading_changed"
    step: int
    name: str
    state: str
    value: float
    threshold: float | None = None
    window: int | None = None


class RuleEvaluated(Part):
    """A rule's outcome, or the reason for its silence, changed."""

    kind: Literal["rule_evaluated"] = "rule_evaluated"
    step: int
    rule: str
    outcome: Literal["fired", "silent", "held"] = Field(description="held: it fired, and pacing said no")
    code: str = Field(description="stable tag of the reason")
    why: str


class CardProposed(Part):
    """A card was made (or submitted by a person)."""

    kind: Literal["card_proposed"] = "card_proposed"
    card: PlanCard


class CardMoved(Part):
    """A card changed its state; an edit carries the new revision."""

    kind: Literal["card_moved"] = "card_moved"
    card: str
    rev: int
    before: CardState
    after: CardState
    actor: str
    why: str
    edited: PlanCard | None = None
    difference: dict[str, tuple[Any, Any]] = Field(default_factory=dict)


class RequestRefused(Part):
    """A person's request could not be followed: wrong revision, wrong state, not executable."""

    kind: Literal["request_refused"] = "request_refused"
    request: str
    verb: Verb
    card: str | None
    why: str


class BudgetReserved(Part):
    """The worst case of a card was set aside."""

    kind: Literal["budget_reserved"] = "budget_reserved"
    card: str
    passes: float
    remaining: float


class BudgetReleased(Part):
    """What a finished card did not need is free again."""

    kind: Literal["budget_released"] = "budget_released"
    card: str
    spent: float
    released: float


class CardStarted(Part):
    """A card's trials begin from this checkpoint of the trunk."""

    kind: Literal["card_started"] = "card_started"
    card: str
    step: int
    checkpoint: Digest
    control_at: int = Field(description="trunk step at which the control is compared")


class TrialDecided(Part):
    """What the scheduler made of a report."""

    kind: Literal["trial_decided"] = "trial_decided"
    card: str
    trial: int
    resource: int
    decision: Literal["promoted", "paused", "finished", "ignored", "stopped", "failed", "retried"]
    rank: int | None = None
    why: str


class VerdictGiven(Part):
    """The held-out evidence and what it means."""

    kind: Literal["verdict_given"] = "verdict_given"
    card: str
    verdict: Literal["accepted", "rejected", "inconclusive"]
    candidate: str | None
    n: int
    mean: float
    z: float
    lower: float
    upper: float
    threshold: float
    alpha: float
    look: int | None = Field(
        default=None, description="which look of the session at val-B; null: none was spent"
    )
    slices: dict[str, float] = Field(default_factory=dict, description="z of each slice")
    why: str


class CooldownSet(Part):
    """No further card of this kind before a step."""

    kind: Literal["cooldown_set"] = "cooldown_set"
    reason: str
    until: int
    why: str


class ModeChanged(Part):
    """A person changed the mode."""

    kind: Literal["mode_changed"] = "mode_changed"
    before: Mode
    after: Mode
    actor: str


class LineageGrew(Part):
    """A node of the lineage: a trunk, a specialist, a merge or a mixture."""

    kind: Literal["lineage_grew"] = "lineage_grew"
    node: str
    parents: tuple[str, ...]
    role: Literal["trunk", "specialist", "merge", "mixture", "control"]
    card: str | None
    step: int
    checkpoint: Digest | None = None
    verdict: str | None = None


Fact = Annotated[
    ReadingChanged
    | RuleEvaluated
    | CardProposed
    | CardMoved
    | RequestRefused
    | BudgetReserved
    | BudgetReleased
    | CardStarted
    | TrialDecided
    | VerdictGiven
    | CooldownSet
    | ModeChanged
    | LineageGrew,
    Field(discriminator="kind"),
]

# ---------------------------------------------------------------------------------------------------------------------- commands


class AskApproval(Part):
    """Show the card to a person: a YAML file in the session, a line on the console."""

    kind: Literal["ask_approval"] = "ask_approval"
    card: str
    rev: int


class Snapshot(Part):
    """Make the trunk's complete state durable, at once or at an exact later step."""

    kind: Literal["snapshot"] = "snapshot"
    card: str
    purpose: Literal["base", "control"]
    at_step: int | None = None


class Scan(Part):
    """Read the sample ledger (answer Scanned) and cluster the probe samples (answer Clustered)."""

    kind: Literal["scan"] = "scan"
    tail_from: float
    probe: int
    clusters: bool


class Resolve(Part):
    """Turn a selection into sample ids, and a search space into variants."""

    kind: Literal["resolve"] = "resolve"
    card: str
    selection: Selection


class StartTrial(Part):
    """Train one trial from one rung to the next; returns at once and reports later."""

    kind: Literal["start_trial"] = "start_trial"
    card: str
    trial: int
    rung_attempt: int
    variant: Variant
    base: Digest
    checkpoint: Digest = Field(description="where this segment starts: the base, or the trial's last rung")
    from_resource: int
    to_resource: int
    top_resource: int
    per_trunk_step: float = Field(description="arm steps to run for each step of the trunk")


class StopTrial(Part):
    """Give up a running trial."""

    kind: Literal["stop_trial"] = "stop_trial"
    card: str
    trial: int
    rung_attempt: int


class FitGate(Part):
    """Fit the router over the control and the finished specialists on val-A."""

    kind: Literal["fit_gate"] = "fit_gate"
    card: str
    control: Digest
    experts: tuple[Digest, ...]


class Merge(Part):
    """Merge the members; for a trunk merge at ``at_step`` null means at the end of the run."""

    kind: Literal["merge"] = "merge"
    card: str
    method: str
    control: Digest | None = None
    members: tuple[Digest, ...] = ()
    at_end: bool = False


class Evaluate(Part):
    """Look once at val-B: this candidate against the control."""

    kind: Literal["evaluate"] = "evaluate"
    card: str
    candidate: str
    checkpoint: Digest
    control: Digest
    look: int


class Adopt(Part):
    """Put the accepted candidate into the trunk, or export it."""

    kind: Literal["adopt"] = "adopt"
    card: str
    candidate: str
    checkpoint: Digest
    into: Literal["trunk", "export"]


class RollBack(Part):
    """Put the trunk back to what it was before this card was adopted."""

    kind: Literal["roll_back"] = "roll_back"
    card: str
    checkpoint: Digest


class StopRun(Part):
    """End training at the next step boundary."""

    kind: Literal["stop_run"] = "stop_run"
    why: str


Command = Annotated[
    AskApproval
    | Snapshot
    | Scan
    | Resolve
    | StartTrial
    | StopTrial
    | FitGate
    | Merge
    | Evaluate
    | Adopt
    | RollBack
    | StopRun,
    Field(discriminator="kind"),
]

INPUT: Final[TypeAdapter[Input]] = TypeAdapter(Input)
FACT: Final[TypeAdapter[Fact]] = TypeAdapter(Fact)
COMMAND: Final[TypeAdapter[Command]] = TypeAdapter(Command)

EVENT_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One row of the log: who said what, when, and because of which row.

    Attributes:
        seq: Position in the log, from 1, without gaps.
        role: ``input``, ``fact`` or ``command``.
        body: The event.
        cause: ``seq`` of the event that led here; None when it was the trunk row before ``frame_cursor``.
        command_id: Of a command: its own id. Of an input: the id of the command that it answers, else None.
        frame_cursor: Trunk rows that precede this event.
        effective_at: Trunk step at which a command took effect, where that is known.
        t_wall: Seconds since the epoch, by the driver's clock (facts and commands inherit the cause's).
        t_mono: Seconds on a monotonic clock.
    """

    seq: int
    role: Literal["input", "fact", "command"]
    body: Any
    cause: int | None = None
    command_id: str | None = None
    frame_cursor: int = 0
    effective_at: int | None = None
    t_wall: float = 0.0
    t_mono: float = 0.0
    stream: str = "trunk"
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A block of the trunk's frame: one row per attempted step.

    Attributes:
        first: Number of the first row, from 0.
        names: Column names; ``step``, ``time``, ``loss``, ``grad_norm``, ``lr_0``, ``applied`` and ``samples`` are read.
        values: float64, shape ``[rows, len(names)]``. ``time`` in seconds (monotonic), ``applied`` 0 or 1, ``samples`` in samples.
    """

    first: int
    names: Sequence[str]
    values: np.ndarray[Any, np.dtype[np.float64]] = field(repr=False)
