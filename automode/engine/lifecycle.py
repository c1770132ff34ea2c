"""A card's life: proposed, answered, started, ended; and what each of these does to the ledger, the pacing and the lineage."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final, Literal, assert_never

from automode.engine.emission import Emission
from automode.engine.state import Execution, State
from automode.planner import approval, pacing
from automode.planner.approval import PLANNER, Lifetime
from automode.planner.cards import WAITING, CardState, PlanCard
from automode.planner.events import (
    AskApproval,
    BudgetReleased,
    BudgetReserved,
    CardMoved,
    CardProposed,
    Decided,
    LineageGrew,
    Merge,
    ModeChanged,
    RequestRefused,
    RollBack,
    RunEnded,
    SetClip,
    SetLearningRate,
    Snapshot,
    StopRun,
    StopTrial,
    TrunkEnded,
    Weights,
)
from automode.planner.fitting import Funds, Held, quote, share_of_rest
from automode.planner.pricing import worst_case
from automode.planner.recipes import Adjustment, Base
from automode.planner.requests import Desk, respond
from automode.scheduler import Account, Purpose, Refusal

FORK_COPIES: Final = 10
"""A fork's memory in copies of the weights, at the most: weights, gradients, two moments, three averages, and the candidates
that are judged at a rung."""

KEEP_BEST: Final = "keep_best"
"""How a run that is stopped merges: it does not, it chooses."""

OPEN: Final = WAITING
"""States in which a card still waits for something other than compute."""


def charge(
    state: State, purpose: Purpose, passes: float, *, card: str | None = None, trial: int | None = None
) -> None:
    """Count sample passes that were spent, whatever the caps say: they bind at admission."""
    if passes > 0.0:
        known = card is not None and card in state.admitted
        account = Account(
            card=card if known else None,
            purpose=purpose if known or purpose != "trial" else "evaluate",
            trial=trial if known and purpose == "trial" else None,
        )
        state.ledger.count(account, ceil(passes))


def funds_of(state: State, *, waits: int = 0) -> Funds:
    """What there is to spend; with ``waits``, what there will be after so many more trunk steps."""
    later = state.ledger.remaining - state.ledger.held - waits * state.passes_per_step
    return Funds(
        remaining=max(0.0, float(later)),
        total=float(state.ledger.total),
        spent=float(state.ledger.automode + state.ledger.held),
        held=float(state.ledger.held),
        seconds_per_step=state.seconds_per_step,
        memory_mib=None
        if state.run is None or state.run.model_mib is None
        else FORK_COPIES * state.run.model_mib,
    )


def due_at_end(state: State) -> int:
    """Sample passes that finishing merges and stops have reserved, to be spent when the trunk has taken its last step."""
    return sum(state.ledger.left(e.card) for e in state.executions.values() if e.action != "fork")


def steps_left(state: State) -> int:
    """Trunk steps that are left, after what automode spent, and will spend at the end, is deducted."""
    ledger = state.ledger
    later = due_at_end(state) if ledger.within else 0
    return max(0, int((ledger.remaining - later) // state.passes_per_step))


def base_of(state: State) -> Base:
    """What a card made now is made against; the checkpoint is filled in when it starts."""
    return Base(step=state.step, policy=state.policy_digest, lineage=state.lineage)


def propose_card(state: State, card: PlanCard, out: Emission, *, cause: int | None = None) -> None:
    """Record a new card and decide who may let it run."""
    assert state.run is not None
    state.ordinal += 1
    state.counts[card.reason] = state.counts.get(card.reason, 0) + 1
    proposed = out.fact(CardProposed(card=card), cause=cause)
    state.cards[card.id] = approval.propose(
        card, step=state.step, time=state.t_mono, lifetime=Lifetime.of(state.policy, state.planning_budget)
    )
    if card.created_by == PLANNER:
        state.pacing.made(card)
    match approval.decide(card, state.policy, state.mode):
        case "auto":
            moved = approval.move(
                state.cards[card.id],
                CardState.APPROVED,
                actor="policy",
                why=f"risk {card.risk} and {card.cost.share_of_remaining:.1%} of the remaining compute are within the policy",
            )
            apply_move(state, moved, out, cause=proposed)
        case "ask":
            out.command(AskApproval(card=card.id, rev=card.rev), cause=proposed)
        case "record":
            pass


def apply_move(state: State, moved: CardMoved, out: Emission, *, cause: int | None = None) -> int:
    """Log a move, write it into the record, and follow it up: start, ask again, stop."""
    seq = out.fact(moved, cause=cause)
    record = state.cards[moved.card]
    approval.apply(record, moved, step=state.step, time=state.t_mono)
    match moved.after:
        case CardState.APPROVED:
            start_waiting(state, out, cause=seq)
        case CardState.PROPOSED if moved.edited is not None:
            out.command(AskApproval(card=moved.card, rev=record.card.rev), cause=seq)
        case CardState.REFUSED | CardState.EXPIRED | CardState.STALE:
            end(state, moved.card, out, cause=seq)
        case _:
            pass
    return seq


def start_waiting(state: State, out: Emission, *, cause: int | None = None) -> None:
    """Start approved cards, oldest first: one fork at a time, merges at once."""
    if state.trunk_ended:
        return
    for record in list(state.cards.values()):
        if record.state is not CardState.APPROVED or (
            record.card.action == "fork" and state.fork is not None
        ):
            continue
        outlived = approval.staleness(
            record,
            policy_digest=state.policy_digest,
            lineage=state.lineage,
            step=state.step,
            time=state.t_mono,
        )
        if outlived is None:
            start(state, record.card, out, cause=cause)
        else:
            after, why = outlived
            apply_move(state, approval.move(record, after, actor=PLANNER, why=why), out, cause=cause)


def start(state: State, card: PlanCard, out: Emission, *, cause: int | None = None) -> None:
    """Reserve the worst case and ask for the first thing that the card needs."""
    assert state.run is not None
    record = state.cards[card.id]
    price = worst_case(card, state.run)
    fits = quote(
        card,
        policy=state.policy,
        run=state.run,
        funds=funds_of(state),
        remaining_steps=steps_left(state),
    )
    if isinstance(fits, Held):
        finish(
            state,
            card.id,
            CardState.FAILED,
            f"it does not fit any more ({fits.code}): {fits.why}",
            out,
            cause=cause,
        )
        return
    granted = state.ledger.reserve(
        card.id, ceil(price.passes), share=share_of_rest(state.policy, card.action)
    )
    if isinstance(granted, Refusal):
        finish(
            state, card.id, CardState.FAILED, f"no budget is left for it: {granted.reason}", out, cause=cause
        )
        return
    state.admitted.add(card.id)
    out.fact(
        BudgetReserved(card=card.id, passes=float(granted.amount), remaining=float(state.ledger.remaining)),
        cause=cause,
    )
    running = approval.move(record, CardState.RUNNING, actor=PLANNER, why="its turn has come")
    started = out.fact(running, cause=cause)
    approval.apply(record, running, step=state.step, time=state.t_mono)
    state.executions[card.id] = Execution(card=card.id, action=card.action, started_at=state.step)
    if card.action == "fork":
        out.command(Snapshot(card=card.id, purpose="base"), cause=started)
        return
    if card.action == "stop":
        out.command(StopRun(card=card.id, why=f"card {card.id} ({card.reason})"), cause=started)
        return
    execution = state.executions[card.id]
    if card.adjustment is not None:
        execution.waiting_for |= _adjust(card.id, card.adjustment, out, started)
        return
    assert card.merge_recipe is not None
    execution.combining = True
    at_end = card.reason == "merge_cadence"
    execution.waiting_for.add(
        out.command(Merge(card=card.id, method=card.merge_recipe.kind, at_end=at_end), cause=started)
    )


def _adjust(card: str, adjustment: Adjustment, out: Emission, cause: int) -> set[str]:
    """Ask for everything that an adjustment changes; returns the commands."""
    why, asked = f"card {card} asks for it", set()
    if adjustment.rate_factor != 1.0:
        rate = SetLearningRate(factor=adjustment.rate_factor, why=why, card=card)
        asked.add(out.command(rate, cause=cause))
    if adjustment.clip_norm is not None:
        asked.add(out.command(SetClip(norm=adjustment.clip_norm, why=why, card=card), cause=cause))
    return asked


def finish(
    state: State, card: str, after: CardState, why: str, out: Emission, *, cause: int | None = None
) -> None:
    """Move a running card to its end, give back what it did not need, set the cooldown, and let the next one start."""
    record = state.cards[card]
    moved = approval.move(record, after, actor=PLANNER, why=why)
    seq = out.fact(moved, cause=cause)
    approval.apply(record, moved, step=state.step, time=state.t_mono)
    end(state, card, out, cause=seq)


def end(state: State, card: str, out: Emission, *, cause: int | None = None) -> None:
    """Free a card's budget and slots, whatever became of it, and set the cooldown that follows."""
    record = state.cards[card]
    execution = state.executions.pop(card, None)
    if execution is not None:
        spent = state.ledger.spent(card)
        released = state.ledger.release(card)
        out.fact(BudgetReleased(card=card, spent=float(spent), released=float(released)), cause=cause)
        _stop_trials(state, card, out, cause)
    for fact in pacing.after_verdict(
        state.pacing,
        record.card,
        record.state,  # type: ignore[arg-type]  # only called with a final state
        step=state.step,
        policy=state.policy,
        planning_budget=state.planning_budget,
    ):
        out.fact(fact, cause=cause)
    if execution is not None:
        start_waiting(state, out, cause=cause)


