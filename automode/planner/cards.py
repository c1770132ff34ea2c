"""The plan card: the contract between the planner, a person and the scheduler.

A card says what automode wants to do, why, to which data, with which variants, at what cost, and which evidence it will need
before anything is kept. It is frozen; an edit makes a new revision. States and the moves between them stand in one table,
read by the fold, the command line and the documentation alike.
"""

from __future__ import annotations

import hashlib
import math
from enum import StrEnum
from typing import Any, Final, Literal

from pydantic import Field, TypeAdapter, field_validator, model_validator

from automode.planner.recipes import (
    Acceptance,
    Adjustment,
    Asha,
    Base,
    Cost,
    GateRecipe,
    MergeRecipe,
    Part,
    SelectAll,
    Selection,
    TrainingRecipe,
)

SCHEMA_VERSION: Final = 1

Reason = Literal[
    "instability_spike",
    "residual_cluster",
    "high_loss_tail",
    "loss_plateau",
    "slice_underperformance",
    "label_noise",
    "generalization_gap",
    "learning_rate_probe",
    "merge_cadence",
    "manual",
]
Risk = Literal["low", "medium", "high"]
Action = Literal["fork", "merge", "adjust", "stop"]
Number = float | int | bool | str | None
Diagnostic = Number | tuple[Number, ...]


class CardState(StrEnum):
    """Where a card stands. The last eight are final."""

    PROPOSED = "proposed"
    REVISE = "revise"
    APPROVED = "approved"
    RUNNING = "running"
    ACCEPTED = "accepted"
    ADOPTED = "adopted"
    REFUSED = "refused"
    EXPIRED = "expired"
    STALE = "stale"
    REJECTED = "rejected"
    INCONCLUSIVE = "inconclusive"
    FAILED = "failed"
    ROLLED_BACK = "rolled_back"
    APPLIED = "applied"


TRANSITIONS: Final[dict[CardState, frozenset[CardState]]] = {
    CardState.PROPOSED: frozenset(
        {
            CardState.PROPOSED,  # an edit: a new revision of the same proposal
            CardState.APPROVED,
            CardState.REFUSED,
            CardState.REVISE,
            CardState.EXPIRED,
            CardState.STALE,
        }
    ),
    CardState.REVISE: frozenset({CardState.PROPOSED, CardState.EXPIRED, CardState.STALE, CardState.REFUSED}),
    CardState.APPROVED: frozenset(
        {
            CardState.PROPOSED,  # an edit after approval asks for approval again
            CardState.RUNNING,
            CardState.REFUSED,
            CardState.EXPIRED,
            CardState.STALE,
            CardState.FAILED,
        }
    ),
    CardState.RUNNING: frozenset(
        {
            CardState.ACCEPTED,
            CardState.APPLIED,  # an adjustment: there is no evidence that it could be accepted by
            CardState.REJECTED,
            CardState.INCONCLUSIVE,
            CardState.FAILED,
            CardState.REFUSED,
        }
    ),
    CardState.ACCEPTED: frozenset({CardState.ADOPTED, CardState.FAILED}),
    CardState.ADOPTED: frozenset({CardState.ROLLED_BACK}),
    CardState.REFUSED: frozenset(),
    CardState.EXPIRED: frozenset(),
    CardState.STALE: frozenset(),
    CardState.REJECTED: frozenset(),
    CardState.INCONCLUSIVE: frozenset(),
    CardState.FAILED: frozenset(),
    CardState.ROLLED_BACK: frozenset(),
    CardState.APPLIED: frozenset(),
}
"""Which state may follow which. A running card that a person cancels ends as ``refused``."""

STOP_Z: Final = 0.0
"""What a run that is stopped keeps in place of its last weights needs no proof but being better on the held-out data."""

WAITING: Final = frozenset({CardState.PROPOSED, CardState.REVISE, CardState.APPROVED})


