"""What a person's request does: the answer to one inbox file as facts, without performing anything.

Every check that a person can run into has a sentence that says what came, what is there and what to do. Revisions are
optimistic locks: whoever answers names the revision that they have read, and hears what changed if there is a newer one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from automode.errors import ConflictError
from automode.planner.approval import CardRecord, move, staleness
from automode.planner.cards import STOP_Z, CardState, PlanCard, card_id, difference
from automode.planner.events import CardMoved, CardProposed, Decided, Mode, ModeChanged, RequestRefused, Run
from automode.planner.fitting import Held
from automode.planner.plain_data import problems_of
from automode.planner.recipes import Base

Quote = Callable[[PlanCard], PlanCard | Held]
"""Prices a card and checks that it can run and fits; see :func:`automode.planner.fitting.quote`."""

FIXED: Final = ("id", "session", "step", "created_by", "action", "reason", "base", "diagnostics", "schema")
"""What an edit may not change: where a card comes from, and what was seen."""

_GIVEN: Final = ("id", "rev", "session", "step", "created_by", "cost", "base", "schema")
"""What a submitted card gets from us, whatever the file says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What answering needs beside the cards.

    Attributes:
        session: Name of the session.
        mode: The mode in force.
        run: What the run offers.
        base: What a card submitted now is made against; its policy and lineage are those in force.
        step: Trunk step.
        time: Seconds of the log's clock.
        ordinal: Tells cards of one reason and step apart.
        quote: Prices a card and checks that it can run.
        restorable: Ids of adopted cards whose trunk before the adoption is kept; what was exported has none.
    """

    session: str
    mode: Mode
    run: Run
    base: Base
    step: int
    time: float
    ordinal: int
    quote: Quote
    restorable: Container[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What follows from a request.

    Attributes:
        facts: To be recorded and applied, in order. None where the request was fulfilled already.
        roll_back: Id of the adopted card whose adoption is to be undone: the world has to act before its state moves.
    """

    facts: tuple[CardMoved | CardProposed | ModeChanged | RequestRefused, ...] = ()
    roll_back: str | None = None

    @property
    def refused(self) -> str | None:
        """Why the request was refused, if it was."""
        return next((f.why for f in self.facts if isinstance(f, RequestRefused)), None)


class _RefusedError(Exception):
    """Leaves the checks with the sentence that the person reads."""

    def __init__(self, why: str, *moves: CardMoved) -> None:
        super().__init__(why)
        self.moves = moves


def respond(cards: Mapping[str, CardRecord], request: Decided, desk: Desk) -> Response:
    """Answer one request. The same request id is to be handled once; that is for the caller to remember.

    A cancelled card that was running moves to ``refused``: its trials are for the caller to stop.

    Args:
        cards: Every card of the session, by id.
        request: What the person asks.
        desk: What answering needs beside the cards.
    """
    try:
        match request.verb:
            case "mode":
                return _mode(request, desk)
            case "submit":
                return _submit(request, desk)
            case _:
                return _about(_record(cards, request), cards, request, desk)
    except _RefusedError as refused:
        why = str(refused)
        moves = refused.moves
    except ConflictError as conflict:
        why, moves = str(conflict), ()
    answer = RequestRefused(request=request.request, verb=request.verb, card=request.card, why=why)
    return Response(facts=(*moves, answer))


def _record(cards: Mapping[str, CardRecord], request: Decided) -> CardRecord:
    if request.card is None:
        raise _RefusedError(f"{request.verb} needs the id of a card")
    record = cards.get(request.card)
    if record is None:
        raise _RefusedError(f"there is no card {request.card} in this session; `automode cards` lists them")
    return record


def _about(record: CardRecord, cards: Mapping[str, CardRecord], request: Decided, desk: Desk) -> Response:
    match request.verb:
        case "approve":
            return _approve(record, request, desk)
        case "edit":
            return _edit(record, request, desk)
        case "refuse" | "cancel":
            return _give_up(record, request)
        case "revise":
            _same_revision(record, request)
            if not request.note.strip():
                raise _RefusedError("revise needs a note that says what should be different")
            _fresh(record, desk)
            return _moved(move(record, CardState.REVISE, actor=request.actor, why=request.note))
        case "rollback":
            return _roll_back(record, cards.values(), desk)
        case _:
            raise _RefusedError(f"{request.verb} is no request about a card")