def _stop_trials(state: State, card: str, out: Emission, cause: int | None) -> None:
    for command_id, command in list(state.pending.items()):
        if command.kind == "start_trial" and command.card == card:
            del state.pending[command_id]
            out.command(
                StopTrial(card=card, trial=command.trial, rung_attempt=command.rung_attempt), cause=cause
            )


def answer(state: State, request: Decided, out: Emission) -> None:
    """Follow a person's request, or say why not. The same request is handled once."""
    if request.request in state.requests:
        return
    state.requests.add(request.request)
    response = respond(state.cards, request, _desk(state))
    for fact in response.facts:
        match fact:
            case CardMoved():
                apply_move(state, fact, out)
            case CardProposed():
                propose_card(state, fact.card, out)
            case ModeChanged():
                state.mode = fact.after
                out.fact(fact)
            case RequestRefused():
                out.fact(fact)
            case _:
                assert_never(fact)
    if response.roll_back is not None:
        out.command(RollBack(card=response.roll_back, checkpoint=state.undo[response.roll_back]))


def _desk(state: State) -> Desk:
    assert state.run is not None
    run = state.run
    return Desk(
        session=state.session,
        mode=state.mode,
        run=run,
        base=base_of(state),
        step=state.step,
        time=state.t_mono,
        ordinal=state.ordinal,
        quote=lambda card: quote(
            card, policy=state.policy, run=run, funds=funds_of(state), remaining_steps=steps_left(state)
        ),
        restorable=state.undo,
    )


