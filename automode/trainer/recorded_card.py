"""A card as the log has it: what was asked of the world, and what came back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from automode.errors import UsageError
from automode.planner.card_text import from_yaml
from automode.planner.cards import PlanCard
from automode.planner.events import (
    Envelope,
    Evaluate,
    Evaluated,
    FitGate,
    GateFitted,
    Merge,
    Merged,
    Resolved,
    SessionStarted,
    Snapshotted,
    StartTrial,
    TrialReported,
)
from automode.session import Session
from automode.session.replaying import to_envelope

_ASKED = frozenset({"start_trial", "fit_gate", "merge", "evaluate"})
_CAME = frozenset(
    {"snapshotted", "resolved", "trial_reported", "trial_failed", "gate_fitted", "merged", "evaluated"}
)


@dataclass(slots=True, kw_only=True)
class RecordedCard:
    """What a session holds of a card that has run.

    Attributes:
        header: The session's.
        started: How the run began.
        card: The revision that ran.
        base: The snapshot that its trials began from; None for a merge, which begins from the trunk as it is.
        control: The trunk that it was judged against; None where it did not come so far.
        resolved: Its data, and the step at which they were chosen.
        segments: What was trained, in order.
        gate: The router.
        merge: The merged state.
        look: The one look at val-B.
        failed: Segments that ended without a report.
    """

    header: dict[str, Any]
    started: SessionStarted
    card: PlanCard
    base: Snapshotted | None = None
    control: Snapshotted | None = None
    resolved: tuple[Resolved, int] | None = None
    segments: list[tuple[StartTrial, TrialReported]] = field(default_factory=list)
    gate: tuple[FitGate, GateFitted] | None = None
    merge: tuple[Merge, Merged] | None = None
    look: tuple[Evaluate, Evaluated] | None = None
    failed: int = 0


def read_card(session: Session, card: str) -> RecordedCard:
    """Read everything of a card that running it again needs.

    Raises:
        UsageError: There is no such card, or it never ran.
    """
    started = next(session.events(kind="session_started"), None)
    row = next((r for r in session.cards() if r.card_id == card), None)
    if started is None or row is None:
        known = ", ".join(r.card_id for r in session.cards()) or "none"
        raise UsageError(f"there is no card {card} in session {session.path.name}; its cards: {known}")
    found = RecordedCard(header=session.header, started=to_envelope(started).body, card=from_yaml(row.body))
    asked: dict[str, Any] = {}
    for record in session.events():
        if record.kind in _ASKED and record.role == "command" and record.body["card"] == card:
            asked[record.command_id or ""] = to_envelope(record).body
        elif record.kind in _CAME and record.role == "input" and record.body["card"] == card:
            _take(found, to_envelope(record), asked.get(record.command_id or ""))
    if found.base is None and found.merge is None:
        raise UsageError(f"card {card} is {row.state} and never ran, so there is nothing to run again")
    return found


def _take(found: RecordedCard, envelope: Envelope, asked: Any) -> None:
    match envelope.body, asked:
        case Snapshotted(purpose="base") as body, _:
            found.base = body
        case Snapshotted() as body, _:
            found.control = body
        case Resolved() as body, _:
            assert found.base is not None
            found.resolved = (
                body,
                found.base.step if envelope.effective_at is None else envelope.effective_at,
            )
        case TrialReported() as body, StartTrial():
            found.segments.append((asked, body))
        case GateFitted() as body, FitGate():
            found.gate = (asked, body)
        case Merged() as body, Merge():
            found.merge = (asked, body)
        case Evaluated() as body, Evaluate(half="B"):
            found.look = (asked, body)
        case _:
            found.failed += envelope.body.kind == "trial_failed"
