"""What a rule is: a frozen dataclass with thresholds as fields, that looks at a view and proposes or stays silent.

A rule never logs, mutates, or looks at another rule. Its silence carries a stable code and a sentence with the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from automode.planner.cards import Action, Diagnostic, Reason, Risk
from automode.planner.events import Clustered, Run, Scanned, Validated
from automode.planner.metrics import Metric
from automode.planner.policy import Policy
from automode.planner.recipes import (
    Adjustment,
    GateRecipe,
    MergeRecipe,
    SelectAll,
    Selection,
    TrainingRecipe,
    Variant,
)

if TYPE_CHECKING:
    from automode.planner.signals.suite import SignalSuite


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The best trial of a probe that kept the trunk as it was.

    Attributes:
        variant: What it trained with.
        z: How far it is above the control, in standard errors, by the metric of the card.
        lost: How far it is below the control, as a share of what the run had learnt by then; NaN where that is not known.
        steps: Length of the trial, in steps.
        step: Trunk step at which that was seen.
        loss: The trunk's training loss then, a running median.
    """

    variant: Variant
    z: float
    lost: float
    steps: int
    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything that a rule may look at. Steps are optimizer steps; ``planning_budget`` is B in steps."""

    step: int
    remaining: int
    planning_budget: int
    policy: Policy
    run: Run
    signals: SignalSuite
    validated: Sequence[Validated] = ()
    scanned: Sequence[Scanned] = ()
    clustered: Sequence[Clustered] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many cards of each reason were made so far."""
    adopted: Mapping[str, int] = field(default_factory=dict)
    """How many of them were adopted."""
    first_loss: float | None = None
    """The run's first finite training loss; None before it, and where losses are 0 or below."""
    probed: Probed | None = None
    """The best of the first probe of the rate, where it was not adopted."""
    ending: bool = False
    """Whether the run ends here, before its length: what is due at the end is due now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a rule would do. Pacing turns it into a card, or holds it.

    Attributes:
        metric: What candidates and the control are compared by.
        share: Most of the whole run's compute that the card may take, below the policy's caps; None: they alone hold.
        least_steps: Length of the longest trial, in steps, below which none is worth running.
        cheaper: The same with fewer trials, each tried where what stands before it does not fit.
    """

    reason: Reason
    action: Action
    because: str
    selection: Selection = SelectAll()
    training_recipe: TrainingRecipe | None = None
    gate_recipe: GateRecipe | None = None
    merge_recipe: MergeRecipe | None = None
    adjustment: Adjustment | None = None
    risk: Risk = "low"
    metric: Metric = "utility"
    share: float | None = None
    least_steps: int = 0
    cheaper: tuple[Proposal, ...] = ()
    diagnostics: Mapping[str, Diagnostic] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Why a rule said nothing: a stable ``code`` and a sentence."""

    code: str
    why: str


class Rule(Protocol):
    """One trouble, one remedy."""

    @property
    def id(self) -> Reason:
        """The reason that the rule gives."""
        ...

    def propose(self, view: View) -> Proposal | Silence:
        """Propose an action, or say why not."""
        ...