def _moved(moved: CardMoved) -> Response:
    return Response(facts=(moved,))


def _same_revision(record: CardRecord, request: Decided, *, needed: bool = False) -> None:
    """Optimistic locking: an answer to another revision than the latest is a conflict."""
    latest = record.card.rev
    if request.rev is None:
        if needed:
            raise _RefusedError(
                f"{request.verb} needs the revision that was read; card {record.card.id} is at revision {latest}"
            )
        return
    if request.rev == latest:
        return
    edit = next((m for m in reversed(record.history) if m.difference), None)
    by = f" by {edit.actor} at step {edit.step} ({', '.join(edit.difference)})" if edit is not None else ""
    raise _RefusedError(
        f"conflict: this {request.verb} is about revision {request.rev} of card {record.card.id}, which is at revision "
        f"{latest}{by}; read revision {latest} and answer again"
    )


def _fresh(record: CardRecord, desk: Desk) -> None:
    """A stale or expired card moves there at once, and the request is refused with the reason."""
    found = staleness(
        record, policy_digest=desk.base.policy, lineage=desk.base.lineage, step=desk.step, time=desk.time
    )
    if found is not None:
        state, why = found
        raise _RefusedError(
            f"card {record.card.id} is {state}: {why}", move(record, state, actor="planner", why=why)
        )


def _approve(record: CardRecord, request: Decided, desk: Desk) -> Response:
    _same_revision(record, request, needed=True)
    agreed = (CardState.APPROVED, CardState.RUNNING, CardState.ACCEPTED, CardState.ADOPTED, CardState.APPLIED)
    if record.state in agreed:
        return Response()
    _fresh(record, desk)
    if desk.mode not in ("propose", "act"):
        raise _RefusedError(f"the mode is {desk.mode}, in which no card runs: switch to propose or act first")
    moved = move(record, CardState.APPROVED, actor=request.actor, why=request.note or "approved")
    _fits(record.card, desk)
    return _moved(moved)


def _fits(card: PlanCard, desk: Desk) -> PlanCard:
    quoted = desk.quote(card)
    if isinstance(quoted, Held):
        raise _RefusedError(f"card {card.id} cannot run ({quoted.code}): {quoted.why}")
    return quoted


def _edit(record: CardRecord, request: Decided, desk: Desk) -> Response:
    _same_revision(record, request, needed=True)
    body = _body(request)
    _fresh(record, desk)
    before = record.card
    # `rev` names what was read, and the cost is ours to work out.
    wanted = _validated(before.dump() | {k: v for k, v in body.items() if k != "cost"} | {"rev": before.rev})
    touched = sorted({name.split(".")[0] for name in difference(before, wanted)}.intersection(FIXED))
    if touched:
        raise _RefusedError(
            f"an edit cannot change {', '.join(touched)} of card {before.id}: submit a card of your own instead"
        )
    if not difference(before, wanted):
        return Response()
    edited = _fits(wanted, desk).model_copy(update={"rev": before.rev + 1})
    return _moved(
        move(record, CardState.PROPOSED, actor=request.actor, why=request.note or "edited", edited=edited)
    )


def _give_up(record: CardRecord, request: Decided) -> Response:
    _same_revision(record, request)
    if record.state is CardState.REFUSED:
        return Response()
    if request.verb == "refuse" and record.state is CardState.RUNNING:
        raise _RefusedError(f"card {record.card.id} is running already: cancel stops it")
    why = request.note or ("cancelled" if request.verb == "cancel" else "refused")
    return _moved(move(record, CardState.REFUSED, actor=request.actor, why=why))


