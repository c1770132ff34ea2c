"""Commands that ask something of a session: each posts one request, which the run takes up between two steps.

Only the run changes its session. What is plainly impossible is said at once; the run itself judges the rest, and its answer is
waited for a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, Final, TypeVar

import click

from automode.cli.asking import Seconds, ask
from automode.cli.files import read_text
from automode.cli.sessions import card_argument, card_of, find_card, session_argument
from automode.errors import CardError, ConflictError, UsageError
from automode.planner.card_text import card_summary, from_yaml, submission_from_yaml, to_yaml
from automode.planner.cards import TRANSITIONS, CardState, PlanCard, difference
from automode.planner.requests import FIXED
from automode.planner.yaml_text import shown
from automode.planner.yaml_writer import flow
from automode.session import CardRow, Session

WAIT: Final = 3.0
"""Seconds that an answer is waited for: the run looks five times a second, between two steps."""

F = TypeVar("F", bound=Callable[..., Any])


actor_option = click.option(
    "--as", "actor", help="Your name in the record (default: the one you are logged in by)."
)


def person(command: F) -> F:
    """Add the options that every request takes."""
    wait = click.option(
        "--wait",
        type=Seconds(),
        default=WAIT,
        show_default=True,
        help="Seconds to wait for the answer.",
    )
    return actor_option(wait(command))


note_option = click.option("--note", default="", help="Your reason, for the record.")
_rev = click.option(
    "--rev", type=click.IntRange(min=1), help="The revision that you have read (default: the latest)."
)


@click.command()
@session_argument
@card_argument
@_rev
@note_option
@person
def approve(session: Path, card: str, rev: int | None, note: str, actor: str | None, wait: float) -> None:
    """Let a card run."""
    _ask_about(session, card, "approve", CardState.APPROVED, rev=rev, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@card_argument
@_rev
@note_option
@person
def reject(session: Path, card: str, rev: int | None, note: str, actor: str | None, wait: float) -> None:
    """Refuse a card that has not begun."""
    _ask_about(session, card, "refuse", CardState.REFUSED, rev=rev, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@card_argument
@_rev
@click.option("--note", required=True, help="What should be different.")
@person
def revise(session: Path, card: str, rev: int | None, note: str, actor: str | None, wait: float) -> None:
    """Send a card back with a note on what should be different."""
    if not note.strip():
        raise UsageError("--note is empty: say what should be different")
    _ask_about(session, card, "revise", CardState.REVISE, rev=rev, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@card_argument
@note_option
@person
def cancel(session: Path, card: str, note: str, actor: str | None, wait: float) -> None:
    """Stop a card, running or not."""
    _ask_about(session, card, "cancel", CardState.REFUSED, rev=None, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@card_argument
@note_option
@person
def rollback(session: Path, card: str, note: str, actor: str | None, wait: float) -> None:
    """Undo an adoption: the weights from before it come back."""
    _ask_about(session, card, "rollback", CardState.ROLLED_BACK, rev=None, note=note, actor=actor, wait=wait)


@click.command()
@session_argument
@click.argument("mode", type=click.Choice(["observe", "propose", "act"]))
@note_option
@person
def mode(session: Path, mode: str, note: str, actor: str | None, wait: float) -> None:
    """Switch the mode of a running session."""
    with Session.open(session) as opened:
        ask(opened, {"verb": "mode", "mode": mode, "note": note}, actor, wait)


@click.command()
@session_argument
@click.argument("file")
@note_option
@person
def submit(session: Path, file: str, note: str, actor: str | None, wait: float) -> None:
    """Hand in a card of your own (a YAML file, or - for standard input)."""
    body = told(file, submission_from_yaml)
    with Session.open(session) as opened:
        ask(opened, {"verb": "submit", "body": body, "note": note}, actor, wait)


@click.command()
@session_argument
@card_argument
@click.option("--file", help="The edited card (- for standard input) instead of an editor.")
@note_option
@person
def edit(session: Path, card: str, file: str | None, note: str, actor: str | None, wait: float) -> None:
    """Change a card in your editor; an approved card has to be approved again."""
    with Session.open(session) as opened:
        row = find_card(opened, card)
        possible(row, CardState.PROPOSED, "edit")
        before = card_of(row)
        after = told(file, from_yaml) if file is not None else _in_editor(before)
        if after is None:
            click.echo("nothing changed")
            return
        if after.rev != before.rev:
            raise ConflictError(
                f"this edit is of revision {after.rev}, and card {before.id} is at revision {before.rev}: "
                f"edit the latest (automode show {quote(str(session))} {before.id})"
            )
        changed = edit_of(before, after)
        if not changed:
            click.echo("nothing changed")
            return
        tell_difference(changed)
        request = {"verb": "edit", "card": before.id, "rev": before.rev, "body": after.dump(), "note": note}
        ask(opened, request, actor, wait)


def tell_difference(changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Print what an edit changes, a line each."""
    for name, (old, new) in changed.items():
        click.echo(f"  {shown(name)}: {shown(flow(old), 200)} -> {shown(flow(new), 200)}")


def edit_of(before: PlanCard, after: PlanCard) -> dict[str, tuple[Any, Any]]:
    """Return what an edit changes; the cost does not count, for the run works it out.

    Raises:
        UsageError: It changes what an edit cannot change.
    """
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


def told(file: str, read: Callable[[str], T]) -> T:
    """Read a file by ``read``; an error about its text begins with the file's name.

    Raises:
        CardError: The text is no card.
        UsageError: The file cannot be read.
    """
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
        possible(row, to, verb)
        if rev is not None and rev != row.rev:
            raise ConflictError(
                f"card {row.card_id} is at revision {row.rev}, and you have read {rev}: "
                f"read it again (automode show {quote(str(session))} {row.card_id})"
            )
        if verb == "approve":
            click.echo(card_summary(card_of(row)))
        ask(opened, {"verb": verb, "card": row.card_id, "rev": row.rev, "note": note}, actor, wait)


def possible(row: CardRow, to: CardState, verb: str) -> None:
    """Refuse what the card's state plainly does not allow.

    Raises:
        ConflictError: No move leads from the card's state to the one that is asked for.
    """
    allowed = TRANSITIONS[CardState(row.state)]
    if to not in allowed:
        ways = f"from there leads only: {', '.join(sorted(allowed))}" if allowed else "that is final"
        verb = "reject" if verb == "refuse" else verb
        raise ConflictError(f"cannot {verb} card {row.card_id}: it is {row.state}, and {ways}")
    if verb == "refuse" and row.state == CardState.RUNNING:
        raise ConflictError(f"card {row.card_id} is running: automode cancel stops it")