class PlanCard(Part):
    """One proposed action on a training run, with its data, recipe, budget, evidence and reasons.

    ``id`` is derived from session, reason, step and ordinal, so that a replay gives the same id (:func:`card_id`).
    ``rev`` grows with every edit and is checked by whoever approves (optimistic locking).
    """

    schema_: Literal[1] = Field(default=1, alias="schema", description="version of this format")
    id: str = Field(
        pattern=r"^[0-9a-f]{8}$",
        description="derived from session, reason, step and a count, so that a replay gives the same",
    )
    rev: int = Field(
        default=1,
        ge=1,
        description="revision: an edit makes the next one, and an answer names the one that was read",
    )
    session: str = Field(min_length=1, max_length=128, description="name of the session's folder")
    step: int = Field(ge=0, description="the trunk's step when the card was made")
    created_by: str = Field(
        default="planner",
        min_length=1,
        max_length=128,
        description="planner, or the name of who submitted it",
    )
    action: Action = Field(
        description=(
            "fork: train specialists beside the trunk; merge: average along the trunk's own trajectory; adjust: change the trunk's rate "
            "or clipping, unproven; stop: end the run with the best of its last weights, their averages and its best validated state"
        )
    )
    reason: Reason = Field(description="the rule that made the card; manual: a person did")
    because: str = Field(min_length=1, max_length=4000, description="the reason in words, with its numbers")
    selection: Selection = Field(
        default=SelectAll(), description="the training samples that the specialists are for"
    )
    training_recipe: TrainingRecipe | None = Field(
        default=None, description="how the specialists train; of a fork only"
    )
    gate_recipe: GateRecipe | None = Field(
        default=None, description="a router over the control and the finished specialists; null: none"
    )
    merge_recipe: MergeRecipe | None = Field(
        default=None, description="how several states become one candidate more; null: none"
    )
    adjustment: Adjustment | None = Field(
        default=None, description="what is changed about the trunk's training; of an adjustment only"
    )
    budget_steps: int = Field(ge=0, description="the first rung, in training steps; 0 but for a fork")
    asha: Asha | None = Field(default=None, description="the ladder above the first rung; of a fork only")
    cost: Cost = Field(description="what it may take at the most")
    cooldown_steps: int = Field(
        ge=0,
        description="steps before its reason may come again, times a factor that its end decides",
    )
    acceptance: Acceptance = Field(default=Acceptance(), description="the evidence that adoption needs")
    risk: Risk = Field(default="low", description="compared with the policy's approval.auto_risk")
    base: Base = Field(description="what it was made against")
    diagnostics: dict[str, Diagnostic] = Field(
        default_factory=dict, max_length=64, description="the readings that led here, by name"
    )

    @field_validator("diagnostics", mode="before")
    @classmethod
    def _not_finite(cls, value: Any) -> Any:
        # JSON has no NaN: it is written as a word, and a field that may hold text would keep the word.
        if not isinstance(value, dict):
            return value
        return {
            k: tuple(_number(x) for x in v) if isinstance(v, list | tuple) else _number(v)
            for k, v in value.items()
        }

    @field_validator("diagnostics")
    @classmethod
    def _small(cls, value: dict[str, Diagnostic]) -> dict[str, Diagnostic]:
        for name, entry in value.items():
            if isinstance(entry, tuple) and len(entry) > 64:
                raise ValueError(f"`{name}` holds {len(entry)} numbers; at most 64 stand on a card")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PlanCard:
        if (self.action == "adjust") != (self.adjustment is not None):
            raise ValueError("`adjustment` belongs to action adjust, and to no other")
        if self.adjustment is not None and self.selection != SelectAll():
            raise ValueError("an adjustment is for all samples: leave `selection` out")
        if self.adjustment is not None and self.acceptance != Acceptance():
            raise ValueError("nothing is compared for an adjustment: leave `acceptance` out")
        if self.action == "fork":
            if self.training_recipe is None or self.asha is None:
                raise ValueError("a fork needs `training_recipe` and `asha`")
            if not 1 <= self.budget_steps <= self.asha.max_steps:
                raise ValueError(
                    f"`budget_steps` ({self.budget_steps}) must lie between 1 and asha.max_steps ({self.asha.max_steps})"
                )
        else:
            if (self.action == "merge") != (self.merge_recipe is not None):
                raise ValueError(f"a merge needs `merge_recipe`, and {_ARTICLED[self.action]} has none")
            if self.training_recipe is not None or self.gate_recipe is not None or self.asha is not None:
                raise ValueError(
                    f"{_ARTICLED[self.action]} trains nothing: leave `training_recipe`, `gate_recipe` and `asha` out"
                )
        return self

    def revised(self, **changes: Any) -> PlanCard:
        """Return the next revision with some fields changed and everything validated again."""
        data = self.model_dump(by_alias=True) | changes | {"rev": self.rev + 1}
        return PlanCard.model_validate(data)

    def dump(self) -> dict[str, Any]:
        """Return plain JSON data by the names that YAML uses; ``None`` and defaults of optional parts included."""
        return self.model_dump(mode="json", by_alias=True)

    def __str__(self) -> str:
        from automode.planner.card_text import card_summary

        return card_summary(self)

    def __rich__(self) -> Any:
        from automode.planner.card_text import card_panel

        return card_panel(self).rich()

    def _repr_html_(self) -> str:
        from automode.planner.card_text import card_html

        return card_html(self)


_ARTICLED: Final[dict[Action, str]] = {
    "fork": "a fork",
    "merge": "a merge",
    "adjust": "an adjustment",
    "stop": "a stop",
}


def _number(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


_NOT_FINITE: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
CARD: Final = TypeAdapter(PlanCard)


def card_id(session: str, reason: str, step: int, ordinal: int) -> str:
    """Derive a card's id: eight hex digits, equal on every replay."""
    return hashlib.sha256(f"{session}\n{reason}\n{step}\n{ordinal}".encode()).hexdigest()[:8]


def difference(before: PlanCard, after: PlanCard) -> dict[str, tuple[Any, Any]]:
    """Return what changed between two revisions, the revision left out: dotted name to (before, after).

    Of as many variants as before, the changed field is named: ``training_recipe.variants[1].lr_mul``.
    """
    return {k: v for k, v in _differences(before.dump(), after.dump(), "").items() if k != "rev"}


def _differences(a: Any, b: Any, path: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*a, *(k for k in b if k not in a)]:
            found |= _differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        return found
    if (
        isinstance(a, list)
        and isinstance(b, list)
        and len(a) == len(b)
        and isinstance((a or [None])[0], dict)
    ):
        return {
            name: pair
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for name, pair in _differences(x, y, f"{path}[{i}]").items()
        }
    # NaN differs from itself, and is no difference.
    return {} if a == b or repr(a) == repr(b) else {path: (a, b)}
