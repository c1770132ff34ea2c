"""What another policy would have proposed on the same observations.

Rows, validations, scans and clusterings are what the world showed; they are folded under the other policy in observe mode.
What cards did to the run is not: after the first adoption the log is the record of another run, and what follows is
counterfactual. Scans were taken when the recorded policy asked for them; another policy cannot change that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from automode.engine.comparing import Pair, ScanLimits, pairs_of, scan_limits
from automode.engine.machine import handle, initial
from automode.planner.cards import PlanCard
from automode.planner.events import (
    Clustered,
    Diagnosed,
    Envelope,
    LengthSet,
    RateSet,
    Resumed,
    Rewound,
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
        scans: Which of the other policy's reasons would have read other scans than there are, and why.
        waited: Whether cards of the session waited for a person, and so had to leave time for an answer.
    """

    recorded: tuple[PlanCard, ...]
    proposed: tuple[PlanCard, ...]
    counterfactual_from: int | None
    scans: ScanLimits = field(default_factory=ScanLimits)
    waited: bool = False

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Recorded cards beside those that would have been proposed in their place, by step."""
        return pairs_of(self.recorded, self.proposed, on_scans=self.scans.reasons)


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
    session: SessionStarted | None = None
    taken = Counter[str]()
    for item in items:
        if isinstance(item, Envelope) and item.role != "input":
            if item.body.kind == "card_proposed":
                recorded.append(item.body.card)
            continue
        if isinstance(item, Envelope):
            taken[item.body.kind] += 1
            if isinstance(item.body, SessionStarted):
                session = item.body
            if item.body.kind == "adopted" and adopted is None:
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
    return WhatIf(
        recorded=tuple(recorded),
        proposed=tuple(proposed),
        counterfactual_from=adopted,
        scans=ScanLimits() if session is None else _limits(session, policy, taken),
        waited=session is not None and session.mode == "propose",
    )


def _limits(session: SessionStarted, policy: Policy, taken: Counter[str]) -> ScanLimits:
    return scan_limits(
        Policy.model_validate(session.policy),
        policy,
        total_steps=session.run.total_steps,
        scans=taken["scanned"],
        clusterings=taken["clustered"],
    )


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
        case (
            Validated()
            | Scanned()
            | Clustered()
            | Diagnosed()
            | Rewound()
            | RateSet()
            | LengthSet()
            | Resumed()
        ):
            return replace(item, command_id=None)
        case _:
            return None
