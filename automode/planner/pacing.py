"""Pacing: which proposal becomes a card now, how large it may be, and when its reason may come again.

Nothing here looks at weights or clocks. :func:`admit` turns a rule's proposal into a priced card or says with numbers why not;
:func:`quote` prices what a person wrote by the same arithmetic; :func:`after_verdict` sets the cooldowns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self, assert_never

from automode.planner.approval import PLANNER, CardRecord
from automode.planner.capability import refusals
from automode.planner.cards import STOP_Z, WAITING, CardState, PlanCard, card_id
from automode.planner.events import CooldownSet
from automode.planner.fitting import (
    Funds,
    Held,
    choose_ladder,
    no_time,
    quote,
    spending_cap,
    stated_cost,
    unaffordable,
)
from automode.planner.policy import Policy
from automode.planner.pricing import WorstCase, price_of, worst_case, worst_case_passes
from automode.planner.recipes import Acceptance, Asha, Base
from automode.planner.rules import PRIORITY
from automode.planner.rules.base import Proposal, View

__all__ = [
    "PRIORITY",
    "Funds",
    "Held",
    "PacingState",
    "WorstCase",
    "admit",
    "after_verdict",
    "held_back",
    "in_order",
    "quote",
    "worst_case",
    "worst_case_passes",
]

EVERY: Final = "*"
"""Key of the cooldown that holds for every reason but ``instability_spike``."""

FACTOR_BOUNDS: Final = (0.25, 16.0)
_AT_WORK: Final = (CardState.RUNNING, CardState.ACCEPTED)

Ended = Literal[
    CardState.ADOPTED,
    CardState.REJECTED,
    CardState.INCONCLUSIVE,
    CardState.FAILED,
    CardState.REFUSED,
    CardState.EXPIRED,
    CardState.STALE,
    CardState.ROLLED_BACK,
    CardState.APPLIED,
]
"""How a card can end."""


@dataclass(slots=True, kw_only=True)
class PacingState:
    """What pacing remembers: mutable, owned by the fold.

    Attributes:
        until: First step at which a reason (or :data:`EVERY`) may come again.
        factor: Adaptive factor on a reason's cooldown, 1 at first.
        counts: Cards that the planner has made, by reason.
    """

    until: dict[str, int] = field(default_factory=dict)
    factor: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        """Return plain JSON data for :meth:`from_state`."""
        return {"until": dict(self.until), "factor": dict(self.factor), "counts": dict(self.counts)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Rebuild from what :meth:`to_state` returned."""
        return cls(until=dict(state["until"]), factor=dict(state["factor"]), counts=dict(state["counts"]))

    def made(self, card: PlanCard) -> None:
        """Count a card that the planner has made; call it once when the card is proposed."""
        self.counts[card.reason] = self.counts.get(card.reason, 0) + 1


def in_order(proposals: Iterable[Proposal]) -> list[Proposal]:
    """Sort proposals of one moment by :data:`PRIORITY`; equal reasons keep their order."""
    return sorted(proposals, key=lambda p: PRIORITY.index(p.reason))


