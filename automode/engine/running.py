"""A running card: trials up the ladder, the control, the candidates, one look at the evidence, adoption.

The control is the trunk itself. Specialists are compared with it at equal compute, on val-A while they compete and once
on val-B when one of them is to replace it. Answers for cards that have ended meanwhile are counted and otherwise ignored.
"""

from __future__ import annotations

from math import isfinite

from automode.engine import lifecycle
from automode.engine.emission import Emission
from automode.engine.state import Candidate, Execution, State
from automode.planner import approval
from automode.planner.acceptance import Evidence, judge_summary
from automode.planner.approval import PLANNER
from automode.planner.cards import CardState
from automode.planner.events import (
    Adopt,
    Adopted,
    CardStarted,
    CommandFailed,
    Evaluate,
    Evaluated,
    FitGate,
    GateFitted,
    Group,
    Merge,
    Merged,
    Resolve,
    Resolved,
    RolledBack,
    Snapshot,
    Snapshotted,
    StartTrial,
    TrialDecided,
    TrialFailed,
    TrialReported,
    VerdictGiven,
    Weights,
)
from automode.planner.paired import PairedSummary
from automode.planner.pricing import worst_case
from automode.scheduler import ASHA

MAX_EXPERTS = 3
SLICE_Z = 1.64


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
    price = worst_case(card, state.run)
    execution.variants = body.variants
    execution.control_at = state.step + price.control_steps
    execution.per_trunk_step = max(1.0, price.resource_steps / price.control_steps)
    execution.asha = ASHA(
        card.budget_steps,
        card.asha.max_steps,
        card.asha.reduction_factor,
        mode="max",
        candidates=len(body.variants),
        seed=(state.seed ^ int(card.id, 16)) & 0x7FFFFFFF,
        quota=True,
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
    _issue(state, execution, out, cause=started)


def reported(state: State, body: TrialReported, out: Emission) -> None:
    """A trial reached a rung."""
    lifecycle.charge(state, "trial", body.passes, card=body.card, trial=body.trial)
    execution = state.executions.get(body.card)
    if execution is None or execution.asha is None:
        return
    outcome = execution.asha.report(body.trial, body.resource, body.value, body.rung_attempt)
    execution.reports[(body.trial, body.resource)] = body
    seq = _decided(state, execution, outcome, out)
    _go_on(state, execution, out, cause=seq)


def trial_failed(state: State, body: TrialFailed, out: Emission) -> None:
    """A segment ended without a value: the scheduler retries it, or gives the trial up."""
    lifecycle.charge(state, "trial", body.passes, card=body.card, trial=body.trial)
    execution = state.executions.get(body.card)
    if execution is None or execution.asha is None:
        return
    outcome = execution.asha.failed(
        body.trial, body.rung_attempt, retryable=body.retryable, cause=body.error[:200]
    )
    seq = _decided(state, execution, outcome, out)
    _go_on(state, execution, out, cause=seq)


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
    while execution.asha.in_flight < state.run.slots:
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
                to_resource=job.to_resource,
                top_resource=card.asha.max_steps,
                per_trunk_step=execution.per_trunk_step,
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
                "resource": resource or 0,
                "decision": type(decision).__name__.lower(),
                "rank": getattr(decision, "rank", None),
                "why": decision.reason,  # type: ignore[attr-defined]
            }
        ),
        cause=cause,
    )


def combine(state: State, execution: Execution, out: Emission, *, cause: int | None = None) -> None:
    """When the ladder is done and the control is there: fit the gate and merge, then choose."""
    asha = execution.asha
    if asha is None or not asha.finished or execution.control is None or execution.combining:
        return
    execution.combining = True
    card = state.cards[execution.card].card
    finished = finished_trials(execution, state)
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
    experts = tuple(_weights(report) for report in finished[:MAX_EXPERTS])
    control = control_weights(execution)
    if experts and card.gate_recipe is not None:
        execution.waiting_for.add(
            out.command(FitGate(card=card.id, control=control, experts=experts), cause=cause)
        )
    if experts and card.merge_recipe is not None:
        execution.waiting_for.add(
            out.command(
                Merge(card=card.id, method=card.merge_recipe.kind, control=control, members=experts),
                cause=cause,
            )
        )
    if not execution.waiting_for:
        choose(state, execution, out)


