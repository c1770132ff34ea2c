"""A session at a glance: which run, how far it came, what became of its cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from automode.planner.displays import Panel, Row
from automode.planner.events import TrialsNoted
from automode.planner.yaml_text import shown

if TYPE_CHECKING:
    from automode.session.session import Session

MOST_CARDS = 32
"""Cards that are shown, the latest."""

MOST_NOTES = 4
"""Notes on the trials of a card that are shown, the latest."""


def session_panel(session: Session) -> Panel:
    """Show a session; of one that is closed only where it lies."""
    if session.closed:
        return Panel(title=f"session {session.path.name} (closed)", rows=[("folder", str(session.path))])
    return Panel(
        title=f"session {session.path.name}",
        rows=[
            ("folder", str(session.path)),
            *_run_rows(session),
            *card_rows(session),
        ],
    )


def _run_rows(session: Session) -> list[Row]:
    header = session.header
    names = ("project", "run_name", "mode", "model", "optimizer", "device")
    about = ", ".join(f"{name} {header[name]}" for name in names if header.get(name) is not None)
    rows = [("run", about)] if about else []
    rows.append(("length", f"{session.rows():,} steps, {session.last_seq():,} records"))
    ended = next(session.events(kind="run_ended"), None)
    if ended is not None:
        rows.append(("ended", f"at step {ended.body['step']}: {ended.body['why']}"))
    return rows


def card_rows(session: Session) -> list[Row]:
    """Say where each card stands, and by which verdict."""
    reasons = {
        record.body["card"]["id"]: record.body["card"]["reason"]
        for record in session.events(kind="card_proposed")
        if isinstance(record.body.get("card"), dict)
    }
    verdicts = {record.body["card"]: record.body["why"] for record in session.events(kind="verdict_given")}
    cards, notes, rows = session.cards(), notes_on(session), []
    for row in cards[-MOST_CARDS:]:
        verdict = f" ({verdicts[row.card_id]})" if row.card_id in verdicts else ""
        told = f"{reasons.get(row.card_id, 'card')}, revision {row.rev}: {row.state}{verdict}"
        rows.append((f"card {row.card_id}", told))
        rows += [(f"card {row.card_id}", note) for note in notes.get(row.card_id, [])[-MOST_NOTES:]]
    if len(cards) > MOST_CARDS:
        rows.insert(0, ("cards", f"{len(cards)}, of which the last {MOST_CARDS} are shown"))
    return rows or [("cards", "none")]


def notes_on(session: Session) -> dict[str, list[str]]:
    """What backends said of each card's trials, a line a note: who trained alone, and why."""
    notes: dict[str, list[str]] = {}
    for record in session.events(kind="trials_noted"):
        note = TrialsNoted.model_validate(record.body)
        notes.setdefault(note.card, []).append(shown(note.sentence, limit=400))
    return notes
