"""A running card: trials up the ladder, the control, the candidates, one look at the evidence, adoption.

The control is the trunk itself. Specialists are compared with it at equal compute, on val-A while they compete and once
on val-B when one of them is to replace it. Answers for cards that have ended meanwhile are counted and otherwise ignored.
"""

from __future__ import annotations

from math import ceil
from typing import Final

from automode.engine import annealing, deciding, lifecycle
from automode.engine.emission import Emission
from automode.engine.state import Execution, State
from automode.engine.trials import (
    control_weights,
    experts_of,
    finished_trials,
    rung_of,
    way_of,
    weights_of,
)
from automode.planner.cards import CardState, PlanCard
from automode.planner.events import (
    CardStarted,
    CommandFailed,
    FitGate,
    GateFitted,
    Merge,
    Merged,
    Resolve,
    Resolved,
    Snapshot,
    Snapshotted,
    StartTrial,
    TrialDecided,
    TrialFailed,
    TrialReported,
    TrialsNoted,
)
from automode.planner.pricing import worst_case
from automode.planner.recipes import MergeDistill
from automode.planner.sharing import split_steps
from automode.scheduler import ASHA

ATTEMPTS: Final = 3
"""Tries of a segment; specialists of parts have one, since their lengths differ and one repeat of the longest was not paid for."""


def snapshotted(state: State, body: Snapshotted, out: Emission) -> None:
    """The trunk's state is durable: begin from it, or compare with it."""
    lifecycle.charge(state, "evaluate", body.passes, card=body.card)
    execution = state.executions.get(body.card)
    if execution is None:
        return
    card = state.cards[body.card].card
    if body.purpose == "base":
        execution.base = body
        out.command(Resolve(card=card.id, selection=card.selection))
    else:
        execution.control = body
        combine(state, execution, out)


def resolved(state: State, body: Resolved, out: Emission) -> None:
    """The data are chosen: start the ladder, and book the control's snapshot at the step of equal compute."""
    lifecycle.charge(state, "scan", body.passes, card=body.card)
    execution = state.executions.get(body.card)
    if execution is None or execution.base is None or state.run is None:
        return
    card = state.cards[body.card].card
    assert card.asha is not None
    assert card.training_recipe is not None
    price = worst_case(card, state.run)
    execution.variants = body.variants
    shared = card.training_recipe.per_part
    if shared is not None:
        sizes = [part.n for part in body.parts]
        execution.steps = split_steps(len(sizes) * card.asha.max_steps, sizes, shared)
    execution.control_at = state.step + price.control_steps
    pace = (price.resource_steps + price.control_trial_steps) / price.control_steps
    execution.per_trunk_step = max(1.0, pace)
    execution.asha = ASHA(
        card.budget_steps,
        card.asha.max_steps,
        card.asha.reduction_factor,
        mode="max",
        candidates=len(body.variants),
        seed=(state.seed + card.step) & 0x7FFFFFFF,
        quota=True,
        max_attempts=ATTEMPTS if card.training_recipe.retry and not execution.steps else 1,
        budget=price.resource_steps,
    )
    started = out.fact(
        CardStarted(
            card=card.id,
            step=state.step,
            checkpoint=execution.base.checkpoint,
            control_at=execution.control_at,
        )
    )
    out.command(Snapshot(card=card.id, purpose="control", at_step=execution.control_at), cause=started)
    annealing.begin(state, execution, out, cause=started)
    _issue(state, execution, out, cause=started)


def reported(state: State, body: TrialReported, out: Emission) -> None:
    """A trial reached a rung."""
    lifecycle.charge(state, "trial", body.passes, card=body.card, trial=body.trial)
    execution = state.executions.get(body.card)
    if execution is None or execution.asha is None:
        return
    if body.trial == execution.control_trial:
        told = annealing.reported(state, execution, body, out)
        if told is not None:
            _go_on(state, execution, out, cause=told)
        return
    rung = rung_of(execution, state, body.resource)
    outcome = execution.asha.report(body.trial, rung, body.value, body.rung_attempt)
    execution.reports[(body.trial, rung)] = body
    seq = _decided(state, execution, outcome, out)
    _drop(execution)
    _go_on(state, execution, out, cause=seq)


def _drop(execution: Execution) -> None:
    """Forget the checkpoints that the ladder can never ask for again (a rank in a finite list only worsens)."""
    asha = execution.asha
    assert asha is not None
    for trial, rung in asha.collectable():
        asha.forget(trial, rung)
        report = execution.reports.get((trial, asha.ladder.levels[rung]))
        if report is not None and report.checkpoint is not None:
            execution.dropped.add(report.checkpoint)


def trial_failed(state: State, body: TrialFailed, out: Emission) -> None:
    """A segment ended without a value: the scheduler retries it, or gives the trial up."""
    lifecycle.charge(state, "trial", body.passes, card=body.card, trial=body.trial)
    execution = state.executions.get(body.card)
    if execution is None or execution.asha is None:
        return
    if body.trial == execution.control_trial:
        annealing.failed(state, execution, body, out)
        return
    outcome = execution.asha.failed(
        body.trial,
        body.rung_attempt,
        resource=None if body.resource is None else rung_of(execution, state, body.resource),
        retryable=body.retryable,
        cause=body.error[:200],
        spent=ceil(body.passes / state.passes_per_step),
    )
    seq = _decided(state, execution, outcome, out)
    _go_on(state, execution, out, cause=seq)


def noted(state: State, body: TrialsNoted) -> None:
    """Keep with the card what is said of its trials; a card that another policy never made has no use for it."""
    record = state.cards.get(body.card)
    if record is not None:
        record.notes.append(body)


