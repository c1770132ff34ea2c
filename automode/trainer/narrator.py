"""Telling people what happens: one readable line an event, the whole card where a card is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from automode.engine import State
from automode.engine.climbing import climb_of
from automode.planner.card_text import to_yaml
from automode.planner.card_view import card_summary
from automode.planner.cards import CardState, PlanCard
from automode.planner.diagnostics import noise_scale
from automode.planner.events import (
    Adopted,
    CardMoved,
    CardProposed,
    CardStarted,
    ClipSet,
    CommandFailed,
    Diagnosed,
    Envelope,
    Evaluated,
    GateFitted,
    Merged,
    ModeChanged,
    RateSet,
    RequestRefused,
    Rewind,
    Rewound,
    Safeguarded,
    SessionStarted,
    TrialFailed,
    TrialReported,
    TrialsNoted,
    VerdictGiven,
)
from automode.planner.metrics import NAMES
from automode.session.durable_files import replace_synced

CARDS = "cards"


class Screen(Protocol):
    """Where lines for people go."""

    def card(self, text: str) -> None:
        """Print a card."""
        ...

    def event(self, text: str) -> None:
        """Print one line."""
        ...

    def climb(self, card: str, done: int, total: int, text: str) -> None:
        """Show how far a card's trials have come."""
        ...

    def climbed(self, card: str) -> None:
        """Know that a card's trials have ended."""
        ...


class Narrator:
    """Prints what a person wants to follow and logs the same as structured lines.

    Args:
        screen: Where lines go.
        log: The session's structured logger.
    """

    def __init__(self, screen: Screen, log: Any) -> None:
        self._screen = screen
        self._log = log

    def ask(self, card: PlanCard, session: Path) -> str:
        """Put the card where a person can read it; returns the file's path within the session."""
        folder = session / CARDS
        folder.mkdir(exist_ok=True)
        name = f"{CARDS}/{card.id}.r{card.rev}.yaml"
        replace_synced(session / name, to_yaml(card).encode())
        self._screen.event(
            f"card {card.id} waits for you: {session / name}\n"
            f"  automode approve {session} {card.id} --rev {card.rev}   |   automode reject {session} {card.id}"
        )
        return name

    def tell(self, envelope: Envelope, state: State) -> None:
        """Tell an event, where a person would want to know of it."""
        body = envelope.body
        self._follow(body, state)
        if isinstance(body, CardProposed):
            self._screen.card(card_summary(body.card))
            self._log.info("card_proposed", card=body.card.id, reason=body.card.reason, step=body.card.step)
            return
        line = _line(body)
        if line is not None:
            self._screen.event(f"[step {state.step}] {line}")
            self._log.info(body.kind, step=state.step, seq=envelope.seq, text=line)

    def _follow(self, body: Any, state: State) -> None:
        """Move the bar of a card whose ladder has moved; take it away when its trials are over."""
        match body:
            case CardStarted() | TrialReported() | TrialFailed():
                execution = state.executions.get(body.card)
                climb = None if execution is None else climb_of(execution)
                if climb is not None:
                    self._screen.climb(climb.card, climb.done, climb.total, climb.text)
            case CardMoved(before=CardState.RUNNING):
                self._screen.climbed(body.card)


def _curated(body: Adopted) -> str:
    left_out = f"; {body.left_out} samples are left out of its batches" if body.left_out else ""
    return left_out + (f"; {body.relabelled} samples have new labels there" if body.relabelled else "")


def _line(body: Any) -> str | None:  # noqa: C901 - one line per kind of event
    match body:
        case CardMoved():
            return f"card {body.card}: {body.before} -> {body.after} by {body.actor}: {body.why}"
        case TrialReported():
            return (
                f"card {body.card}: trial {body.trial} at {body.resource} steps has {NAMES[body.metric]} {body.value:.4f} "
                f"({body.choice} weights) on the first held-out half"
            )
        case TrialFailed():
            return f"card {body.card}: trial {body.trial} failed: {body.error}"
        case TrialsNoted():
            return f"card {body.card}: {body.sentence}"
        case GateFitted():
            return f"card {body.card}: gate fitted, {NAMES[body.metric]} {body.value:.4f}, loads {_numbers(body.loads)}"
        case Merged():
            return (
                f"card {body.card}: merged by {body.method} ({body.weights.choice}), "
                f"{NAMES[body.metric]} {body.value:.4f}{f'; {body.why}' if body.why else ''}"
            )
        case Evaluated():
            return (
                f"card {body.card}: {body.candidate} against the control on {body.overall.n} {'unseen ' if body.half == 'B' else ''}held-out samples: "
                f"{body.overall.mean:+.5f}"
            )
        case VerdictGiven():
            return f"card {body.card}: {body.verdict}: {body.why}"
        case Adopted(into="export"):
            return f"card {body.card}: exported beside the trunk, checkpoint {body.checkpoint[:19]}"
        case Adopted():
            return f"card {body.card}: adopted into the trunk{_curated(body)}"
        case Safeguarded():
            return f"safeguard: {body.what} ({body.why})"
        case Rewind():
            return f"safeguard: going back ({body.why})"
        case Rewound():
            return (
                f"safeguard: the trunk is back at its state of step {body.to_step}; rates times {body.rate_factor:g} from here: "
                f"{_rates(body.rates)}"
            )
        case RateSet():
            return _rate_set(body)
        case ClipSet(norm=None):
            return f"safeguard: gradient norms are no longer capped ({body.why})"
        case ClipSet():
            return f"safeguard: gradient norms are capped at {body.norm:.4g} ({body.why})"
        case Diagnosed() if body.sharpness is not None or body.gradient_variance is not None:
            return _diagnosed(body)
        case CommandFailed():
            return (
                f"{body.command} failed{'' if body.card is None else f' for card {body.card}'}: {body.error}"
            )
        case RequestRefused():
            return f"request {body.verb} refused: {body.why}"
        case ModeChanged():
            return f"mode {body.before} -> {body.after} by {body.actor}"
        case SessionStarted():
            return _started(body)
        case _:
            return None


def _started(body: SessionStarted) -> str | None:
    if body.why_mode is not None and body.mode != body.asked_mode:
        return f"mode is {body.mode}, not {body.asked_mode}: {body.why_mode}"
    why = body.run.why_no_evidence
    if body.mode != "act" or why is None:
        return None
    return (
        f"automode will try nothing in this run, since nothing could be proven ({why}); its safeguards watch"
    )


def _diagnosed(body: Diagnosed) -> str:
    scale, above = noise_scale([body])
    told = [f"sharpness {body.sharpness:.4g}"] if body.sharpness is not None else []
    if scale is not None:
        told.append(f"gradient noise scale {scale:.4g} samples")
    elif above is not None:
        told.append(f"gradient noise scale above {above:.4g} samples")
    return f"diagnostics: {', '.join(told)}"


def _rate_set(body: RateSet) -> str:
    if body.actor is not None:
        return f"rates set by {body.actor}: {_rates(body.rates)}"
    return f"safeguard: rates times {body.factor:g} from here: {_rates(body.rates)} ({body.why})"


def _rates(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:.4g}" for rate in rates[:8])


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