def admit(
    proposal: Proposal,
    *,
    view: View,
    state: PacingState,
    open_cards: Sequence[CardRecord],
    funds: Funds,
    session: str,
    ordinal: int,
    base: Base,
    outranked_by: str | None = None,
) -> PlanCard | Held:
    """Turn a proposal into a priced card that fits, or say why not.

    Of several proposals of one moment pass :func:`in_order`'s first one first, and its card's id as ``outranked_by`` to the others.
    The state is not changed: call :meth:`PacingState.made` when the card is proposed.

    Args:
        proposal: What a rule would do.
        view: What the rule looked at: step, remaining steps, B, policy and run.
        state: Cooldowns and counts.
        open_cards: Records of the session's cards, those of this very moment among them; of the finished ones, adopted ones count.
        funds: What there is to spend, in sample passes.
        session: Name of the session, for the card's id.
        ordinal: Tells cards of one reason and step apart.
        base: What the card is made against.
        outranked_by: Id of a card that was made at this very moment for a more urgent reason.
    """
    held = held_back(proposal, view, state, open_cards, outranked_by)
    if held is not None:
        return held
    policy, run = view.policy, view.run
    cannot = refusals(proposal, run, min_held_out=policy.evidence.min_samples)
    if cannot:
        return Held(code="cannot_run", why="; ".join(cannot))
    cap = spending_cap(policy, funds, proposal.action)
    if isinstance(cap, Held):
        if proposal.action != "adjust":
            return cap
        cap = 0.0
    if proposal.action != "fork":
        cap = _own_cap(proposal, cap, funds)
        priced = price_of(proposal.action, proposal.merge_recipe, run)
        short = unaffordable(priced, cap, funds, policy, action=proposal.action)
        held = short or no_time(priced, view.remaining, run, policy)
        if held is not None:
            return held
        first, asha = 0, None
    else:
        proposal, ladder = _that_fits(proposal, view, cap, funds)
        if isinstance(ladder, Held):
            return ladder
        first, asha, priced = ladder
    return PlanCard(
        id=card_id(session, proposal.reason, view.step, ordinal),
        session=session,
        step=view.step,
        created_by=PLANNER,
        action=proposal.action,
        reason=proposal.reason,
        because=proposal.because,
        selection=proposal.selection,
        training_recipe=proposal.training_recipe,
        gate_recipe=proposal.gate_recipe,
        merge_recipe=proposal.merge_recipe,
        adjustment=proposal.adjustment,
        budget_steps=first,
        asha=asha,
        cost=stated_cost(priced, funds, run, proposal.action),
        cooldown_steps=_cooldown_steps(proposal.reason, view, state),
        acceptance=_acceptance(proposal, policy),
        risk=proposal.risk,
        base=base,
        diagnostics=dict(proposal.diagnostics),
    )


def _that_fits(
    proposal: Proposal, view: View, cap: float, funds: Funds
) -> tuple[Proposal, tuple[int, Asha, WorstCase] | Held]:
    """The first of a proposal and its cheaper forms that can be paid for, or the cheapest, and its ladder."""
    ladder = choose_ladder(proposal, view, _own_cap(proposal, cap, funds), funds)
    for fewer in proposal.cheaper:
        if not isinstance(ladder, Held):
            break
        # What is known of the run stands on the card, whichever form it takes.
        proposal = replace(fewer, diagnostics={**proposal.diagnostics, **fewer.diagnostics})
        ladder = choose_ladder(proposal, view, _own_cap(proposal, cap, funds), funds)
    return proposal, ladder


def _own_cap(proposal: Proposal, cap: float, funds: Funds) -> float:
    """What may be spent on one form of a proposal, which may have a share of its own."""
    return cap if proposal.share is None else min(cap, proposal.share * funds.total)


def held_back(
    proposal: Proposal,
    view: View,
    state: PacingState,
    open_cards: Sequence[CardRecord],
    outranked_by: str | None = None,
) -> Held | None:
    """Say why a proposal must wait whatever it costs, the first thing that :func:`admit` looks at; None: it need not."""
    return (
        _limits(proposal, view, state, open_cards)
        or _cooldown(proposal, view, state)
        or _conflict(proposal, open_cards, outranked_by)
    )


def _acceptance(proposal: Proposal, policy: Policy) -> Acceptance:
    """What a card's result must show; states of the trunk's own trajectory have thresholds of their own, and nothing proves an adjustment."""
    match proposal.action:
        case "adjust":
            return Acceptance()
        case "fork":
            z = policy.evidence.z
        case "merge":
            z = policy.averages.z
        case "stop":
            z = STOP_Z
        case _:
            assert_never(proposal.action)
    return Acceptance(
        metric=proposal.metric, z=z, slices="ignore" if proposal.action == "stop" else policy.evidence.slices
    )


