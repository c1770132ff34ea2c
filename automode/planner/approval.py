"""Who may let a card run, and what a person's request does to it: pure transitions over :data:`cards.TRANSITIONS`.

Nothing here performs anything. :func:`move` checks and words a transition, :func:`apply` writes it into the record,
:func:`respond` (in :mod:`automode.planner.requests`) turns a person's request into facts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

from automode.errors import ConflictError
from automode.planner.cards import TRANSITIONS, WAITING, CardState, PlanCard, difference
from automode.planner.events import CardMoved, Mode, TrialsNoted
from automode.planner.policy import Policy
from automode.planner.recipes import SelectQuantile

Decision = Literal["auto", "ask", "record"]

PLANNER: Final = "planner"
"""Actor of everything that the machine decides by itself."""

_RISKS: Final = {"low": 0, "medium": 1, "high": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """How long a card waits for an answer; None: until the run ends.

    Attributes:
        steps: Trunk steps.
        seconds: Seconds of the log's clock.
    """

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, policy: Policy, planning_budget: int) -> Self:
        """Read the policy; its ``expire_steps`` null means the planning budget, in steps."""
        approval = policy.approval
        return cls(
            steps=planning_budget if approval.expire_steps is None else approval.expire_steps,
            seconds=approval.timeout_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One line of a card's history: who moved it, when, in which revision and why."""

    before: CardState
    after: CardState
    rev: int
    actor: str
    why: str
    step: int
    time: float
    difference: dict[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class CardRecord:
    """A card and where it stands: mutable, owned by the fold, changed by :func:`apply` alone.

    Attributes:
        card: The latest revision.
        state: Where it stands.
        proposed_at_step: Trunk step of the proposal.
        proposed_at_time: Seconds of the log's clock.
        lifetime: How long it waits; counted anew from every move that leaves it waiting.
        expires_at_step: Trunk step from which it is expired, while it waits.
        expires_at_time: Seconds of the log's clock from which it is expired, while it waits.
        history: Every move, oldest first.
        notes: What backends said of its trials, oldest first.
    """

    card: PlanCard
    state: CardState
    proposed_at_step: int
    proposed_at_time: float
    lifetime: Lifetime
    expires_at_step: int | None = None
    expires_at_time: float | None = None
    history: list[Move] = field(default_factory=list)
    notes: list[TrialsNoted] = field(default_factory=list)

    def to_state(self) -> dict[str, Any]:
        """Return plain JSON data for :meth:`from_state`."""
        return {
            "card": self.card.dump(),
            "state": str(self.state),
            "proposed_at_step": self.proposed_at_step,
            "proposed_at_time": self.proposed_at_time,
            "lifetime": [self.lifetime.steps, self.lifetime.seconds],
            "expires_at_step": self.expires_at_step,
            "expires_at_time": self.expires_at_time,
            "history": [_dump_move(m) for m in self.history],
            "notes": [note.model_dump(mode="json") for note in self.notes],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Rebuild the record from what :meth:`to_state` returned."""
        steps, seconds = state["lifetime"]
        return cls(
            card=PlanCard.model_validate(state["card"]),
            state=CardState(state["state"]),
            proposed_at_step=state["proposed_at_step"],
            proposed_at_time=state["proposed_at_time"],
            lifetime=Lifetime(steps=steps, seconds=seconds),
            expires_at_step=state["expires_at_step"],
            expires_at_time=state["expires_at_time"],
            history=[_load_move(m) for m in state["history"]],
            notes=[TrialsNoted.model_validate(note) for note in state.get("notes", ())],
        )


def propose(card: PlanCard, *, step: int, time: float, lifetime: Lifetime) -> CardRecord:
    """Open the record of a card that was just proposed.

    Args:
        card: The card.
        step: Trunk step.
        time: Seconds of the log's clock.
        lifetime: How long it waits (:meth:`Lifetime.of`).
    """
    record = CardRecord(
        card=card, state=CardState.PROPOSED, proposed_at_step=step, proposed_at_time=time, lifetime=lifetime
    )
    _wind(record, step, time)
    return record


def move(
    record: CardRecord, to: CardState, *, actor: str, why: str, edited: PlanCard | None = None
) -> CardMoved:
    """Word a transition; the record itself is changed by :func:`apply`.

    Args:
        record: The card's record.
        to: The state to enter.
        actor: Who moves it: :data:`PLANNER`, or a person's name.
        why: A sentence.
        edited: The next revision, where the move is an edit.

    Raises:
        ConflictError: No such transition leads on from the state that the card is in.
    """
    allowed = TRANSITIONS[record.state]
    if to not in allowed:
        ways = ", ".join(sorted(allowed)) or "nothing: that is final"
        raise ConflictError(
            f"card {record.card.id} is {record.state} and cannot become {to}; from there leads only: {ways}"
        )
    assert edited is None or edited.rev == record.card.rev + 1
    return CardMoved(
        card=record.card.id,
        rev=record.card.rev if edited is None else edited.rev,
        before=record.state,
        after=to,
        actor=actor,
        why=why,
        edited=edited,
        difference={} if edited is None else difference(record.card, edited),
    )


def apply(record: CardRecord, moved: CardMoved, *, step: int, time: float) -> None:
    """Write a move into its record, and wind its timers anew while it waits."""
    assert (moved.card, moved.before) == (record.card.id, record.state)
    if moved.edited is not None:
        record.card = moved.edited
    record.state = moved.after
    record.history.append(
        Move(
            before=moved.before,
            after=moved.after,
            rev=moved.rev,
            actor=moved.actor,
            why=moved.why,
            step=step,
            time=time,
            difference=dict(moved.difference),
        )
    )
    _wind(record, step, time)


def decide(card: PlanCard, policy: Policy, mode: Mode) -> Decision:
    """Say what becomes of a proposed card: run it at once, ask a person, or only record it.

    In act mode the policy's risk, share and list of reasons decide; a card that a person had a hand in (submitted, edited)
    and one that selects the raw tail of the loss always ask.
    """
    match mode:
        case "propose":
            return "ask"
        case "act":
            approval = policy.approval
            by_itself = (
                card.created_by == PLANNER
                and card.rev == 1
                and not takes_suspects(card)
                and card.reason not in approval.ask
                and _RISKS[card.risk] <= _RISKS[approval.auto_risk]
                and card.cost.share_of_remaining <= approval.auto_share
            )
            return "auto" if by_itself else "ask"
        case _:
            return "record"


def takes_suspects(card: PlanCard) -> bool:
    """Whether the card trains on samples that are probably mislabelled, because a person insists."""
    return isinstance(card.selection, SelectQuantile) and not card.selection.exclude_suspects


def staleness(
    record: CardRecord, *, policy_digest: str, lineage: str, step: int, time: float
) -> tuple[CardState, str] | None:
    """Say whether a waiting card has outlived what it was made against: the state to enter, and why.

    Later trunk steps alone do not make a card stale; another policy, another lineage (adopted or rolled back) and the end of
    its lifetime do.
    """
    if record.state not in WAITING:
        return None
    base = record.card.base
    if base.policy != policy_digest:
        return CardState.STALE, f"the policy changed from {base.policy[:15]} to {policy_digest[:15]}"
    if base.lineage != lineage:
        return CardState.STALE, f"it was made for {base.lineage}, and the run goes on as {lineage}"
    if record.expires_at_step is not None and step >= record.expires_at_step:
        return CardState.EXPIRED, f"nobody answered within {record.lifetime.steps} steps"
    if record.expires_at_time is not None and time >= record.expires_at_time:
        return CardState.EXPIRED, f"nobody answered within {record.lifetime.seconds:g} seconds"
    return None


def sweep(
    records: Iterable[CardRecord], *, policy_digest: str, lineage: str, step: int, time: float
) -> list[CardMoved]:
    """Return the moves of all waiting cards that have expired or gone stale; time-outs skip, they fail nothing."""
    moves = []
    for record in records:
        found = staleness(record, policy_digest=policy_digest, lineage=lineage, step=step, time=time)
        if found is not None:
            moves.append(move(record, found[0], actor=PLANNER, why=found[1]))
    return moves


def _wind(record: CardRecord, step: int, time: float) -> None:
    waits = record.state in WAITING
    lifetime = record.lifetime
    record.expires_at_step = step + lifetime.steps if waits and lifetime.steps is not None else None
    record.expires_at_time = time + lifetime.seconds if waits and lifetime.seconds is not None else None


def _dump_move(moved: Move) -> dict[str, Any]:
    return {
        "before": str(moved.before),
        "after": str(moved.after),
        "rev": moved.rev,
        "actor": moved.actor,
        "why": moved.why,
        "step": moved.step,
        "time": moved.time,
        "difference": {name: list(pair) for name, pair in moved.difference.items()},
    }


def _load_move(data: dict[str, Any]) -> Move:
    return Move(
        before=CardState(data["before"]),
        after=CardState(data["after"]),
        rev=data["rev"],
        actor=data["actor"],
        why=data["why"],
        step=data["step"],
        time=data["time"],
        difference={name: (pair[0], pair[1]) for name, pair in data["difference"].items()},
    )
