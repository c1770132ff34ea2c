"""Events that the machine decides: recomputed by every replay, and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from automode.planner.cards import CardState, Number, PlanCard
from automode.planner.inputs import Mode, Verb
from automode.planner.metrics import Metric
from automode.planner.recipes import Digest, Part

if TYPE_CHECKING:
    from automode.planner.displays import Panel


class ReadingChanged(Part):
    """A signal changed its state."""

    kind: Literal["reading_changed"] = "reading_changed"
    step: int
    name: str
    state: str
    value: float
    threshold: float | None = None
    window: int | None = None
    details: dict[str, Number] = Field(default_factory=dict)


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
    decision: Literal[
        "started",
        "promoted",
        "retried",
        "paused",
        "finished",
        "diverged",
        "requeued",
        "lost",
        "stopped",
        "ignored",
    ]
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
    metric: Metric = Field(default="utility", description="what was compared")
    guard: float | None = Field(
        default=None,
        description="z of what must agree with the metric: accuracy where the log score is compared, and the other way round",
    )
    why: str

    def __str__(self) -> str:
        return self._panel().text()

    def __rich__(self) -> Any:
        return self._panel().rich()

    def _repr_html_(self) -> str:
        return self._panel().html()

    def _panel(self) -> Panel:
        from automode.planner.displays import verdict_panel

        return verdict_panel(self)


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
