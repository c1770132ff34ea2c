"""The probe of the rate: what it shows of a trial that is level with the trunk, which lead is no more than an early one, and how long restarts may be asked for."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import Final

from automode.engine import lifecycle
from automode.engine.state import Execution, State
from automode.planner.acceptance import Evidence
from automode.planner.metrics import Metric
from automode.planner.rules.base import Probed

LED: Final = 0.2
"""Share of the loss that is left, or of what was learnt so far, that a higher rate has to gain to be adopted at once."""


def first(state: State, execution: Execution) -> bool:
    """Whether a longer trial may follow, so that it matters how far below the control the best is."""
    card = state.cards[execution.card].card
    return card.reason == "learning_rate_probe" and state.counts.get("learning_rate_probe", 0) == 1


def weighed(state: State, execution: Execution, evidence: Evidence, metric: Metric) -> Evidence:
    """Hold a higher rate that is better by no more than any higher rate is so early in a run: a longer trial may tell."""
    variant = None if execution.chosen is None else execution.chosen.variant
    if not evidence.accepted or variant is None or variant.lr_mul <= 1.0 or execution.control_value is None:
        return evidence
    left, learnt = _left(state, metric, execution.control_value), _learnt(state)
    if not (left > 0.0 and isfinite(learnt)):
        return evidence
    share = evidence.mean / left
    most = max(share, share / learnt)
    told = f"it takes {share:.0%} of the loss that is left, {share / learnt:.0%} of what was learnt so far"
    if most >= LED:
        return replace(evidence, why=f"{evidence.why}; {told}")
    why = f"{evidence.why}; but {told}, and any higher rate may lead by less than {LED:.0%} so early"
    return replace(evidence, verdict="inconclusive", why=why)


def remember(state: State, execution: Execution, metric: Metric, z: float) -> Probed | None:
    """Keep what a probe has shown, for the rule to decide whether it goes on."""
    best, control = execution.chosen, execution.control_value
    if best is None or best.variant is None or control is None:
        return None
    asha = state.cards[execution.card].card.asha
    assert asha is not None
    left = _left(state, metric, control)
    lost = (control - best.value) / (left * _learnt(state)) if left > 0.0 else float("nan")
    state.probed = Probed(
        variant=best.variant,
        z=z,
        lost=lost,
        steps=asha.max_steps,
        step=state.step,
        loss=state.suite.loss_z.median,
    )
    return state.probed


def may_restart(state: State) -> bool:
    """Whether a card may still ask for the run's first weights: within the probe's windows, and while one that restarts waits or runs."""
    probe, probed = state.policy.probe, state.probed
    until = probe.longer_until if probed is not None and probed.variant.restart else probe.until
    if state.run is None or state.step <= until * max(
        state.run.total_steps, state.step + lifecycle.steps_left(state)
    ):
        return True
    live = (
        r.card.training_recipe
        for k, r in state.cards.items()
        if r.state in lifecycle.OPEN or k in state.executions
    )
    return any(recipe is not None and recipe.restarts for recipe in live)


def _left(state: State, metric: Metric, value: float) -> float:
    """The loss that is left at a mean value of a metric: how far it is from its best."""
    classes = state.run is not None and state.run.task == "classification"
    return (1.0 if classes and metric != "nll" else 0.0) - value


def _learnt(state: State) -> float:
    """What the run has learnt so far as a multiple of the loss that is left, by its training loss; NaN where that is not known.

    Losses of one metric are to each other about as those of another.
    """
    now, first = state.suite.loss_z.median, state.guards.level.top
    return first / now - 1.0 if first is not None and 0.0 < now < first else float("nan")
