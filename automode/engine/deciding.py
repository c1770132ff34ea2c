"""From candidates to a verdict: the best on val-A, one look at val-B, adoption or the control kept."""

from __future__ import annotations

from collections.abc import Iterator
from math import erfc, isfinite, sqrt
from typing import Final

from automode.engine import lifecycle, probing, resuming
from automode.engine.emission import Emission
from automode.engine.state import Candidate, Execution, State
from automode.engine.trials import control_weights, experts_of, finished_trials, weights_of
from automode.planner import approval
from automode.planner.acceptance import Evidence, Guard, judge_summary
from automode.planner.approval import PLANNER
from automode.planner.cards import Action, CardState
from automode.planner.events import (
    Adopt,
    Adopted,
    Evaluate,
    Evaluated,
    Group,
    RolledBack,
    VerdictGiven,
    Weights,
)
from automode.planner.metrics import GIVEN_UP, NAMES, Metric, other_of
from automode.planner.paired import PairedSummary

SLICE_Z = 1.64

NOTHING_BETTER: Final[dict[Action, str]] = {
    "fork": "none reached the top rung",
    "merge": "no average and no earlier state is above the raw weights",
    "stop": "no average and no earlier state is above the last weights",
}


def choose(state: State, execution: Execution, out: Emission) -> None:
    """Take the best candidate on val-A; look at val-B only if it beats the control there."""
    candidates = _candidates(state, execution)
    control = execution.control_value
    best = max(candidates, key=lambda c: c.value, default=None)
    better = best is not None and control is not None and best.value > control
    if best is None or control is None or not (better or probing.first(state, execution)):
        _nothing_better(state, execution, best, out)
        return
    execution.chosen = best
    execution.look = (
        resuming.next_look(state, best.weights, control_weights(execution))
        if better and execution.action == "fork"
        else 0
    )
    out.command(
        Evaluate(
            card=execution.card,
            candidate=best.name,
            weights=best.weights,
            control=control_weights(execution),
            look=execution.look,
            metric=_metric_of(state, execution),
            half="B" if better else "A",
        )
    )


def _nothing_better(
    state: State, execution: Execution, best: Candidate | None, out: Emission, apart: str = ""
) -> None:
    """Keep the control, because nothing is above it on val-A; ``apart`` says how far below the best is."""
    told = NOTHING_BETTER[execution.action] if best is None else f"{best.name} reaches {best.value:.4f}"
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
        metric=_metric_of(state, execution),
        why=f"no candidate beats the control on the first held-out half ({told}, the control {_shown(execution.control_value)}{apart}), "
        "so the second half was not looked at; the control is kept",
    )
    seq = out.fact(verdict)
    lifecycle.finish(state, execution.card, CardState.INCONCLUSIVE, verdict.why, out, cause=seq)


def _compared(state: State, execution: Execution, body: Evaluated, out: Emission) -> None:
    """The best of a probe is below the control on val-A: by how many standard errors?"""
    z = _summary(body.overall).z()
    probed = probing.remember(state, execution, body.metric, z)
    apart = f", {-z:.1f} standard errors above" if isfinite(z) else ""
    if probed is not None and isfinite(probed.lost):
        apart += f", {probed.lost:.0%} of what the run had learnt"
    _nothing_better(state, execution, execution.chosen, out, apart)


def _metric_of(state: State, execution: Execution) -> Metric:
    """What candidates are compared by: what the card names, or what the finish has chosen."""
    merged = execution.merged
    return state.cards[execution.card].card.acceptance.metric if merged is None else merged.metric