def finished_trials(execution: Execution, state: State) -> list[TrialReported]:
    """Reports at the top rung with finite values, best first, ties by trial."""
    card = state.cards[execution.card].card
    assert card.asha is not None
    top = card.asha.max_steps
    reports = [r for (_, resource), r in execution.reports.items() if resource == top and isfinite(r.value)]
    return sorted(reports, key=lambda r: (-r.value, r.trial))


def combined(state: State, body: GateFitted | Merged, command_id: str | None, out: Emission) -> None:
    """The gate is fitted, or the merge made."""
    lifecycle.charge(state, "gate" if isinstance(body, GateFitted) else "merge", body.passes, card=body.card)
    execution = state.executions.get(body.card)
    if execution is None:
        return
    if isinstance(body, GateFitted):
        execution.gate = body
    else:
        execution.merged = body
    execution.waiting_for.discard(command_id or "")
    if not execution.waiting_for:
        choose(state, execution, out)


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
            choose(state, execution, out)
        return
    lifecycle.finish(state, body.card, CardState.FAILED, f"{body.command} failed: {body.error}", out)


def choose(state: State, execution: Execution, out: Emission) -> None:
    """Take the best candidate on val-A; look at val-B only if it beats the control there."""
    candidates = _candidates(state, execution)
    control = execution.control_value
    best = max(candidates, key=lambda c: c.value, default=None)
    if best is None or control is None or not best.value > control:
        told = "none reached the top rung" if best is None else f"{best.name} reaches {best.value:.4f}"
        verdict = VerdictGiven(
            card=execution.card,
            verdict="inconclusive",
            candidate=None if best is None else best.name,
            n=0,
            mean=float("nan"),
            z=float("nan"),
            lower=float("-inf"),
            upper=float("inf"),
            threshold=float("nan"),
            alpha=0.0,
            why=f"no candidate beats the control on the first held-out half ({told}, the control {_shown(control)}), so the "
            "second half was not looked at; the control is kept",
        )
        seq = out.fact(verdict)
        lifecycle.finish(state, execution.card, CardState.INCONCLUSIVE, verdict.why, out, cause=seq)
        return
    execution.chosen = best
    state.spending.spend()
    execution.look = state.spending.looks
    out.command(
        Evaluate(
            card=execution.card,
            candidate=best.name,
            weights=best.weights,
            control=control_weights(execution),
            look=execution.look,
        )
    )


def _candidates(state: State, execution: Execution) -> list[Candidate]:
    if execution.action == "merge":
        merged = execution.merged
        if merged is None or (merged.control is not None and merged.weights == merged.control):
            return []
        return [Candidate(name=merged.weights.choice, weights=merged.weights, value=merged.value)]
    found = [
        Candidate(
            name=f"t{report.trial}:{execution.variants[report.trial].name}",
            weights=_weights(report),
            value=report.value,
            variant=execution.variants[report.trial],
        )
        for report in finished_trials(execution, state)
    ]
    if execution.merged is not None and isfinite(execution.merged.value):
        found.append(
            Candidate(
                name=f"merge:{execution.merged.method}",
                weights=execution.merged.weights,
                value=execution.merged.value,
            )
        )
    gate = execution.gate
    if gate is not None and gate.checkpoint is not None and isfinite(gate.value):
        found.append(
            Candidate(
                name="mixture", weights=Weights(checkpoint=gate.checkpoint), value=gate.value, into="export"
            )
        )
    return found


def control_weights(execution: Execution) -> Weights:
    """What the candidates are judged against."""
    if execution.control is not None:
        return Weights(checkpoint=execution.control.checkpoint, choice=execution.control.choice or "raw")
    assert execution.merged is not None
    assert execution.merged.control is not None
    return execution.merged.control


