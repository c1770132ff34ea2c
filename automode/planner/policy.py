"""The policy: what a person allows automode to do, in units that a person thinks in.

Durations are optimizer steps, shares are fractions of compute (sample passes), thresholds follow the signals'
documentation. The policy's digest stands on every card, so that a card made under another policy is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from automode.planner.cards import Reason, Risk
from automode.planner.recipes import Digest, Fraction, Part, Positive
from automode.planner.rule_policies import GapPolicy, NoisePolicy, ProbePolicy, SlicePolicy, SpikePolicy
from automode.planner.scans import Detail

if TYPE_CHECKING:
    from automode.planner.displays import Panel

PLANNER_VERSION: Final = 7
"""Part of the policy digest: raised whenever the same inputs may lead to another decision."""

DEFAULT_REASONS: Final[tuple[Reason, ...]] = (
    "instability_spike",
    "loss_plateau",
    "residual_cluster",
    "label_noise",
    "learning_rate_probe",
    "merge_cadence",
)
"""The rules that are worth a person's time; the others are there for a policy that names them."""

DEFAULT_ASKED: Final[tuple[Reason, ...]] = ("residual_cluster", "loss_plateau")
"""Those of them whose forks were hardly ever adopted, so that a person decides (decision 46)."""


class TrendPolicy(Part):
    """When a flat loss is a plateau and a rising one a regression."""

    budget: int | None = Field(
        default=None,
        ge=40,
        description="steps that you would still spend; null: 800, at most a fifth of the run",
    )
    gain: Positive = Field(
        default=0.01, lt=1.0, description="relative gain over the budget that would change your mind"
    )
    z_advise: Positive = Field(default=1.0, description="confidence for saying so, one-sided z")
    z_execute: Positive = Field(default=1.28, description="confidence for making a card, one-sided z")
    z_rise: Positive = Field(default=1.645, description="confidence that the loss rises, one-sided z")
    regress_rise: Positive = Field(
        default=0.10, description="smallest plausible relative rise that counts as divergence"
    )

    @model_validator(mode="after")
    def _ordered(self) -> TrendPolicy:
        if self.z_execute < self.z_advise:
            raise ValueError(
                f"z_execute ({self.z_execute}) is below z_advise ({self.z_advise}), but acting needs at least the "
                "confidence of advising"
            )
        return self


class ScanPolicy(Part):
    """How often the sample ledger is read, and what makes a tail or a cluster worth a card."""

    every: int | None = Field(
        default=None, ge=1, description="steps between scans; null: half the planning budget"
    )
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=0.02,
        description="most of the wall-clock time for scans; null: equal runs scan at equal steps",
    )
    at_least: int = Field(
        default=6,
        ge=0,
        description="scans that a run which may act gets whatever their share of its time",
    )
    cost: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.015,
        description="most of the run's sample passes for scans; they are fewer and smaller where a run is short",
    )
    probe: int = Field(
        default=1024, ge=32, le=65536, description="fixed samples whose features are clustered, at the most"
    )
    min_visits: Positive = Field(
        default=2.0, description="mean visits a sample before the ledger is believed"
    )
    tail_from: Fraction = Field(default=0.85, description="quantile of the loss at which the tail begins")
    tail_ratio: Positive = Field(
        default=3.0, description="least ratio of the tail's mean loss to the overall mean"
    )
    cluster_ratio: Positive = Field(default=1.5, description="least ratio of a cluster's loss to the rest's")
    cluster_z: Positive = Field(
        default=2.0, description="least distance of a cluster's loss from the rest, standard errors"
    )
    stable_scans: int = Field(default=2, ge=1, description="scans in a row whose clusters must agree")
    stable_ari: Fraction = Field(default=0.7, description="least agreement of two scans, adjusted Rand index")
    max_noise: Fraction = Field(
        default=0.2, description="label-noise estimate above which samples are not mined"
    )
    details: tuple[Detail, ...] = Field(
        default=(),
        max_length=2,
        description="what the ledger's export holds of the samples that a scan reads, beside their losses",
    )