def after_verdict(
    state: PacingState, card: PlanCard, outcome: Ended, *, step: int, policy: Policy, planning_budget: int
) -> list[CooldownSet]:
    """Set the cooldowns that follow from a card's end; call it once for every card that ends.

    An adopted card makes its reason's cooldown shorter, an applied one leaves it, an inconclusive, failed or unanswered one longer, a rejected or rolled
    back one longer twice over. After a card that ran, every other reason waits a quarter of the planning budget too (ten blocks of
    the trend), so that the signals speak of the weights that are there now; ``instability_spike`` does not. A stale card
    cools nothing down: it was not its reason's fault.

    Args:
        state: Changed in place.
        card: The card that ended.
        outcome: How it ended.
        step: Trunk step.
        policy: Growth and shrinkage.
        planning_budget: B in steps.

    Returns:
        The facts, with what they say already in the state.
    """
    if outcome is CardState.STALE:
        return []
    pacing = policy.pacing
    match outcome:
        case CardState.ADOPTED:
            change = pacing.cooldown_shrink
        case CardState.APPLIED:
            change = 1.0
        case CardState.REJECTED | CardState.ROLLED_BACK:
            change = pacing.cooldown_grow**2
        case _:
            change = pacing.cooldown_grow
    low, high = FACTOR_BOUNDS
    reason: str = card.reason
    factor = min(high, max(low, state.factor.get(reason, 1.0) * change))
    state.factor[reason] = factor
    until = step + round(card.cooldown_steps * change)
    state.until[reason] = max(until, state.until.get(reason, 0))
    facts = [
        CooldownSet(
            reason=reason,
            until=state.until[reason],
            why=f"card {card.id} ended {outcome} at step {step}: its {card.cooldown_steps} steps times {change:g}",
        )
    ]
    ran = outcome not in (CardState.REFUSED, CardState.EXPIRED)
    if ran and planning_budget >= 4:
        rest = step + planning_budget // 4
        state.until[EVERY] = max(rest, state.until.get(EVERY, 0))
        facts.append(
            CooldownSet(
                reason=EVERY,
                until=state.until[EVERY],
                why=f"card {card.id} ended {outcome} at step {step}: the signals need {planning_budget // 4} steps to settle",
            )
        )
    return facts


def _limits(proposal: Proposal, view: View, state: PacingState, cards: Sequence[CardRecord]) -> Held | None:
    pacing = view.policy.pacing
    made = sum(state.counts.values())
    if made >= pacing.max_cards:
        return Held(
            code="max_cards", why=f"{made} cards were made, and pacing.max_cards is {pacing.max_cards}"
        )
    # Adoptions choose anew from the same held-out data each time: the tower that they build ends somewhere.
    depth = sum(record.state is CardState.ADOPTED for record in cards)
    if depth >= pacing.max_depth:
        told = f"{depth} adopted cards stand on top of each other, and pacing.max_depth is {pacing.max_depth}"
        return Held(code="max_depth", why=told)
    if view.remaining <= 0:
        return Held(code="no_time", why="the run has no steps left")
    total = view.step + view.remaining
    first = pacing.warmup_steps
    if first is None:
        # Trouble at the very start is found by these two alone, and it is cheapest to mend then.
        early = proposal.reason in ("instability_spike", "learning_rate_probe")
        first = min(200, total // 10) // (2 if early else 1)
    if view.step < first:
        return Held(code="warmup", why=f"step {view.step} lies in the warm-up, which ends at step {first}")
    return None


def _cooldown(proposal: Proposal, view: View, state: PacingState) -> Held | None:
    own = state.until.get(proposal.reason, 0)
    if view.step < own:
        return Held(code="cooldown", why=f"{proposal.reason} cools down until step {own}")
    every = state.until.get(EVERY, 0)
    if view.step < every and proposal.reason != "instability_spike":
        return Held(code="global_cooldown", why=f"every reason cools down until step {every}")
    return None


def _conflict(proposal: Proposal, open_cards: Sequence[CardRecord], outranked_by: str | None) -> Held | None:
    """One fork at a time, and no end of the run while one trains; merges of the trunk's averages stand in nobody's way."""
    for record in open_cards:
        card = record.card
        if card.reason == proposal.reason and (record.state in WAITING or record.state in _AT_WORK):
            return Held(code="waiting", why=f"card {card.id} of the same reason is {record.state} already")
        if card.action != "fork" or proposal.action == "merge":
            continue
        if record.state is CardState.APPROVED or record.state in _AT_WORK:
            return Held(code="busy", why=f"card {card.id} ({card.reason}) is {record.state}")
        if proposal.action == "fork" and card.id == outranked_by:
            return Held(
                code="outranked", why=f"card {card.id} ({card.reason}) is more urgent and was made just now"
            )
    return None


def _cooldown_steps(reason: str, view: View, state: PacingState) -> int:
    if reason == "learning_rate_probe":
        return 0  # there is one a run
    base = view.policy.pacing.cooldown_steps
    steps = view.planning_budget if base is None else base
    return round(steps * state.factor.get(reason, 1.0))
