"""What a running card's trials have brought so far."""

from __future__ import annotations

from math import isfinite

from automode.engine.state import Execution, State
from automode.planner.events import TrialReported, Weights
from automode.planner.sharing import MAX_EXPERTS


def rung_of(execution: Execution, state: State, resource: int) -> int:
    """The scheduler's rung that a trial's own resource stands for: the specialist of a part is done wherever its share ends."""
    card = state.cards[execution.card].card
    assert card.asha is not None
    return card.asha.max_steps if execution.steps else resource


def way_of(execution: Execution, trial: int, rung: int) -> int:
    """How far a trial trains to come to a rung, in resource steps."""
    return execution.steps[trial] if execution.steps else rung


def finished_trials(execution: Execution, state: State) -> list[TrialReported]:
    """Reports at the top rung with finite values, best first, ties by trial."""
    card = state.cards[execution.card].card
    assert card.asha is not None
    top = card.asha.max_steps
    reports = [r for (_, rung), r in execution.reports.items() if rung == top and isfinite(r.value)]
    return sorted(reports, key=lambda r: (-r.value, r.trial))


def experts_of(execution: Execution, state: State) -> list[TrialReported]:
    """Reports of the specialists that a router or a merge takes beside the control, best first; those of parts are all taken."""
    found = finished_trials(execution, state)
    return found if execution.steps else found[:MAX_EXPERTS]


def weights_of(report: TrialReported) -> Weights:
    """The state that a trial's report offers."""
    assert report.checkpoint is not None
    return Weights(checkpoint=report.checkpoint, choice=report.choice)


def control_weights(execution: Execution) -> Weights:
    """What the candidates are judged against."""
    if execution.annealed is not None:
        return weights_of(execution.annealed)
    if execution.control is not None:
        return Weights(checkpoint=execution.control.checkpoint, choice=execution.control.choice or "raw")
    assert execution.merged is not None
    assert execution.merged.control is not None
    return execution.merged.control