def _go_on(state: State, execution: Execution, out: Emission, *, cause: int) -> None:
    _issue(state, execution, out, cause=cause)
    combine(state, execution, out, cause=cause)


def _issue(state: State, execution: Execution, out: Emission, *, cause: int) -> None:
    """Fill the backend's slots with what the scheduler wants trained next."""
    assert state.run is not None
    assert execution.asha is not None
    assert execution.base is not None
    card = state.cards[execution.card].card
    assert card.asha is not None
    assert card.training_recipe is not None
    room = min(state.run.slots, state.policy.pacing.max_parallel or state.run.slots)
    room -= annealing.awaited(execution)
    while execution.asha.in_flight < room:
        issue = execution.asha.decide()
        if issue is None:
            return
        job = issue.job
        seq = _decided(state, execution, issue, out, cause=cause)
        last = execution.reports.get((job.trial, job.from_resource))
        checkpoint = execution.base.checkpoint if last is None or last.checkpoint is None else last.checkpoint
        out.command(
            StartTrial(
                card=card.id,
                trial=job.trial,
                rung_attempt=job.attempt,
                variant=execution.variants[job.trial],
                base=execution.base.checkpoint,
                checkpoint=checkpoint,
                from_resource=job.from_resource,
                to_resource=way_of(execution, job.trial, job.to_resource),
                top_resource=way_of(execution, job.trial, card.asha.max_steps),
                per_trunk_step=execution.per_trunk_step,
                resources=card.training_recipe.resources,
            ),
            cause=seq,
        )


def _decided(
    state: State, execution: Execution, decision: object, out: Emission, *, cause: int | None = None
) -> int:
    job = getattr(decision, "job", None)
    trial = job.trial if job is not None else decision.trial  # type: ignore[attr-defined]
    resource = job.to_resource if job is not None else decision.resource  # type: ignore[attr-defined]
    return out.fact(
        TrialDecided.model_validate(
            {
                "card": execution.card,
                "trial": trial,
                "resource": way_of(execution, trial, resource or 0),
                "decision": type(decision).__name__.lower(),
                "rank": getattr(decision, "rank", None),
                "why": decision.reason,  # type: ignore[attr-defined]
            }
        ),
        cause=cause,
    )


def combine(state: State, execution: Execution, out: Emission, *, cause: int | None = None) -> None:
    """When the ladder is done and the control is there: fit the gate and merge, then choose.

    Where no trial got to the top there is nothing to compare, so that the control is not waited for.
    """
    asha = execution.asha
    if asha is None or not asha.finished or execution.combining:
        return
    finished = finished_trials(execution, state)
    if finished and (execution.control is None or annealing.awaited(execution)):
        return
    execution.combining = True
    if not finished:
        deciding.choose(state, execution, out)
        return
    card = state.cards[execution.card].card
    for report in finished:
        lifecycle.grow(
            state,
            out,
            node=f"{card.id}:t{report.trial}",
            parents=(state.lineage,),
            role="specialist",
            card=card.id,
            checkpoint=report.checkpoint,
            cause=cause,
        )
    reports = experts_of(execution, state)
    experts = tuple(weights_of(report) for report in reports)
    control = control_weights(execution)
    if card.gate_recipe is not None:
        names = tuple(execution.variants[r.trial].name for r in reports) if execution.steps else ()
        execution.waiting_for.add(
            out.command(FitGate(card=card.id, control=control, experts=experts, names=names), cause=cause)
        )
    if card.merge_recipe is not None and not _taught_by_mixture(card):
        execution.waiting_for.add(
            out.command(
                Merge(card=card.id, method=card.merge_recipe.kind, control=control, members=experts),
                cause=cause,
            )
        )
    if not execution.waiting_for:
        deciding.choose(state, execution, out)


def combined(state: State, body: GateFitted | Merged, command_id: str | None, out: Emission) -> None:
    """The gate is fitted, or the merge made."""
    lifecycle.charge(state, "gate" if isinstance(body, GateFitted) else "merge", body.passes, card=body.card)
    execution = state.executions.get(body.card)
    if execution is None:
        return
    if isinstance(body, GateFitted):
        execution.gate = body
        _teach(state, execution, body, out)
    else:
        execution.merged = body
    execution.waiting_for.discard(command_id or "")
    if not execution.waiting_for:
        deciding.choose(state, execution, out)


def _taught_by_mixture(card: PlanCard) -> bool:
    merge = card.merge_recipe
    return isinstance(merge, MergeDistill) and merge.teacher == "mixture"


def _teach(state: State, execution: Execution, fitted: GateFitted, out: Emission) -> None:
    """Begin a distillation that has waited for the mixture which teaches it."""
    card = state.cards[execution.card].card
    if not _taught_by_mixture(card) or fitted.checkpoint is None:
        return
    experts = tuple(weights_of(report) for report in experts_of(execution, state))
    merge = Merge(
        card=card.id,
        method="distill",
        control=control_weights(execution),
        members=experts,
        gate=fitted.checkpoint,
    )
    execution.waiting_for.add(out.command(merge))


def command_failed(state: State, body: CommandFailed, command_id: str | None, out: Emission) -> None:
    """A command failed: a gate or a merge is left out, anything else ends its card; the run goes on."""
    lifecycle.charge(state, "evaluate", body.passes, card=body.card)
    if body.card is None:
        return
    execution = state.executions.get(body.card)
    if execution is None:
        return
    if command_id in execution.waiting_for and execution.action == "fork":
        execution.waiting_for.discard(command_id)
        if not execution.waiting_for:
            deciding.choose(state, execution, out)
        return
    lifecycle.finish(state, body.card, CardState.FAILED, f"{body.command} failed: {body.error}", out)
