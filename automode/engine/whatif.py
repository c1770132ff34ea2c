"""What another policy would have proposed on the same observations.

Rows, validations, scans and clusterings are what the world showed; they are folded under the other policy in observe mode.
What cards did to the run is not: after the first adoption the log is the record of another run, and what follows is
counterfactual. Scans were taken when the recorded policy asked for them; another policy cannot change that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from automode.engine.machine import handle, initial
from automode.planner.cards import PlanCard
from automode.planner.events import (
    Clustered,
    Envelope,
    Resumed,
    Rows,
    Scanned,
    SessionStarted,
    Validated,
)
from automode.planner.policy import Policy
from automode.planner.rules import BUILT_IN
from automode.planner.rules.base import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What another policy would have done.

    Attributes:
        recorded: Cards of the session, in order.
        proposed: Cards that the other policy would have proposed, in order.
        counterfactual_from: Step of the first adoption in the session, from which on the two are no longer the same run.
    """

    recorded: tuple[PlanCard, ...]
    proposed: tuple[PlanCard, ...]
    counterfactual_from: int | None


def what_if(items: Iterable[Rows | Envelope], policy: Policy, *, rules: Sequence[Rule] = BUILT_IN) -> WhatIf:
    """Fold a log's observations under another policy.

    Args:
        items: The log in order, as :func:`automode.engine.replay.fold` takes it.
        policy: The other policy.
        rules: Rules that its ``reasons`` choose among.
    """
    state = initial([rule for rule in rules if rule.id in policy.reasons])
    recorded: list[PlanCard] = []
    proposed: list[PlanCard] = []
    adopted: int | None = None
    for item in items:
        if isinstance(item, Envelope) and item.role != "input":
            if item.body.kind == "card_proposed":
                recorded.append(item.body.card)
            continue
        if isinstance(item, Envelope) and item.body.kind == "adopted" and adopted is None:
            adopted = item.body.step
        event = item if isinstance(item, Rows) else _as_observed(item, policy)
        if event is None:
            continue
        if isinstance(event, Envelope):
            event = replace(event, seq=state.next_seq)
            if isinstance(event.body, Resumed):
                event = replace(event, body=event.body.model_copy(update={"at_seq": state.next_seq - 1}))
        _, facts, _ = handle(state, [event])
        proposed += [fact.body.card for fact in facts if fact.body.kind == "card_proposed"]
    return WhatIf(recorded=tuple(recorded), proposed=tuple(proposed), counterfactual_from=adopted)


def _as_observed(item: Envelope, policy: Policy) -> Envelope | None:
    """What of an input the other policy may see; None for what only the recorded policy led to."""
    match item.body:
        case SessionStarted() as body:
            other = body.model_copy(
                update={
                    "policy": policy.dump(),
                    "policy_digest": policy.digest_with(body.plugins),
                    "mode": "observe",
                }
            )
            return replace(item, body=other, command_id=None)
        case Validated() | Scanned() | Clustered() | Resumed():
            return replace(item, command_id=None)
        case _:
            return None