class PacingPolicy(Part):
    """Cooldowns and limits."""

    warmup_steps: int | None = Field(
        default=None, ge=0, description="no card before this step; null: a tenth of the run, at most 200"
    )
    cooldown_steps: int | None = Field(
        default=None, ge=0, description="steps before a reason may come again; null: the planning budget"
    )
    cooldown_grow: float = Field(
        default=1.5, ge=1.0, le=10.0, description="factor after a card that was not adopted"
    )
    cooldown_shrink: float = Field(default=0.75, gt=0.0, le=1.0, description="factor after an adopted card")
    max_cards: int = Field(default=16, ge=0, description="cards in a session at the most")
    max_parallel: int | None = Field(
        default=None,
        ge=1,
        description="trials that train at once, at the most; null: as many as the backend has room for",
    )
    max_depth: int = Field(
        default=8, ge=0, description="adopted cards on top of each other, beyond which no further one is made"
    )
    exploration_share: Fraction = Field(
        default=0.18,
        description="share of the remaining compute that one fork may take; what trains nothing may take `total_share` of it",
    )
    total_share: Fraction = Field(
        default=0.30, description="share of the whole run's compute that all cards may take"
    )
    variants: int = Field(default=3, ge=1, le=16, description="variants that a rule may put on a card")
    reduction_factor: int = Field(
        default=3, ge=2, le=16, description="one of so many trials goes on to the next rung"
    )
    min_rung: int = Field(default=20, ge=1, description="shortest first rung worth running, in steps")


class ApprovalPolicy(Part):
    """What runs without asking in act mode, and what happens to a card that nobody answers."""

    auto_risk: Risk = Field(default="medium", description="highest risk that act mode may approve by itself")
    auto_share: Fraction = Field(
        default=1.0, description="highest share of the remaining compute approved by itself"
    )
    ask: tuple[Reason, ...] = Field(
        default=DEFAULT_ASKED, description="reasons whose cards wait for a person in act mode too"
    )
    timeout_seconds: Positive | None = Field(
        default=None, description="longest wait for an answer; null: until the run ends"
    )
    expire_steps: int | None = Field(
        default=None, ge=1, description="longest wait in steps; null: the planning budget"
    )


class EvidencePolicy(Part):
    """What acceptance needs."""

    alpha: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        default=0.05, description="whole session's chance of a wrong adoption"
    )
    z: float = Field(default=1.64, ge=0.0, le=10.0, description="least z of the paired difference")
    slices: Literal["no_worse", "ignore"] = Field(
        default="no_worse", description="whether a slice that got worse forbids adoption"
    )
    min_samples: int = Field(default=30, ge=2, description="least samples in each held-out half")
    holdout_share: Annotated[float, Field(gt=0.0, lt=0.5)] | None = Field(
        default=None,
        description="share of the training data held out in act mode where there is no validation loader",
    )


class SafeguardPolicy(Part):
    """What is done at once, without a card, in act mode."""

    skip_nonfinite: bool = Field(default=True, description="leave out a step whose gradients are not finite")
    leap: Annotated[float, Field(ge=3.0)] | None = Field(
        default=20.0,
        description="skipped too: a gradient norm so many times the largest before; null: none",
    )
    stop_after_nonfinite: int = Field(
        default=50, ge=1, description="skipped steps in a row after which the run stops"
    )
    rewind: bool = Field(
        default=True, description="go back to a good state where the run has certainly diverged"
    )
    rewind_after_nonfinite: int = Field(
        default=5, ge=2, description="steps in a row that are not finite after which the run goes back"
    )
    rewind_above: float = Field(
        default=3.0, ge=1.5, description="multiple of its lowest level at which a loss counts as diverged"
    )
    rewind_patience: int | None = Field(
        default=None,
        ge=1,
        description="steps that it stays there before the run goes back; null: B / 8, at least 20",
    )
    rate_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.5,
        description="on the rates when the run goes back; its square and cube where that was not enough",
    )
    max_rewinds: int = Field(default=3, ge=1, description="times that a run may go back")
    keep_every: int | None = Field(
        default=None, ge=1, description="steps between two good states; null: B / 4, at least 20"
    )
    keep: int = Field(default=4, ge=1, le=64, description="good states kept, the latest")
    keep_mib: Positive = Field(
        default=4096.0,
        description="host memory for them, MiB; fewer or none are kept where it does not suffice",
    )
    clip: bool = Field(
        default=True,
        description="cap the gradient norm while spikes come in bursts",
    )
    max_clips: int = Field(default=4, ge=1, description="times that a run's gradient norm may be capped")


