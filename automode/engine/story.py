"""Why did it do that? A card's story, told by following causes through the log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from automode.planner.events import (
    Adopted,
    BudgetReleased,
    BudgetReserved,
    CardMoved,
    CardProposed,
    CardStarted,
    CommandFailed,
    Envelope,
    Evaluated,
    GateFitted,
    Merged,
    Resolved,
    Resumed,
    Rewind,
    Rewound,
    RolledBack,
    RuleEvaluated,
    Snapshotted,
    TrialDecided,
    TrialFailed,
    TrialReported,
    TrialsNoted,
    VerdictGiven,
)
from automode.planner.metrics import NAMES


def story(card: str, log: Iterable[Envelope]) -> str:
    """Tell what led to a card, what became of it and why, a line an event; each line names its cause.

    Args:
        card: The card's id.
        log: The session's envelopes in order.

    Returns:
        The story; empty when the log knows no such card.
    """
    events = list(log)
    by_seq = {e.seq: e for e in events}
    mine = [e for e in events if _about(e.body) == card and e.role != "command"]
    if not mine:
        return ""
    told: dict[int, Envelope] = {}
    for event in mine:
        for ancestor in _ancestors(event, by_seq):
            told.setdefault(ancestor.seq, ancestor)
        told[event.seq] = event
    for event in events:
        if isinstance(event.body, Resumed | Rewind | Rewound) and min(told) < event.seq < max(told):
            told[event.seq] = event
    lines = [f"The story of card {card}"]
    for seq in sorted(told):
        text = _sentence(told[seq].body)
        if text:
            because = f" (because of {told[seq].cause})" if told[seq].cause is not None else ""
            lines.append(f"  {seq:>6}  row {told[seq].frame_cursor:>7}  {text}{because}")
    return "\n".join(lines)


def _about(body: Any) -> str | None:
    if isinstance(body, CardProposed):
        return body.card.id
    card = getattr(body, "card", None)
    return card if isinstance(card, str) else None


def _ancestors(event: Envelope, by_seq: dict[int, Envelope]) -> list[Envelope]:
    found: list[Envelope] = []
    cause = event.cause
    while cause is not None and cause in by_seq and len(found) < 64:
        found.append(by_seq[cause])
        cause = by_seq[cause].cause
    return found


def _sentence(body: Any) -> str:  # noqa: C901 - one line per kind of event
    match body:
        case RuleEvaluated():
            return f"rule {body.rule} {body.outcome}: {body.why}"
        case CardProposed(card=card):
            return f"card {card.id} proposed by {card.created_by}: {card.reason}, up to {card.cost.sample_passes:,.0f} sample passes"
        case CardMoved():
            changed = ", ".join(f"{k}: {a} -> {b}" for k, (a, b) in body.difference.items())
            return f"{body.before} -> {body.after} by {body.actor}: {body.why}" + (
                f" [{changed}]" if changed else ""
            )
        case BudgetReserved():
            return f"{body.passes:,.0f} sample passes reserved of {body.remaining:,.0f} that remain"
        case BudgetReleased():
            return f"{body.spent:,.0f} sample passes spent, {body.released:,.0f} given back"
        case Snapshotted():
            return f"{body.purpose} snapshot at step {body.step}{_control(body)}"
        case Resolved():
            new = (
                f"; {body.new_labels} samples have a new label for those that take it"
                if body.new_labels
                else ""
            )
            return f"selection resolved to {body.n} samples{_parts(body)}; {len(body.variants)} trials{new}"
        case CardStarted():
            return f"started at step {body.step}; the control is compared at step {body.control_at}"
        case TrialDecided():
            return f"trial {body.trial} at {body.resource}: {body.decision}, {body.why}"
        case TrialReported():
            return f"trial {body.trial} reached {body.resource} with {NAMES[body.metric]} {body.value:.4f} ({body.choice})"
        case TrialFailed():
            return f"trial {body.trial} failed: {body.error}"
        case TrialsNoted():
            return body.sentence
        case GateFitted():
            return _gate(body)
        case Merged():
            return f"merged by {body.method}: {_metric(body)} {body.value:.4f} ({body.weights.choice}{_earlier(body)}){_told(body)}"
        case Evaluated():
            half = "held-out evidence" if body.half == "B" else "on the first held-out half"
            return f"{half} for {body.candidate}, {_metric(body)}: {_measured(body)}"
        case VerdictGiven():
            return f"verdict {body.verdict}: {body.why}"
        case Adopted():
            return f"{'exported' if body.into == 'export' else 'adopted into the trunk'} at step {body.step}"
        case RolledBack():
            return f"rolled back at step {body.step}"
        case Rewind():
            return f"safeguard, going back: {body.why}"
        case Rewound():
            return f"the trunk went back to its state of step {body.to_step}; rates times {body.rate_factor:g} from here"
        case Resumed():
            how = "exactly" if body.exact else f"not exactly ({body.why_approximate})"
            return (
                f"the run was cut off here, and taken up again {how} from its checkpoint at step {body.step}"
            )
        case CommandFailed():
            return f"{body.command} failed: {body.error}"
        case _:
            return ""


def _metric(body: Merged | Evaluated) -> str:
    return NAMES[body.metric]


def _told(body: Merged) -> str:
    return f"; {body.why}" if body.why else ""


def _earlier(body: Merged) -> str:
    control = body.control
    if control is None or control.checkpoint == body.weights.checkpoint:
        return ""
    at = "" if body.best_step is None else f", of step {body.best_step}"
    return f" of the best validated state{at}"


def _measured(body: Evaluated) -> str:
    """The difference over all samples and on each slice, in words."""
    told = [f"{name} {group.mean:+.5f} on {group.n}" for name, group in sorted(body.slices.items())]
    by_slice = f"; by slice: {', '.join(told)}" if told else ""
    return f"{body.overall.mean:+.5f} on {body.overall.n} samples{by_slice}"


def _parts(body: Resolved) -> str:
    return f" ({', '.join(f'{part.name}: {part.n}' for part in body.parts)})" if body.parts else ""


def _gate(body: GateFitted) -> str:
    loads = ", ".join(f"{x:.2f}" for x in body.loads)
    return f"gate over {', '.join(body.experts)}: {NAMES[body.metric]} {body.value:.4f}, loads {loads}"


def _control(body: Snapshotted) -> str:
    return "" if body.value is None else f", {NAMES[body.metric]} {body.value:.4f} ({body.choice}) on val-A"