def evaluated(state: State, body: Evaluated, out: Emission) -> None:
    """The evidence is in: give the verdict."""
    lifecycle.charge(state, "evaluate", body.passes, card=body.card)
    execution = state.executions.get(body.card)
    if execution is None or execution.look is None or execution.chosen is None:
        return
    execution.evaluated = body
    card = state.cards[body.card].card
    slices = body.slices if card.acceptance.slices == "no_worse" else {}
    evidence = judge_summary(
        _summary(body.overall),
        alpha=state.spending.alpha(execution.look),
        slices={name: _summary(group) for name, group in slices.items()},
        slice_z=SLICE_Z,
        least_z=max(card.acceptance.z, state.policy.evidence.z),
    )
    seq = out.fact(_verdict(execution, body, evidence))
    match evidence.verdict:
        case "accepted":
            record = state.cards[body.card]
            moved = approval.move(record, CardState.ACCEPTED, actor="evidence", why=evidence.why)
            accepted = out.fact(moved, cause=seq)
            approval.apply(record, moved, step=state.step, time=state.t_mono)
            chosen = execution.chosen
            out.command(
                Adopt(
                    card=body.card,
                    candidate=chosen.name,
                    weights=chosen.weights,
                    variant=chosen.variant,
                    into=chosen.into,
                ),
                cause=accepted,
            )
        case "rejected":
            lifecycle.finish(state, body.card, CardState.REJECTED, evidence.why, out, cause=seq)
        case "inconclusive":
            lifecycle.finish(state, body.card, CardState.INCONCLUSIVE, evidence.why, out, cause=seq)


def _verdict(execution: Execution, body: Evaluated, evidence: Evidence) -> VerdictGiven:
    return VerdictGiven(
        card=execution.card,
        verdict=evidence.verdict,
        candidate=body.candidate,
        n=evidence.n,
        mean=evidence.mean,
        z=evidence.z,
        lower=evidence.lower,
        upper=evidence.upper,
        threshold=evidence.threshold,
        alpha=evidence.alpha,
        look=execution.look,
        slices={name: part.z for name, part in evidence.slices.items()},
        why=evidence.why,
    )


def adopted(state: State, body: Adopted, out: Emission) -> None:
    """The accepted weights are in the trunk and durable: a new trunk begins."""
    execution = state.executions.get(body.card)
    if execution is None or execution.chosen is None:
        return
    node = f"{body.card}:{execution.chosen.name}"
    if execution.chosen.into == "export" or execution.chosen.variant is None:
        lifecycle.grow(
            state,
            out,
            node=node,
            parents=(state.lineage,),
            role="mixture" if execution.chosen.into == "export" else "merge",
            card=body.card,
            checkpoint=body.checkpoint,
            verdict="accepted",
        )
    if body.into == "trunk":
        specialist = (
            f"{body.card}:t{execution.chosen.name.split(':')[0][1:]}" if execution.chosen.variant else node
        )
        state.adoptions += 1
        before, state.lineage = state.lineage, f"trunk:{state.adoptions}"
        lifecycle.grow(
            state,
            out,
            node=state.lineage,
            parents=(before, specialist),
            role="trunk",
            card=body.card,
            checkpoint=body.checkpoint,
            verdict="accepted",
        )
        if body.before is not None:
            state.undo[body.card] = body.before
        state.suite.reset(f"card {body.card} was adopted")
    lifecycle.finish(
        state,
        body.card,
        CardState.ADOPTED,
        f"{execution.chosen.name} replaces the control at step {body.step}",
        out,
    )


def rolled_back(state: State, body: RolledBack, out: Emission) -> None:
    """The trunk is what it was before the adoption."""
    record = state.cards.get(body.card)
    if record is None or record.state is not CardState.ADOPTED:
        return
    moved = approval.move(
        record, CardState.ROLLED_BACK, actor=PLANNER, why=f"rolled back at step {body.step}"
    )
    seq = out.fact(moved)
    approval.apply(record, moved, step=state.step, time=state.t_mono)
    state.undo.pop(body.card, None)
    state.adoptions += 1
    before, state.lineage = state.lineage, f"trunk:{state.adoptions}"
    lifecycle.grow(
        state,
        out,
        node=state.lineage,
        parents=(before,),
        role="trunk",
        card=body.card,
        checkpoint=body.checkpoint,
        verdict="rolled_back",
        cause=seq,
    )
    state.suite.reset(f"card {body.card} was rolled back")


def _weights(report: TrialReported) -> Weights:
    assert report.checkpoint is not None
    return Weights(checkpoint=report.checkpoint, choice=report.choice)


def _summary(group: Group) -> PairedSummary:
    return PairedSummary(n=group.n, mean=group.mean, variance=group.variance, effective_n=group.effective_n)


def _shown(value: float | None) -> str:
    return "was not measured" if value is None else f"{value:.4f}"
