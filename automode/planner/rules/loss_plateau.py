"""Training on as it is brings less than the person asked for, even in the best case that the data allow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from automode.planner.cards import Reason
from automode.planner.recipes import Adjustment, TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable
from automode.planner.signals.trend import MIN_BLOCKS, BlockTrend, TrendState
from automode.planner.variants import DrawLogUniform, SearchSpace

DROPS = (
    Variant(name="third", lr_mul=1 / 3),
    Variant(name="tenth", lr_mul=0.1),
    Variant(name="gentle", lr_mul=0.6),
)
"""The drop in the learning rate that a person would try first; it is an arm of every card."""

DRAWN = DrawLogUniform(low=0.03, high=3.0)
"""What else is tried: factors on the rate from a thirtieth to three times, their logarithms evenly."""


@lru_cache(maxsize=64)
def sweep(arms: int) -> TrainingRecipe:
    """Return a small sweep over the learning rate: one arm in three is a drop by a fixed factor, the others are drawn.

    Args:
        arms: How many trials; ASHA stops two in three of them at each rung.
    """
    fixed = min(len(DROPS), max(1, arms // 3))
    drawn = arms - fixed
    search = SearchSpace(parameters={"lr_mul": DRAWN}, draws=drawn) if drawn else None
    return TrainingRecipe(variants=DROPS[:fixed], search=search)


@dataclass(frozen=True, slots=True)
class LossPlateau:
    """Propose a small sweep over the learning rate when the trend says PLATEAU at the confidence for acting.

    Silent while the trend is undecided (no significant trend is no plateau), before its first look, and where the
    schedule is about to drop the rate anyway. Thresholds are ``policy.trend``: budget, gain, z_execute.
    """

    id: Reason = "loss_plateau"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose rates when the best case over the next B steps is below the gain that was asked for."""
        trend = view.signals.trend
        quiet = _silence(trend) or _scheduled(view)
        if quiet is not None:
            return quiet
        return if_executable(
            Proposal(
                reason=self.id,
                action="fork",
                because=trend.describe(),
                training_recipe=sweep(view.policy.pacing.variants),
                diagnostics={
                    "best_case": trend.best_execute,
                    "worst_case": trend.worst_execute,
                    "gain": trend.gain,
                    "budget": trend.budget,
                    "z": trend.z_execute,
                    "z_against_gain": trend.z_against_gain,
                    "level": trend.level,
                    "slope_per_step": trend.slope,
                    "window": trend.window,
                    "blocks": trend.used,
                },
            ),
            view,
            otherwise=Adjustment(rate_factor=DROPS[0].lr_mul),
        )


def _silence(trend: BlockTrend) -> Silence | None:
    if trend.firm is TrendState.REGRESSING:
        return Silence(
            code="regressing",
            why=f"the loss rises (by at least {trend.rise:.1%}): that is instability and no plateau",
        )
    if trend.used == 0:
        return Silence(
            code="too_few_blocks",
            why=f"{trend.blocks} blocks of {trend.block_steps} steps since the last reset; a look needs {MIN_BLOCKS}",
        )
    match trend.firm:
        case TrendState.PLATEAU:
            return None
        case TrendState.IMPROVING:
            return Silence(
                code="improving",
                why=(
                    f"even in the worst case the next {trend.budget} steps bring {trend.worst_execute:.1%}, and "
                    f"{trend.gain:.1%} was asked for"
                ),
            )
        case _:
            code = "advised_only" if trend.status is TrendState.PLATEAU else "undecided"
            return Silence(
                code=code,
                why=(
                    f"the next {trend.budget} steps bring between {trend.worst_execute:.1%} and {trend.best_execute:.1%} "
                    f"(z {trend.z_execute:g}), and {trend.gain:.1%} was asked for: not decided"
                ),
            )


def _scheduled(view: View) -> Silence | None:
    until = view.step + view.planning_budget
    drop = next((s for s in sorted(view.run.known_drops) if view.step < s <= until), None)
    if drop is None:
        return None
    return Silence(
        code="scheduled_drop",
        why=f"the schedule drops the rate at step {drop}, within the {view.planning_budget} steps ahead",
    )
