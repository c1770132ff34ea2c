"""What the machine asks the world to do: imperatives, each answered by an input with the same command id."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from automode.planner.inputs import Weights
from automode.planner.metrics import Metric
from automode.planner.recipes import Digest, Part, Resources, Selection, Variant
from automode.planner.scans import Detail


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
    details: tuple[Detail, ...] = ()
    ask_from: float | None = Field(
        default=None,
        description="label-noise estimate from which the trunk's average is asked of every sample; null: never",
    )


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
    resources: Resources | None = Field(default=None, description="null: what the backend was told")


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
    control: Weights
    experts: tuple[Weights, ...]
    names: tuple[str, ...] = Field(
        default=(), description="of the experts, where each is for a part; else empty"
    )


class Merge(Part):
    """Merge the members, or choose the best of the trunk's own states."""

    kind: Literal["merge"] = "merge"
    card: str
    method: str
    control: Weights | None = Field(default=None, description="null: the trunk itself, at the end of the run")
    members: tuple[Weights, ...] = Field(
        default=(), description="specialists; for a run that is stopped, its best validated state"
    )
    gate: Digest | None = Field(default=None, description="the fitted mixture that teaches; null: none does")
    at_end: bool = False


class Evaluate(Part):
    """Look once at val-B: this candidate against the control. Or at val-A, which they were chosen on, to see how far apart they are."""

    kind: Literal["evaluate"] = "evaluate"
    card: str
    candidate: str
    weights: Weights
    control: Weights
    look: int = Field(
        ge=0, description="number of the session's look; 0: averages of the trunk and val-A, which spend none"
    )
    metric: Metric = Field(default="utility", description="what to compare")
    half: Literal["A", "B"] = Field(default="B", description="of the held-out data")


class Adopt(Part):
    """Put the accepted candidate into the trunk, or export it."""

    kind: Literal["adopt"] = "adopt"
    card: str
    candidate: str
    weights: Weights
    variant: Variant | None = Field(
        default=None, description="of an adopted trial: what the trunk takes over from it"
    )
    into: Literal["trunk", "export"]


class RollBack(Part):
    """Put the trunk back to what it was before this card was adopted."""

    kind: Literal["roll_back"] = "roll_back"
    card: str
    checkpoint: Digest


class Rewind(Part):
    """Put the trunk back to a good state; its clock, its data and what it has spent go on."""

    kind: Literal["rewind"] = "rewind"
    to_step: int = Field(description="the latest good state up to this step, else the oldest there is")
    rate_factor: float = Field(
        gt=0.0, le=1.0, description="every learning rate is multiplied by this, for good"
    )
    why: str


class SetLearningRate(Part):
    """Multiply every learning rate of the trunk, and what its schedule computes rates from."""

    kind: Literal["set_learning_rate"] = "set_learning_rate"
    factor: float = Field(gt=0.0)
    why: str
    card: str | None = Field(default=None, description="the card that asks for it; null: a safeguard")


class SetClip(Part):
    """Cap the trunk's gradient norm beside what the user asked for, or lift that cap."""

    kind: Literal["set_clip"] = "set_clip"
    norm: float | None = Field(gt=0.0, description="null: no cap but the user's own")
    why: str
    card: str | None = Field(
        default=None, description="the card that asks for it, for good; null: a safeguard"
    )


class Diagnose(Part):
    """Read the diagnostics of the trunk as it is; nothing of the run is touched."""

    kind: Literal["diagnose"] = "diagnose"
    examples: int = Field(ge=0, description="samples for the gradient noise scale; 0: not now")
    probe: int = Field(ge=0, description="samples for the sharpness; 0: not now")
    iterations: int = Field(ge=1, description="power iterations")


class StopRun(Part):
    """End training at the next step boundary."""

    kind: Literal["stop_run"] = "stop_run"
    why: str
    card: str | None = Field(default=None, description="null: a safeguard stops it")


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
    | Rewind
    | SetLearningRate
    | SetClip
    | Diagnose
    | StopRun,
    Field(discriminator="kind"),
]
