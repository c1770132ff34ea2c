"""Cards that change the trunk's own rate or clipping, answered and applied (``lifecycle`` begins them). They have no evidence, so that somebody's word counts."""

from __future__ import annotations

from automode.engine import guarding, lifecycle
from automode.engine.emission import Emission
from automode.engine.state import State
from automode.planner.cards import CardState
from automode.planner.events import ClipSet, RateSet, Rewound
from automode.planner.recipes import Adjustment
from automode.planner.signals.readings import Reading


def answered(
    state: State, body: Rewound | RateSet | ClipSet, command_id: str | None, out: Emission
) -> tuple[Reading, ...] | None:
    """A safeguard's command was carried out, or a part of an adjustment. Returns readings of signals that changed by it, to be told.

    When all of an adjustment is made, its card is applied, and the signals begin anew.
    """
    changed = guarding.answered(state, body, out)
    card_id = None if isinstance(body, Rewound) else body.card
    execution = None if card_id is None else state.executions.get(card_id)
    if execution is None:
        return changed
    execution.waiting_for.discard(command_id or "")
    if execution.waiting_for:
        return None
    card = state.cards[execution.card].card
    assert card.adjustment is not None
    why = f"{_told(card.adjustment)} from step {body.step} on"
    lifecycle.finish(state, card.id, CardState.APPLIED, why, out)
    return state.suite.reset(f"card {card.id}: {why}")


def _told(adjustment: Adjustment) -> str:
    rate = [] if adjustment.rate_factor == 1.0 else [f"learning rates times {adjustment.rate_factor:g}"]
    clip = [] if adjustment.clip_norm is None else [f"gradient norm at most {adjustment.clip_norm:g}"]
    return ", ".join([*rate, *clip])
