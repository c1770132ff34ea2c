"""The fold: events in, facts and commands out.

``handle`` is the whole deciding half of automode. It reads no clock, draws no global random number, does no I/O and imports no
torch: time arrives on the event, chance is derived from the session's seed. So the same log leads to the same decisions,
and :mod:`automode.engine.replay` can prove it.

The state is mutable and singly owned. Rows may be handed over in blocks of any size: every split gives the same facts
(a property test), because rules look at fixed steps and never at the end of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import assert_never

from automode.engine import (
    adjusting,
    deciding,
    diagnosing,
    guarding,
    lifecycle,
    observing,
    resuming,
    running,
    scanning,
)
from automode.engine.emission import Emission
from automode.engine.guards import Guards
from automode.engine.state import State, remember
from automode.errors import ReplayDifferenceError
from automode.planner.acceptance import AlphaSpending
from automode.planner.events import (
    Acknowledged,
    Adopted,
    Checkpointed,
    ClipSet,
    Clustered,
    CommandFailed,
    Controlled,
    Decided,
    Diagnosed,
    Envelope,
    Evaluated,
    GateFitted,
    HealthChecked,
    Input,
    LengthSet,
    Merged,
    RateSet,
    Resolved,
    Resumed,
    Rewound,
    RolledBack,
    Rows,
    RunEnded,
    Safeguarded,
    Scanned,
    SessionStarted,
    Snapshotted,
    Tested,
    TrialFailed,
    TrialReported,
    TrialsNoted,
    TrunkEnded,
    Validated,
)
from automode.planner.policy import Policy
from automode.planner.rules import BUILT_IN
from automode.planner.rules.base import Rule
from automode.planner.watching import signals_for, watch_validation
from automode.scheduler import Ledger


def initial(rules: Sequence[Rule] = BUILT_IN) -> State:
    """Return the state before the first event."""
    return State(rules=tuple(rules))


def handle(state: State, events: Iterable[Envelope | Rows]) -> tuple[State, list[Envelope], list[Envelope]]:
    """Fold events into the state.

    Args:
        state: Owned by the caller; it is changed in place and returned.
        events: Inputs as envelopes numbered ``state.next_seq``, and rows of the trunk's frame.

    Returns:
        The state, the facts decided and the commands to perform, each in the order of their ``seq``.

    Raises:
        ReplayDifferenceError: An event does not follow on from the state: a gap in its number or its rows.
    """
    out = Emission(state)
    for event in events:
        match event:
            case Rows():
                observing.take_rows(state, event, out)
            case Envelope():
                if isinstance(event.body, Resumed):
                    resuming.skip(state, event.body, event)
                if event.seq != state.next_seq:
                    raise ReplayDifferenceError(f"event {event.seq} came where {state.next_seq} was due")
                state.next_seq += 1
                state.t_wall, state.t_mono = event.t_wall, event.t_mono
                out.at(event.seq, event.t_wall, event.t_mono)
                if event.command_id is not None:
                    state.pending.pop(event.command_id, None)
                _dispatch(state, event.body, event, out)
            case _:
                assert_never(event)
    return state, out.facts, out.commands


def _dispatch(state: State, body: Input, event: Envelope, out: Emission) -> None:  # noqa: C901 - one line per kind of event
    match body:
        case SessionStarted():
            _start(state, body, out)
        case Validated():
            remember(state.validated, body)
            lifecycle.charge(state, "evaluate", body.passes)
            observing.tell(watch_validation(state.suite, body), out)
            observing.look(state, out)
        case Scanned():
            remember(state.scanned, body)
            lifecycle.charge(state, "scan", body.passes)
            scanning.rest(state, body.rest, body.passes)
            observing.look(state, out)
        case Clustered():
            remember(state.clustered, body)
            lifecycle.charge(state, "scan", body.passes)
            observing.look(state, out)
        case Decided():
            lifecycle.answer(state, body, out)
        case Snapshotted():
            running.snapshotted(state, body, out)
        case Resolved():
            running.resolved(state, body, out)
        case TrialReported():
            running.reported(state, body, out)
        case TrialFailed():
            running.trial_failed(state, body, out)
        case TrialsNoted():
            running.noted(state, body)
        case GateFitted() | Merged():
            running.combined(state, body, event.command_id, out)
        case Evaluated():
            deciding.evaluated(state, body, out)
        case Adopted():
            deciding.adopted(state, body, out)
        case RolledBack():
            deciding.rolled_back(state, body, out)
        case Rewound() | RateSet() | ClipSet():
            observing.tell(adjusting.answered(state, body, event.command_id, out), out)
        case Diagnosed():
            diagnosing.diagnosed(state, body)
        case CommandFailed():
            running.command_failed(state, body, event.command_id, out)
            guarding.failed(state, body, out)
        case Safeguarded():
            if guarding.told(state, body, out):
                observing.look(state, out)
        case Acknowledged():
            lifecycle.charge(state, "evaluate", body.passes, card=body.card)
        case Checkpointed() | Controlled() | Tested() | HealthChecked():
            resuming.noted(state, body)
        case Resumed() | LengthSet():
            resuming.told(state, body, out)
        case TrunkEnded():
            observing.trunk_ended(state, body, out)
        case RunEnded():
            lifecycle.run_ended(state, body, out)
        case _:
            assert_never(body)


def _start(state: State, body: SessionStarted, out: Emission) -> None:
    if state.started:
        raise ReplayDifferenceError("a session starts once, and a second session_started came")
    policy = Policy.model_validate(body.policy)
    run = body.run
    budget = policy.planning_budget(run.total_steps)
    state.session, state.seed, state.mode = body.session, body.seed, body.mode
    state.policy, state.run, state.planning_budget = policy, run, budget
    state.policy_digest = body.policy_digest
    state.suite = signals_for(policy, budget)
    state.guards = Guards.of(policy, budget)
    state.next_diagnosis = diagnosing.every(state)
    state.rules = tuple(rule for rule in state.rules if rule.id in policy.reasons)
    state.spending = AlphaSpending(policy.evidence.alpha)
    total = max(1, round(run.total_steps * state.passes_per_step))
    state.ledger = Ledger(
        total=total,
        share=policy.pacing.exploration_share,
        cap=round(policy.pacing.total_share * total),
        within=policy.budget == "within",
    )
    state.look_every = max(1, budget // 40)
    state.next_look = state.look_every
    state.next_scan = policy.scan.every or max(1, budget // 2)
    lifecycle.grow(state, out, node=state.lineage, parents=(), role="trunk", card=None)
