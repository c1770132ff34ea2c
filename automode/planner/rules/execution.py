"""The last look of every rule: a remedy that cannot run here is not proposed."""

from __future__ import annotations

from dataclasses import replace

from automode.planner.capability import refusals
from automode.planner.recipes import Adjustment
from automode.planner.rules.base import Proposal, Silence, View


def if_executable(proposal: Proposal, view: View, otherwise: Adjustment | None = None) -> Proposal | Silence:
    """Return the proposal, or a silence that names everything that this version or run cannot carry out.

    Args:
        proposal: What the rule would do.
        view: What it looked at.
        otherwise: What it would change about the trunk itself in a run beside which no specialist can be trained. That is never
            proven, so that its risk is high.
    """
    cannot = refusals(proposal, view.run, min_held_out=view.policy.evidence.min_samples)
    if cannot:
        if otherwise is not None and view.run.adjusts and view.run.why_no_forks is not None:
            return _adjusting(proposal, otherwise, view)
        return Silence(code="cannot_run", why="; ".join(cannot))
    return proposal


def _adjusting(proposal: Proposal, adjustment: Adjustment, view: View) -> Proposal | Silence:
    adjusting = replace(
        proposal,
        action="adjust",
        because=f"{proposal.because} No specialist can be trained beside this run to compare with, so this is unproven.",
        training_recipe=None,
        gate_recipe=None,
        merge_recipe=None,
        adjustment=adjustment,
        risk="high",
    )
    cannot = refusals(adjusting, view.run)
    return Silence(code="cannot_run", why="; ".join(cannot)) if cannot else adjusting
