"""What a running card's trials have brought so far."""

from __future__ import annotations

from math import isfinite
from typing import Final

from automode.engine.state import Execution, State
from automode.planner.events import TrialReported, Weights

MAX_EXPERTS: Final = 3
"""Specialists that a router or a merge takes at the most."""


def finished_trials(execution: Execution, state: State) -> list[TrialReported]:
    """Reports at the top rung with finite values, best first, ties by trial."""
    card = state.cards[execution.card].card
    assert card.asha is not None
    top = card.asha.max_steps
    reports = [r for (_, resource), r in execution.reports.items() if resource == top and isfinite(r.value)]
    return sorted(reports, key=lambda r: (-r.value, r.trial))


def experts_of(execution: Execution, state: State) -> list[TrialReported]:
    """Reports of the specialists that a router or a merge takes beside the control, best first."""
    return finished_trials(execution, state)[:MAX_EXPERTS]


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