def _candidates(state: State, execution: Execution) -> list[Candidate]:
    """What could replace the control; specialists of parts only together, as a mixture or a merge."""
    if execution.action != "fork":
        merged = execution.merged
        if merged is None or (merged.control is not None and merged.weights == merged.control):
            return []
        earlier = merged.control is not None and merged.weights.checkpoint != merged.control.checkpoint
        name = f"best:{merged.weights.choice}" if earlier else merged.weights.choice
        return [Candidate(name=name, weights=merged.weights, value=merged.value)]
    found = [
        Candidate(
            name=f"t{report.trial}:{execution.variants[report.trial].name}",
            weights=weights_of(report),
            value=report.value,
            variant=execution.variants[report.trial],
        )
        for report in ([] if execution.steps else finished_trials(execution, state))
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


def evaluated(state: State, body: Evaluated, out: Emission) -> None:
    """The evidence is in: give the verdict."""
    lifecycle.charge(state, "evaluate", body.passes, card=body.card)
    execution = state.executions.get(body.card)
    if execution is None or execution.look is None or execution.chosen is None:
        return
    if body.half == "A":
        _compared(state, execution, body, out)
        return
    execution.evaluated = body
    card = state.cards[body.card].card
    slices = body.slices if card.acceptance.slices == "no_worse" else {}
    alpha, least_z = _strictness(state, execution)
    evidence = judge_summary(
        _summary(body.overall),
        alpha=alpha,
        slices={name: _summary(group) for name, group in slices.items()},
        guard=_guard(execution, body, least_z),
        slice_z=SLICE_Z,
        least_z=least_z,
    )
    if probing.first(state, execution):
        evidence = probing.weighed(state, execution, evidence, body.metric)
    seq = out.fact(_verdict(execution, card.acceptance.metric, body, evidence))
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
            if probing.first(state, execution):
                probing.remember(state, execution, body.metric, evidence.z)
            lifecycle.finish(state, body.card, CardState.INCONCLUSIVE, evidence.why, out, cause=seq)


def _strictness(state: State, execution: Execution) -> tuple[float, float]:
    """Return (false acceptance rate, least z) of a look.

    A fork spends of the session's alpha. The state that a stopped run keeps is one that it went through: it has to be better, and that
    is all. Averages of the trunk's own trajectory have been better than its raw weights so
    often that they need less proof: their threshold is the policy's, and stands for a rate of its own.
    """
    asked, policy = state.cards[execution.card].card.acceptance.z, state.policy
    if execution.action != "fork":
        least = max(asked, policy.averages.z) if execution.action == "merge" else asked
        return min(0.499, 0.5 * erfc(least / sqrt(2.0))), least
    assert execution.look is not None
    return state.spending.alpha(execution.look), max(asked, policy.evidence.z)


def _guard(execution: Execution, body: Evaluated, least_z: float) -> Guard | None:
    """What must agree, over both halves: a run's states are told apart by two metrics where one of them is the luck of few samples."""
    if body.guard is None:
        return None
    name, on_b = other_of(body.metric), _summary(body.guard)
    if execution.merged is None or execution.merged.guard is None:
        return Guard(differences=on_b, name=name)
    both = _summary(execution.merged.guard).joined(on_b)
    if body.metric == "utility":
        return Guard(differences=both, name=name, least_z=least_z)
    return Guard(differences=both, name=name, least_mean=-GIVEN_UP)


def _verdict(execution: Execution, asked: Metric, body: Evaluated, evidence: Evidence) -> VerdictGiven:
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
        look=execution.look if execution.action == "fork" else None,
        slices={name: part.z for name, part in evidence.slices.items()},
        metric=body.metric,
        guard=None if evidence.guard is None else evidence.guard.z,
        why=evidence.why + _measured_by(execution, asked),
    )


def _measured_by(execution: Execution, asked: Metric) -> str:
    """Say what was compared, where there was a choice."""
    merged = execution.merged
    if asked != "utility":
        return f"; compared by {NAMES[asked]}, as the card asks"
    if merged is None or merged.noise_at_most is None:
        return ""
    at_most = f"at most {merged.noise_at_most:.1%} of the labels are wrong"
    if merged.metric == "log_score":
        return f"; compared by the log score, since {at_most}"
    return f"; compared by accuracy and p(y), since no more is shown than that {at_most}"


def _specialists(state: State, execution: Execution) -> Iterator[str]:
    """Nodes of the specialists that a mixture or merge was made of; none where it is of the trunk's own states."""
    card = state.cards[execution.card].card
    if card.action == "fork":
        best_alone = execution.chosen is not None and execution.chosen.name == "merge:interpolate"
        for report in experts_of(execution, state)[: 1 if best_alone else None]:
            yield f"{card.id}:t{report.trial}"


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
            parents=(state.lineage, *_specialists(state, execution)),
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
        state.probed = None
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
            state.undo[body.card], state.best_of[body.card] = body.before, state.best
        state.suite.reset(f"card {body.card} was adopted")
        if execution.chosen.variant is not None and execution.chosen.variant.restart:
            state.guards.level.restart(body.step)  # the lowest loss was another trajectory's
    lifecycle.finish(
        state,
        body.card,
        CardState.ADOPTED,
        f"{execution.chosen.name} "
        + (
            "is exported beside the trunk"
            if body.into == "export"
            else f"replaces the control at step {body.step}{_kept_its_own(execution)}"
        ),
        out,
    )


def _kept_its_own(execution: Execution) -> str:
    variant = None if execution.chosen is None else execution.chosen.variant
    if variant is None:
        return ""
    told = (
        "; the trunk goes on with batches of its own size, at its own rate"
        if variant.batch_mul != 1.0
        else ""
    )
    if variant.updates != 1:
        told += f"; each batch is trained on with {variant.updates} steps from here on"
    if variant.schedule != "anneal":
        return told
    return (told or "; the trunk goes on at its own rate") + ", which warms the annealed weights up again"


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
    state.best = state.best_of.pop(body.card, None)  # no state of the trunk that was left
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
    recipe = record.card.training_recipe
    if recipe is not None and recipe.restarts:
        state.guards.level.restart(
            body.step
        )  # likewise: a ruined network is put back, and has not diverged now


def _summary(group: Group) -> PairedSummary:
    return PairedSummary(n=group.n, mean=group.mean, variance=group.variance, effective_n=group.effective_n)


def _shown(value: float | None) -> str:
    return "was not measured" if value is None else f"{value:.4f}"
