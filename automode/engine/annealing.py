"""The control of a card whose specialists anneal: the trunk as it was at the fork, annealed over the same steps, and nothing else.

A rate that falls to zero makes any recipe look better than a trunk which goes on at its own. The trunk is not annealed unasked,
so that its stand-in is one trial more, beside the ladder: from the fork to the top rung in one segment, on the samples that the trunk
trains on. A specialist is judged against it, and has to be above the trunk itself on the first held-out half as well.
"""

from __future__ import annotations

from automode.engine import lifecycle
from automode.engine.emission import Emission
from automode.engine.state import Execution, State
from automode.planner.cards import CardState
from automode.planner.events import StartTrial, TrialDecided, TrialFailed, TrialReported
from automode.planner.variants import ANNEALED_CONTROL

ATTEMPTS = 2
"""Times that it is tried; what it costs is reserved for each."""


def begin(state: State, execution: Execution, out: Emission, *, cause: int) -> None:
    """Start the control where the card's specialists anneal; its number is the one behind the last trial's."""
    recipe = state.cards[execution.card].card.training_recipe
    if recipe is not None and recipe.anneals:
        execution.control_trial = len(execution.variants)
        why = "the control of a card that anneals: the trunk as it was at the fork, annealed over the same steps"
        _start(
            state, execution, out, cause=_decided(execution, "started", why, out, cause=cause, state=state)
        )


def awaited(execution: Execution) -> bool:
    """Whether an annealed control is still in training."""
    return execution.control_trial is not None and execution.annealed is None


def reported(state: State, execution: Execution, body: TrialReported, out: Emission) -> int | None:
    """Take the control's report; gives the fact that says so, None where it is of an attempt that was given up."""
    if not awaited(execution) or body.rung_attempt != execution.control_attempt:
        return None
    execution.annealed = body
    why = f"the annealed control reaches {body.value:.4f} on the first held-out half"
    return _decided(execution, "finished", why, out, state=state)


def failed(state: State, execution: Execution, body: TrialFailed, out: Emission) -> None:
    """Try the control once more, or give the card up: without it there is nothing to compare with."""
    if not awaited(execution) or body.rung_attempt != execution.control_attempt:
        return
    again = body.retryable and execution.control_attempt < ATTEMPTS
    seq = _decided(execution, "requeued" if again else "lost", body.error[:200], out, state=state)
    if again:
        _start(state, execution, out, cause=seq)
        return
    why = f"the annealed control could not be trained: {body.error}"
    lifecycle.finish(state, execution.card, CardState.FAILED, why, out, cause=seq)


def _start(state: State, execution: Execution, out: Emission, *, cause: int) -> None:
    card = state.cards[execution.card].card
    assert card.asha is not None
    assert card.training_recipe is not None
    assert execution.base is not None
    assert execution.control_trial is not None
    execution.control_attempt += 1
    out.command(
        StartTrial(
            card=card.id,
            trial=execution.control_trial,
            rung_attempt=execution.control_attempt,
            variant=ANNEALED_CONTROL,
            base=execution.base.checkpoint,
            checkpoint=execution.base.checkpoint,
            from_resource=0,
            to_resource=card.asha.max_steps,
            top_resource=card.asha.max_steps,
            per_trunk_step=execution.per_trunk_step,
            resources=card.training_recipe.resources,
        ),
        cause=cause,
    )


def _decided(
    execution: Execution, decision: str, why: str, out: Emission, *, state: State, cause: int | None = None
) -> int:
    card = state.cards[execution.card].card
    assert card.asha is not None
    body = {
        "card": card.id,
        "trial": execution.control_trial,
        "resource": card.asha.max_steps,
        "decision": decision,
        "why": why,
    }
    return out.fact(TrialDecided.model_validate(body), cause=cause)
