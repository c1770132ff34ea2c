"""From rows to readings, from readings to rules, from proposals to cards."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from automode.engine import diagnosing, guarding, lifecycle, scanning
from automode.engine.emission import Emission
from automode.engine.state import State
from automode.errors import ReplayDifferenceError
from automode.planner.approval import Lifetime, sweep
from automode.planner.cards import CardState, PlanCard
from automode.planner.diagnostics import summary
from automode.planner.events import ReadingChanged, Rows, RuleEvaluated, TrunkEnded
from automode.planner.pacing import Held, admit, held_back, in_order
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.signals.readings import Reading

COLUMNS = ("step", "time", "loss", "grad_norm", "lr_0", "applied")


def take_rows(state: State, rows: Rows, out: Emission) -> None:
    """Fold a block of the trunk's frame. Rules look when a signal changed, and every ``look_every`` steps."""
    if rows.first != state.rows:
        raise ReplayDifferenceError(f"row {rows.first} came where {state.rows} was due")
    names = list(rows.names)
    first = state.rows
    if not state.started or state.mode == "off":
        state.rows += len(rows.values)
        state.step = int(rows.values[-1, names.index("step")]) if len(rows.values) else state.step
        return
    columns = [rows.values[:, names.index(name)] for name in COLUMNS]
    steps: list[int] = columns[0].astype(np.int64).tolist()
    times, losses, norms, rates = (column.tolist() for column in columns[1:5])
    applied = (columns[5] != 0.0).tolist()
    observe, level = state.suite.observe, state.guards.level
    recent = level.recent.append
    if state.first_time is None and times:
        state.first_time = times[0]
    next_look = state.next_look
    row = first
    for step, time, loss, norm, rate, done in zip(steps, times, losses, norms, rates, applied, strict=True):
        row += 1
        changed = observe(step, loss, norm, rate, done)
        recent(loss)
        if level.first is None:
            level.begin(loss)
        if changed is None and step < next_look:
            continue
        # Only who looks has to know where the run is; that saves a tenth of a replay.
        state.rows, state.step = row, step
        state.row_time = state.t_mono = time
        _charge_trunk(state)
        out.at(None, state.t_wall, state.t_mono)
        if changed is not None:
            tell(changed, out)
        look(state, out)
        if step >= state.next_look:
            state.next_look = step + state.look_every
            scanning.ask(state, out)
            diagnosing.ask(state, out)
        next_look = state.next_look
    if steps:
        state.rows, state.step, state.row_time = row, steps[-1], times[-1]
    _charge_trunk(state)


def _charge_trunk(state: State) -> None:
    """Bring the trunk's account up to the rows seen; a function of their number, so that blocks of any size agree."""
    state.ledger.charge_trunk(int(state.trained * state.passes_per_step) - state.ledger.trunk)


def look(state: State, out: Emission) -> None:
    """Expire what waited too long, let the rules look, and admit what they propose."""
    if not state.started or state.mode == "off" or state.ended or state.run is None:
        return
    _sweep(state, out)
    if guarding.watch(state, out):
        return
    view = view_of(state)
    proposals: list[Proposal] = []
    for rule in state.rules:
        match rule.propose(view):
            case Silence() as silence:
                _note(state, out, rule.id, "silent", silence.code, silence.why)
            case Proposal() as proposal:
                proposals.append(proposal)
    made: str | None = None
    for proposal in in_order(proposals):
        made = _consider(state, proposal, view, out, made) or made


def trunk_ended(state: State, body: TrunkEnded, out: Emission) -> None:
    """Nothing more is trained; where the run was ended before its length, by whoever means it to be over, its finish comes now."""
    if body.early:
        _finish(state, out)
    lifecycle.trunk_ended(state, body, out)


def _finish(state: State, out: Emission) -> None:
    stops = any(execution.action == "stop" for execution in state.executions.values())
    if not state.started or state.mode != "act" or state.ended or state.run is None or stops:
        return
    view = replace(view_of(state), ending=True)
    for rule in state.rules:
        if rule.id == "merge_cadence":
            match rule.propose(view):
                case Silence() as silence:
                    _note(state, out, rule.id, "silent", silence.code, silence.why)
                case Proposal() as proposal:
                    _consider(state, proposal, view, out, None)


def _consider(
    state: State, proposal: Proposal, view: View, out: Emission, outranked_by: str | None
) -> str | None:
    """Let pacing make a card of a proposal, or hold it. Returns the card's id."""
    open_cards = list(state.cards.values())
    held = held_back(proposal, view, state.pacing, open_cards, outranked_by)
    if state.trunk_ended:  # a scan may be answered late, when the disk has been full
        held = Held(
            code="trunk_ended", why="the trunk has taken its last step, and no card could run any more"
        )
    card: PlanCard | Held = held or admit(
        replace(proposal, diagnostics={**proposal.diagnostics, **summary(state.diagnosed)}),
        view=view,
        state=state.pacing,
        open_cards=open_cards,
        funds=lifecycle.funds_of(state, waits=_waits(state, proposal)),
        session=state.session,
        ordinal=state.ordinal,
        base=lifecycle.base_of(state),
        outranked_by=outranked_by,
    )
    if isinstance(card, Held):
        _note(state, out, proposal.reason, "held", card.code, card.why)
        return None
    cause = _note(state, out, proposal.reason, "fired", card.id, card.because)
    lifecycle.propose_card(state, card, out, cause=cause)
    return card.id


def _waits(state: State, proposal: Proposal) -> int:
    """Steps that a card may wait for an answer: it has to fit on the last of them too."""
    asks = state.mode == "propose" or (state.mode == "act" and proposal.reason in state.policy.approval.ask)
    return (Lifetime.of(state.policy, state.planning_budget).steps or 0) if asks else 0


def view_of(state: State) -> View:
    """What the rules may look at."""
    assert state.run is not None
    remaining = lifecycle.steps_left(state)
    return View(
        step=state.step,
        remaining=remaining,
        planning_budget=state.planning_budget,
        policy=state.policy,
        run=state.run,
        signals=state.suite,
        validated=state.validated,
        scanned=state.scanned,
        clustered=state.clustered,
        counts=state.counts,
        first_loss=state.guards.level.top,
        probed=state.probed,
        adopted=Counter(r.card.reason for r in state.cards.values() if r.state is CardState.ADOPTED),
    )


def _sweep(state: State, out: Emission) -> None:
    waiting = [r for r in state.cards.values() if r.state in lifecycle.OPEN]
    for moved in sweep(
        waiting,
        policy_digest=state.policy_digest,
        lineage=state.lineage,
        step=state.step,
        time=state.t_mono,
    ):
        lifecycle.apply_move(state, moved, out)


def tell(changed: tuple[Reading, ...] | None, out: Emission) -> None:
    """Log the readings of signals that changed their state."""
    for reading in changed or ():
        out.fact(
            ReadingChanged(
                step=reading.step,
                name=reading.name,
                state=reading.state,
                value=reading.value,
                threshold=reading.threshold,
                window=reading.window,
                details=dict(reading.details),
            )
        )


def _note(state: State, out: Emission, rule: str, outcome: str, code: str, why: str) -> int:
    """Log a rule's outcome when it changed; returns the seq that the outcome stands at."""
    known = state.outcomes.get(rule)
    if known is not None and known[:2] == (outcome, code):
        return known[2]
    seq = out.fact(
        RuleEvaluated.model_validate(
            {"step": state.step, "rule": rule, "outcome": outcome, "code": code, "why": why}
        )
    )
    state.outcomes[rule] = (outcome, code, seq)
    return seq
