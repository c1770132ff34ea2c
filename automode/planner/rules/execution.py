"""The last look of every rule: a remedy that cannot run here is not proposed."""

from __future__ import annotations

from automode.planner.capability import refusals
from automode.planner.rules.base import Proposal, Silence, View


def if_executable(proposal: Proposal, view: View) -> Proposal | Silence:
    """Return the proposal, or a silence that names everything that this version or run cannot carry out."""
    cannot = refusals(proposal, view.run, min_held_out=view.policy.evidence.min_samples)
    if cannot:
        return Silence(code="cannot_run", why="; ".join(cannot))
    return proposal
