"""What fits: the compute cap, the time that is left, and the longest ladder within both.

A person's card is priced by :func:`quote` as it stands; a proposal gets its ladder from :func:`choose_ladder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Final

from automode.planner.capability import refusals
from automode.planner.cards import Action, PlanCard
from automode.planner.events import Run
from automode.planner.policy import Policy
from automode.planner.pricing import (
    WorstCase,
    climbers,
    price_fork,
    rungs,
    step_passes,
    worst_case,
)
from automode.planner.recipes import Asha, Cost, MergeDistill
from automode.planner.rules.base import Proposal, View
from automode.planner.sharing import trials_of

MARGIN_SHARE: Final = 0.05
"""Share of the control's steps that is kept free between a card's end and the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Why a proposal does not become a card now: a stable ``code`` and a sentence with the numbers."""

    code: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Funds:
    """What there is to spend, in sample passes.

    Attributes:
        remaining: What the rest of the run will take, before this card.
        total: What the user's whole run takes.
        spent: What automode has spent or reserved so far.
        held: Of that, what running cards have reserved and not spent; what they hold, the next card may not.
        seconds_per_step: Measured wall-clock seconds of a trunk step; None where it is not known.
        memory_mib: Extra memory that a fork takes at the most, MiB; None where it is not known.
    """

    remaining: float
    total: float
    spent: float
    held: float = 0.0
    seconds_per_step: float | None = None
    memory_mib: float | None = None


def quote(card: PlanCard, *, policy: Policy, run: Run, funds: Funds, remaining_steps: int) -> PlanCard | Held:
    """Price a card as it stands, for what a person wrote and once more before any card starts.

    Nothing is shrunk here: a person's ladder is theirs.

    Args:
        card: The card; its stated cost is not believed.
        policy: The caps.
        run: Sizes.
        funds: What there is to spend; leave out of ``spent`` what is reserved for this very card.
        remaining_steps: Trunk steps that are left.

    Returns:
        The card with its cost filled in, or why it does not fit.
    """
    cannot = refusals(card, run, min_held_out=policy.evidence.min_samples)
    if cannot:
        return Held(code="cannot_run", why="; ".join(cannot))
    cap = spending_cap(policy, funds, card.action)
    priced = worst_case(card, run)
    if isinstance(cap, Held):
        if priced.passes > 0.0:
            return cap
        cap = 0.0
    held = unaffordable(priced, cap, funds, policy, action=card.action) or no_time(
        priced, remaining_steps, run, policy
    )
    if held is not None:
        return _with_the_students_part(held, card, priced)
    return card.model_copy(update={"cost": stated_cost(priced, funds, run, card.action)})


def share_of_rest(policy: Policy, action: Action) -> float:
    """Share of the remaining compute that a card may take.

    Forks explore, and are held to ``exploration_share``. What trains nothing and comes when little remains, as the finishing merge, may
    take ``total_share`` of it where that is more.
    """
    pacing = policy.pacing
    return pacing.exploration_share if action == "fork" else max(pacing.exploration_share, pacing.total_share)


def spending_cap(policy: Policy, funds: Funds, action: Action) -> float | Held:
    """Sample passes that one more card may take."""
    free = policy.pacing.total_share * funds.total - funds.spent
    if free <= 0.0:
        return Held(
            code="over_total",
            why=(
                f"automode has spent or reserved {funds.spent:,.0f} sample passes, and pacing.total_share "
                f"({policy.pacing.total_share:.0%} of the run's {funds.total:,.0f}) is used up"
            ),
        )
    shared = share_of_rest(policy, action) * (funds.remaining + funds.held) - funds.held
    return max(0.0, min(shared, free))


def unaffordable(
    priced: WorstCase,
    cap: float,
    funds: Funds,
    policy: Policy,
    *,
    share: float | None = None,
    action: Action = "fork",
) -> Held | None:
    """Hold what costs more sample passes than the cap; ``share`` is the proposal's own part in it."""
    if ceil(priced.passes) <= floor(cap):  # the ledger counts whole passes
        return None
    own = "" if share is None else f", and {share:.0%} of the run for this reason"
    return Held(
        code="over_cap",
        why=(
            f"it would take up to {priced.passes:,.0f} sample passes, and {cap:,.0f} may be spent on it "
            f"({share_of_rest(policy, action):.0%} of the {funds.remaining:,.0f} that remain, and within "
            f"{policy.pacing.total_share:.0%} of the run's {funds.total:,.0f} less the {funds.spent:,.0f} spent{own})"
        ),
    )