def trunk_ended(state: State, body: TrunkEnded, out: Emission) -> None:
    """Nothing more is trained: forks end without a verdict, waiting cards expire, merges go on, and stops choose what to keep."""
    state.trunk_ended = True
    for record in list(state.cards.values()):
        if record.state in WAITING:
            apply_move(
                state,
                approval.move(record, CardState.EXPIRED, actor=PLANNER, why=f"the run ended: {body.why}"),
                out,
            )
    for execution in list(state.executions.values()):
        if execution.action == "fork":
            why = (
                f"the run ended at step {body.step}, before the control and the specialists could be compared"
            )
            _cut_short(state, execution.card, why, out)
        elif execution.action == "stop":
            execution.combining = True
            best = () if state.best is None else (Weights(checkpoint=state.best),)
            execution.waiting_for.add(out.command(Merge(card=execution.card, method=KEEP_BEST, members=best)))


def keep_going(state: State, why: str, out: Emission) -> None:
    """A run that was to end is to go on: the cards that stopped it have come to nothing."""
    for execution in list(state.executions.values()):
        if execution.action == "stop":
            _cut_short(state, execution.card, why, out)


def lose_lineage(state: State, why: str, out: Emission) -> None:
    """The trunk is another one than running forks were to be compared with: they end without a verdict."""
    for execution in list(state.executions.values()):
        if execution.action == "fork":
            _cut_short(state, execution.card, f"{why}, so that there is no control to compare with", out)


def run_ended(state: State, body: RunEnded, out: Emission) -> None:
    """Whatever is still running when the log closes (a run that failed) ends without a verdict."""
    for execution in list(state.executions.values()):
        _cut_short(state, execution.card, f"the run ended before it was done: {body.why}", out)
    state.ended = True


def _cut_short(state: State, card: str, why: str, out: Emission) -> None:
    """End a card that nothing will go on with; one that was accepted and could not be adopted has failed."""
    accepted = state.cards[card].state is CardState.ACCEPTED
    finish(state, card, CardState.FAILED if accepted else CardState.INCONCLUSIVE, why, out)


def grow(
    state: State,
    out: Emission,
    *,
    node: str,
    parents: Sequence[str],
    role: Literal["trunk", "specialist", "merge", "mixture", "control"],
    card: str | None,
    checkpoint: str | None = None,
    verdict: str | None = None,
    cause: int | None = None,
) -> None:
    """Add a node to the lineage."""
    out.fact(
        LineageGrew(
            node=node,
            parents=tuple(parents),
            role=role,
            card=card,
            step=state.step,
            checkpoint=checkpoint,
            verdict=verdict,
        ),
        cause=cause,
    )
