"""When the sample ledger is read, and how much of the run's time and compute that may take."""

from __future__ import annotations

from math import ceil
from typing import Final

from automode.engine.emission import Emission
from automode.engine.state import State
from automode.planner.events import Scan

LEAST_PROBE: Final = 128
"""Samples that a scan reads at least, unless the policy's own number is smaller."""


def ask(state: State, out: Emission) -> None:
    """Ask for the ledger to be read, at a cadence, one scan at a time."""
    assert state.run is not None
    if state.step < state.next_scan or not (state.run.has_ids and state.run.exact_losses):
        return
    state.next_scan = state.step + (state.policy.scan.every or max(1, state.planning_budget // 2))
    if any(command.kind == "scan" for command in state.pending.values()):
        return
    probe = _probe_of(state)
    if state.ledger.available < probe:
        return  # the caps leave nothing for reading features
    wanted = set(state.policy.reasons)
    if not wanted & {"residual_cluster", "high_loss_tail", "label_noise"}:
        return
    state.scanned_at = state.step
    out.command(
        Scan(
            tail_from=state.policy.scan.tail_from,
            probe=probe,
            clusters="residual_cluster" in wanted,
            details=state.policy.scan.details,
            ask_from=_ask_from(state, probe),
        )
    )


def _ask_from(state: State, probe: int) -> float | None:
    """Estimate of label noise from which the trunk's average is asked of every sample, where a card may follow and pay for it."""
    run, policy = state.run, state.policy
    assert run is not None
    if "label_noise" not in policy.reasons or not run.averages or not run.train_samples:
        return None
    if not policy.noise.from_ * run.total_steps <= state.step < run.total_steps - state.planning_budget:
        return None
    if state.ledger.available < probe + run.val_a + run.train_samples:
        return None
    return policy.noise.min_noise


def _probe_of(state: State) -> int:
    """How many samples a scan may read, so that the least number of scans keeps to its share of the run's compute.

    A scan reads half of the held-out data too. Below :data:`LEAST_PROBE` samples nobody can tell anything, and scans come
    less often instead.
    """
    assert state.run is not None
    scan = state.policy.scan
    each = scan.cost * state.ledger.total / max(1, scan.at_least) - state.run.val_a
    return min(scan.probe, max(LEAST_PROBE, int(each)))


def rest(state: State, steps: int, passes: float = 0.0) -> None:
    """Put the next scan off for so many steps, though a run that may act gets its least number of scans all the same.

    Args:
        state: Changed in place.
        steps: Steps in which the time taken is no more than its share.
        passes: What a scan took; until that is no more than its share of the compute, nothing brings the next one forward.
    """
    assert state.run is not None
    scan = state.policy.scan
    if passes:
        state.scan_paid_at = state.step + ceil(passes / (scan.cost * state.passes_per_step))
    state.next_scan = max(state.next_scan, state.step + steps)
    if scan.at_least and state.mode in ("propose", "act"):
        state.next_scan = min(
            state.next_scan, state.scanned_at + max(1, state.run.total_steps // scan.at_least)
        )
    state.next_scan = max(state.next_scan, state.scan_paid_at)