def _roll_back(record: CardRecord, cards: Iterable[CardRecord], desk: Desk) -> Response:
    card = record.card
    if record.state is CardState.ROLLED_BACK:
        return Response()
    if record.state is CardState.APPLIED:
        raise _RefusedError(
            f"card {card.id} changed how the run trains from step {record.history[-1].step} on, and the steps since then cannot be "
            "taken back; submit an adjustment of your own, with the rate_factor that undoes this one, or another clip_norm"
        )
    if record.state is not CardState.ADOPTED:
        raise _RefusedError(f"card {card.id} is {record.state}: only an adopted card can be rolled back")
    everything = list(cards)
    running = next((r for r in everything if r.state in (CardState.RUNNING, CardState.ACCEPTED)), None)
    if running is not None:
        raise _RefusedError(
            f"card {running.card.id} is {running.state} on top of what card {card.id} brought: cancel it first, or wait"
        )
    if card.id not in desk.restorable:
        raise _RefusedError(
            f"card {card.id} was exported beside the trunk, which it never changed: there is nothing to roll back"
        )
    later = [
        r.card.id
        for r in everything
        if r.state is CardState.ADOPTED
        and r.card.id in desk.restorable
        and _adopted_at(r) > _adopted_at(record)
    ]
    if later:
        raise _RefusedError(
            f"card {', '.join(later)} was adopted on top of card {card.id}: roll that one back first"
        )
    return Response(roll_back=card.id)


def _adopted_at(record: CardRecord) -> tuple[int, float]:
    moved = next(m for m in reversed(record.history) if m.after is CardState.ADOPTED)
    return moved.step, moved.time


def _mode(request: Decided, desk: Desk) -> Response:
    wanted = request.mode
    if wanted is None or wanted == "off":
        raise _RefusedError("mode needs one of observe, propose and act")
    if wanted == desk.mode:
        return Response()
    if desk.mode == "off":
        raise _RefusedError("this run was started with automode off, and nothing watches it")
    if wanted == "act" and desk.run.overlap:
        raise _RefusedError(
            f"{desk.run.overlap} validation samples are training samples too, so nothing may be adopted without a "
            "person: stay in propose, or give a validation set of its own"
        )
    return Response(facts=(ModeChanged(before=desk.mode, after=wanted, actor=request.actor),))


def _submit(request: Decided, desk: Desk) -> Response:
    if desk.mode not in ("propose", "act"):
        raise _RefusedError(f"the mode is {desk.mode}, in which no card runs: switch to propose or act first")
    body = _body(request)
    _bound(body, desk)
    given = {k: v for k, v in body.items() if k not in _GIVEN}
    reason = given.setdefault("reason", "manual")
    given.setdefault("because", request.note or f"submitted by {request.actor}")
    given.setdefault("cooldown_steps", 0)
    if given.get("action") in ("merge", "adjust", "stop"):
        given.setdefault("budget_steps", 0)
    if given.get("action") == "stop":
        given.setdefault("acceptance", {"z": STOP_Z, "slices": "ignore"})
    ours = {
        "id": card_id(desk.session, str(reason), desk.step, desk.ordinal),
        "rev": 1,
        "session": desk.session,
        "step": desk.step,
        "created_by": request.actor,
        "cost": {"sample_passes": 0.0, "share_of_remaining": 0.0},
        "base": desk.base.model_dump(mode="json", by_alias=True),
    }
    if request.actor == "planner":
        raise _RefusedError("the name `planner` belongs to automode: submit under your own")
    return Response(facts=(CardProposed(card=_fits(_validated(given | ours), desk)),))


def _bound(body: Mapping[str, Any], desk: Desk) -> None:
    """A saved card is bound to the policy and the lineage that it was made against."""
    base = body.get("base")
    if not isinstance(base, Mapping):
        return
    for name in ("policy", "lineage"):
        now = getattr(desk.base, name)
        if name in base and base[name] != now:
            raise _RefusedError(
                f"the card is stale: it was made against {name} {base[name]}, and the run is at {now}; leave `base` out to "
                "submit it against the run as it is"
            )


def _body(request: Decided) -> dict[str, Any]:
    if request.body is None:
        raise _RefusedError(f"{request.verb} needs the card")
    return dict(request.body)


def _validated(data: Mapping[str, Any]) -> PlanCard:
    try:
        return PlanCard.model_validate(data)
    except ValidationError as error:
        raise _RefusedError(f"the card cannot be taken: {problems_of(error)}") from None