class DiagnosticPolicy(Part):
    """Numbers that stand on a card and trigger nothing: gradient noise scale, sharpness, size of the updates."""

    enabled: bool = Field(default=True, description="take them, in every mode but off")
    every: int | None = Field(default=None, ge=1, description="steps between two; null: half of B")
    share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.005,
        description="share of the run's compute and time that they may take",
    )
    examples: int = Field(
        default=128, ge=32, le=65536, description="training samples that the noise scale is read from"
    )
    probe: int = Field(
        default=64, ge=8, le=65536, description="training samples that the sharpness is read from"
    )
    iterations: int = Field(
        default=4,
        ge=2,
        le=100,
        description="power iterations; the next reading goes on from there",
    )


class AveragePolicy(Part):
    """Averages of the trunk's weights, kept outside the model in act and propose mode."""

    enabled: bool = Field(default=True, description="keep moving averages of the weights")
    finish_at: Fraction = Field(
        default=0.75, description="share of the run at which the finishing merge is proposed"
    )
    z: float = Field(
        default=1.0,
        ge=0.0,
        le=10.0,
        description="least z of the finishing merge: averages of one trajectory need less proof than a fork, by measurement",
    )
    best_state: bool = Field(
        default=True,
        description="judge the best validated state too: its weights and their three averages are kept in host memory",
    )
    clean_below: Fraction = Field(
        default=0.15,
        description="largest share of wrong labels, as held-out data bound it, at which the finish compares by a log score",
    )


class Policy(Part):
    """Everything that a person allows automode to do. The defaults are the ``default`` preset."""

    schema_: Literal[1] = Field(default=1, alias="schema", description="version of this format")
    name: str = Field(
        default="default", min_length=1, max_length=64, description="what you call it; no part of the digest"
    )
    reasons: tuple[Reason, ...] = Field(default=DEFAULT_REASONS, description="rules that may propose")
    budget: Literal["within", "on_top"] = Field(
        default="within", description="pay for automode out of the run's own steps, or on top of them"
    )
    schedule: Literal["charged", "keep"] = Field(
        default="charged",
        description="whether the rate schedule's clock counts the compute that automode spent",
    )
    trend: TrendPolicy = TrendPolicy()
    spike: SpikePolicy = SpikePolicy()
    scan: ScanPolicy = ScanPolicy()
    slices: SlicePolicy = SlicePolicy()
    gap: GapPolicy = GapPolicy()
    probe: ProbePolicy = ProbePolicy()
    noise: NoisePolicy = NoisePolicy()
    pacing: PacingPolicy = PacingPolicy()
    approval: ApprovalPolicy = ApprovalPolicy()
    evidence: EvidencePolicy = EvidencePolicy()
    safeguards: SafeguardPolicy = SafeguardPolicy()
    averages: AveragePolicy = AveragePolicy()
    diagnostics: DiagnosticPolicy = DiagnosticPolicy()

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if len(set(self.reasons)) != len(self.reasons):
            raise ValueError("`reasons` names a reason twice")
        return self

    def dump(self) -> dict[str, Any]:
        """Return plain JSON data with every value resolved."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def digest(self) -> Digest:
        """Digest of the policy where no rule of a third party takes part; see :meth:`digest_with`."""
        return self.digest_with(())

    def digest_with(self, plugins: Iterable[str]) -> Digest:
        """Digest over what decides: the resolved values, the planner's version, and the plugins. Its name decides nothing.

        Args:
            plugins: Distributions whose rules take part, with their versions, in any order.
        """
        values = {name: value for name, value in self.dump().items() if name != "name"}
        decides = {"planner": PLANNER_VERSION, "plugins": sorted(plugins), "policy": values}
        return "sha256:" + hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def planning_budget(self, total_steps: int) -> int:
        """B, in steps: given, or 800 but at most a fifth of the run where its length is known (and at least 40)."""
        if self.trend.budget is not None:
            return self.trend.budget
        return max(40, min(800, total_steps // 5)) if total_steps > 0 else 800

    def __str__(self) -> str:
        return self._panel().text()

    def __rich__(self) -> Any:
        return self._panel().rich()

    def _repr_html_(self) -> str:
        return self._panel().html()

    def _panel(self) -> Panel:
        from automode.planner.card_text import policy_to_yaml
        from automode.planner.displays import policy_panel

        return policy_panel(self, policy_to_yaml(self))
