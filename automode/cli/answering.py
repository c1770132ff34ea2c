"""Commands that ask something of a session: each posts one request, which the run takes up between two steps.

Only the run changes its session. What is plainly impossible is said at once; the run itself judges the rest, and its answer is
waited for a few seconds.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any, Final, TypeVar

import click

from automode.cli.files import read_text
from automode.cli.sessions import card_argument, card_of, find_card, session_argument
from automode.errors import AutomodeError, CardError, ConflictError, UsageError
from automode.planner.approval import PLANNER
from automode.planner.card_text import card_summary, from_yaml, submission_from_yaml, to_yaml
from automode.planner.cards import TRANSITIONS, CardState, PlanCard, difference
from automode.planner.requests import FIXED
from automode.planner.yaml_text import shown
from automode.planner.yaml_writer import flow
from automode.session import CardRow, Record, Session
from automode.session.inbox import post

WAIT: Final = 3.0
"""Seconds that an answer is waited for: the run looks five times a second, between two steps."""

_POLL: Final = 0.05

F = TypeVar("F", bound=Callable[..., Any])


def _person(command: F) -> F:
    """Add the options that every request takes."""
    actor = click.option(
        "--as", "actor", help="Your name in the record (default: the one you are logged in by)."
    )
    wait = click.option(
        "--wait",
        type=click.FloatRange(min=0.0),
        default=WAIT,
        show_default=True,
        help="Seconds to wait for the answer.",
    )
    return actor(wait(command))


_note = click.option("--note", default="", help="Your reason, for the record.")
_rev = click.option(
    "--rev", type=click.IntRange(min=1), help="The revision that you have read (default: the latest)."
)


@click.command()
@session_argument
@card_argument
@_rev
@_note
@_person
def approve(session: Path, card: str, rev: int | None, note: str, actor: str | None, wait: float) -> None:
    """Let a card run."""
    _ask_about(session, card, "approve", CardState.APPROVED, rev=rev, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@card_argument
@_rev
@_note
@_person
def reject(session: Path, card: str, rev: int | None, note: str, actor: str | None, wait: float) -> None:
    """Refuse a card that has not begun."""
    _ask_about(session, card, "refuse", CardState.REFUSED, rev=rev, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@card_argument
@_rev
@click.option("--note", required=True, help="What should be different.")
@_person
def revise(session: Path, card: str, rev: int | None, note: str, actor: str | None, wait: float) -> None:
    """Send a card back with a note on what should be different."""
    if not note.strip():
        raise UsageError("--note is empty: say what should be different")
    _ask_about(session, card, "revise", CardState.REVISE, rev=rev, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@card_argument
@_note
@_person
def cancel(session: Path, card: str, note: str, actor: str | None, wait: float) -> None:
    """Stop a card, running or not."""
    _ask_about(session, card, "cancel", CardState.REFUSED, rev=None, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@card_argument
@_note
@_person
def rollback(session: Path, card: str, note: str, actor: str | None, wait: float) -> None:
    """Undo an adoption: the weights from before it come back."""
    _ask_about(session, card, "rollback", CardState.ROLLED_BACK, rev=None, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@click.argument("mode", type=click.Choice(["observe", "propose", "act"]))
@_note
@_person
def mode(session: Path, mode: str, note: str, actor: str | None, wait: float) -> None:
    """Switch the mode of a running session."""
    with Session.open(session) as opened:
        _send(opened, {"verb": "mode", "mode": mode, "note": note}, actor, wait)


@click.command()
@session_argument
@click.argument("file")
@_note
@_person
def submit(session: Path, file: str, note: str, actor: str | None, wait: float) -> None:
    """Hand in a card of your own (a YAML file, or - for standard input)."""
    body = _told(file, submission_from_yaml)
    with Session.open(session) as opened:
        _send(opened, {"verb": "submit", "body": body, "note": note}, actor, wait)


@click.command()
@session_argument
@card_argument
@click.option("--file", help="The edited card (- for standard input) instead of an editor.")
@_note
@_person
def edit(session: Path, card: str, file: str | None, note: str, actor: str | None, wait: float) -> None:
    """Change a card in your editor; an approved card has to be approved again."""
    with Session.open(session) as opened:
        row = find_card(opened, card)
        _possible(row, CardState.PROPOSED, "edit")
        before = card_of(row)
        after = _told(file, from_yaml) if file is not None else _in_editor(before)
        if after is None:
            click.echo("nothing changed")
            return
        if after.rev != before.rev:
            raise ConflictError(
                f"this edit is of revision {after.rev}, and card {before.id} is at revision {before.rev}: "
                f"edit the latest (automode show {quote(str(session))} {before.id})"
            )
        changed = _checked(before, after)
        if not changed:
            click.echo("nothing changed")
            return
        for name, (old, new) in changed.items():
            click.echo(f"  {shown(name)}: {shown(flow(old), 200)} -> {shown(flow(new), 200)}")
        request = {"verb": "edit", "card": before.id, "rev": before.rev, "body": after.dump(), "note": note}
        _send(opened, request, actor, wait)


def _checked(before: PlanCard, after: PlanCard) -> dict[str, tuple[Any, Any]]:
    """Return what an edit changes; the cost does not count, for the run works it out."""
    changed = {k: v for k, v in difference(before, after).items() if k.partition(".")[0] != "cost"}
    fixed = sorted({name.partition(".")[0] for name in changed} & set(FIXED))
    if fixed:
        raise UsageError(
            f"an edit cannot change {', '.join(fixed)}: submit a card of your own instead (automode submit)"
        )
    return changed


def _in_editor(card: PlanCard) -> PlanCard | None:
    """Let a person edit until the text is a card, or they give up; None when nothing was saved."""
    text = to_yaml(card)
    while True:
        saved = click.edit(text, extension=".yaml")
        if saved is None:
            return None
        try:
            return from_yaml(saved)
        except CardError as error:
            click.echo(str(error), err=True)
            click.confirm("Edit it again?", default=True, abort=True, err=True)
            text = saved


T = TypeVar("T")


def _told(file: str, read: Callable[[str], T]) -> T:
    try:
        return read(read_text(file))
    except CardError as error:
        raise CardError(f"{shown(file, 400)}: {error}") from error


def _ask_about(
    session: Path,
    card: str,
    verb: str,
    to: CardState,
    *,
    rev: int | None,
    note: str,
    actor: str | None,
    wait: float,
) -> None:
    with Session.open(session) as opened:
        row = find_card(opened, card)
        if row.state == to:
            click.echo(f"card {row.card_id} is {row.state} already")
            return
        _possible(row, to, verb)
        if rev is not None and rev != row.rev:
            raise ConflictError(
                f"card {row.card_id} is at revision {row.rev}, and you have read {rev}: "
                f"read it again (automode show {quote(str(session))} {row.card_id})"
            )
        if verb == "approve":
            click.echo(card_summary(card_of(row)))
        _send(opened, {"verb": verb, "card": row.card_id, "rev": row.rev, "note": note}, actor, wait)


def _possible(row: CardRow, to: CardState, verb: str) -> None:
    allowed = TRANSITIONS[CardState(row.state)]
    if to not in allowed:
        ways = f"from there leads only: {', '.join(sorted(allowed))}" if allowed else "that is final"
        verb = "reject" if verb == "refuse" else verb
        raise ConflictError(f"cannot {verb} card {row.card_id}: it is {row.state}, and {ways}")
    if verb == "refuse" and row.state == CardState.RUNNING:
        raise ConflictError(f"card {row.card_id} is running: automode cancel stops it")


def _send(session: Session, request: dict[str, Any], actor: str | None, wait: float) -> None:
    """Post a request and tell the answer.

    Raises:
        ConflictError: The run has ended.
        AutomodeError: The run refused the request.
    """
    ended = next(session.events(kind="run_ended"), None)
    if ended is not None:
        raise ConflictError(
            f"the run ended at step {ended.body['step']} ({ended.body['why']}); nobody answers requests any more"
        )
    after = session.last_seq()
    complete = {"card": None, "rev": None, "body": None, "mode": None} | request | {"actor": _name(actor)}
    posted = post(session.path, complete)
    until = time.monotonic() + wait
    while (answer := _answer(session, posted, after)) is None:
        if time.monotonic() >= until:
            click.echo(f"request {posted} is posted; the run takes it up between two steps")
            return
        time.sleep(_POLL)
    refused = next((fact for fact in answer if fact.kind == "request_refused"), None)
    if refused is not None:
        raise AutomodeError(f"refused by the run: {refused.body['why']}")
    for fact in answer:
        click.echo(_news(fact))
    if not answer:
        click.echo("done: there was nothing left to do")


def _name(actor: str | None) -> str:
    if actor is None:
        try:
            actor = getpass.getuser()
        except (OSError, KeyError, ImportError):  # no login name, as in some containers
            raise UsageError("who are you? give --as NAME") from None
    if not actor.strip() or actor == PLANNER:
        raise UsageError(f"--as {actor!r} cannot be taken: give your own name")
    return actor


def _answer(session: Session, posted: str, after: int) -> list[Record] | None:
    """What the run made of a request, in order; None while it has not taken it up."""
    decided = next(
        (r for r in session.events(kind="decided", after=after) if r.body["request"] == posted), None
    )
    if decided is None:
        return None
    return [r for r in session.events(after=decided.seq) if r.cause == decided.seq and r.role != "input"]


def _news(record: Record) -> str:
    body = record.body
    match record.kind:
        case "card_moved":
            return f"card {body['card']} (revision {body['rev']}): {body['before']} -> {body['after']}"
        case "card_proposed":
            return f"card {body['card']['id']} is proposed"
        case "mode_changed":
            return f"mode: {body['before']} -> {body['after']}"
        case kind:
            return f"{kind.replace('_', ' ')}: the run is at it"
