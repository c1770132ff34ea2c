"""When diagnostics are taken: rarely, within their share of compute and time, and never because something happened."""

from __future__ import annotations

from math import ceil
from typing import Final

from automode.engine import lifecycle, scanning
from automode.engine.emission import Emission
from automode.engine.state import State
from automode.planner.diagnostics import cost_of
from automode.planner.events import Diagnose, Diagnosed

KEEP: Final = 16
"""Readings that cards may draw on."""


def every(state: State) -> int:
    """Steps between two readings, at the least."""
    return state.policy.diagnostics.every or max(1, state.planning_budget // 2)


def ask(state: State, out: Emission) -> None:
    """Ask for a reading where one is due: all of it where the share allows that, else what costs no pass."""
    policy = state.policy.diagnostics
    if not policy.enabled or state.step < state.next_diagnosis or state.trunk_ended or state.run is None:
        return
    if any(command.kind == "diagnose" for command in state.pending.values()):
        return
    state.next_diagnosis = state.step + every(state)
    price = cost_of(policy)
    affordable = state.diagnosis_passes + price <= policy.share * state.ledger.trunk
    diagnosable = state.run.has_ids and not state.run.own_step
    whole = diagnosable and affordable and state.ledger.available >= price
    if not whole and state.diagnosed and not any(state.diagnosed[-1].updates):
        return  # there is nothing to be had without passes, as the last reading says
    out.command(
        Diagnose(
            examples=policy.examples if whole else 0,
            probe=policy.probe if whole else 0,
            iterations=policy.iterations,
        )
    )


def diagnosed(state: State, body: Diagnosed) -> None:
    """Keep a reading for the cards to come; it and the scans share one part of the run's time."""
    state.diagnosed.append(body)
    del state.diagnosed[:-KEEP]
    state.diagnosis_passes += ceil(body.passes)
    lifecycle.charge(state, "scan", body.passes)
    state.next_diagnosis = max(state.next_diagnosis, state.step + body.rest)
    scanning.rest(state, max(0, state.next_scan - state.step) + body.rest)