def no_time(priced: WorstCase, remaining: int, run: Run, policy: Policy) -> Held | None:
    """The control has to get there before the run ends, after the steps that the card itself costs are taken off."""
    paid = ceil(priced.passes / step_passes(run)) if policy.budget == "within" else 0
    margin = 1 + ceil(MARGIN_SHARE * priced.control_steps)
    if priced.control_steps + paid + margin <= remaining:
        return None
    return Held(
        code="no_time",
        why=(
            f"the control needs {priced.control_steps} steps and a margin of {margin}, the card costs up to {paid} more, "
            f"and {remaining} steps are left"
        ),
    )


def choose_ladder(
    proposal: Proposal, view: View, cap: float, funds: Funds
) -> tuple[int, Asha, WorstCase] | Held:
    """Choose the longest ladder that fits: cap, time, and at most B steps at the top.

    The shortest rung is counted in optimizer steps, of which a trial may take several a batch. One rung more than the candidates need is tried first, because it decides earlier; where its first rung would be short,
    the rungs that the candidates need. Specialists of parts do not compete, and have one rung.
    """
    recipe = proposal.training_recipe
    assert recipe is not None
    pacing = view.policy.pacing
    eta = pacing.reduction_factor
    trials, need = trials_of(recipe, proposal.selection), 1
    while recipe.per_part is None and climbers(trials, need, eta)[-1] > 1:
        need += 1
    shortest = ceil(pacing.min_rung / min((v.updates for v in recipe.variants), default=1))
    longer = [] if recipe.per_part else [(need + 1, 2 * shortest)]

    def least_first(first: int, count: int) -> int:
        rungs_up: int = eta ** (count - 1)
        return max(first, ceil(proposal.least_steps / rungs_up))

    def priced(first: int, count: int) -> WorstCase:
        return price_fork(
            recipe=recipe,
            levels=rungs(first, eta, first * eta ** (count - 1)),
            reduction_factor=eta,
            run=view.run,
            selection=proposal.selection,
            gate=proposal.gate_recipe,
            merge=proposal.merge_recipe,
        )

    def misfit(first: int, count: int) -> Held | None:
        worst = priced(first, count)
        return unaffordable(worst, cap, funds, view.policy, share=proposal.share) or no_time(
            worst, view.remaining, view.run, view.policy
        )

    shortest = least_first(shortest, need)
    for count, least in (*((n, least_first(first, n)) for n, first in longer), (need, shortest)):
        high = view.planning_budget // eta ** (count - 1)
        if high < least or misfit(least, count) is not None:
            continue
        low = least
        while low < high:  # the largest first rung that fits; what a longer one costs only grows
            middle = (low + high + 1) // 2
            low, high = (middle, high) if misfit(middle, count) is None else (low, middle - 1)
        top = low * eta ** (count - 1)
        return low, Asha(reduction_factor=eta, max_steps=top), priced(low, count)
    top = shortest * eta ** (need - 1)
    if top > view.planning_budget:
        why = (
            f"the shortest ladder worth running goes from {shortest} to {top} steps, "
            f"and the planning budget is {view.planning_budget}"
        )
        return Held(code="no_time", why=why)
    held = misfit(shortest, need)
    assert held is not None
    several = "1 trial" if trials == 1 else f"{trials} trials"
    steps = f"{top} steps" if need == 1 else f"{shortest} to {top} steps"
    return Held(code=held.code, why=f"the shortest ladder worth running ({several}, {steps}): {held.why}")


def _with_the_students_part(held: Held, card: PlanCard, priced: WorstCase) -> Held:
    """Say of a distillation that does not fit how much of it is the student: it is granted by who asks for it, or not at all."""
    merge = card.merge_recipe
    if not isinstance(merge, MergeDistill):
        return held
    why = (
        f"{held.why}; distilling takes {priced.merge:,.0f} of the passes ({merge.steps} steps of the student, and every teacher's "
        "answers), and the control as many steps more: grant it by `pacing.exploration_share`, or give the student fewer steps"
    )
    return Held(code=held.code, why=why)


def stated_cost(priced: WorstCase, funds: Funds, run: Run, action: str) -> Cost:
    """Word a price as it stands on a card's face."""
    passes = float(ceil(priced.passes))
    seconds = funds.seconds_per_step
    memory = funds.memory_mib if action == "fork" else None
    return Cost(
        sample_passes=passes,
        share_of_remaining=_told(passes / funds.remaining) if funds.remaining > 0 else 0.0,
        memory_mib=None if memory is None else _told(memory + priced.copies * (run.model_mib or 0.0)),
        seconds=None if seconds is None else _told(passes / step_passes(run) * seconds),
    )


def _told(value: float) -> float:
    """Three significant digits, rounded up: a card states what is taken at the most."""
    if value <= 0.0:
        return 0.0
    unit = 10.0 ** (floor(log10(value)) - 2)
    return float(f"{ceil(value / unit - 1e-9) * unit:.12g}")
