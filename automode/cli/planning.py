"""``plan`` and ``apply``, as terraform has them: look at what waits, save a card, let exactly that card run.

A saved card is the card itself. It names its session, its revision, and the policy and lineage that it was made against, and
``apply`` refuses it as soon as one of them is no longer what the run is at.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from shlex import quote
from typing import Any, Final

import click

from automode.cli.answering import actor_option, edit_of, note_option, tell_difference, told
from automode.cli.asking import Seconds, answer_to, news, post_and_wait
from automode.cli.reading import ASKS, CARDS_WAIT
from automode.cli.sessions import card_of, find_card, session_argument, session_named
from automode.cli.tables import duration, safe
from automode.errors import ConflictError, UsageError
from automode.planner.card_text import card_summary, from_yaml, to_yaml
from automode.planner.cards import CardState, PlanCard, difference
from automode.planner.yaml_text import shown
from automode.session import CardRow, LineageRow, Record, Session
from automode.session.durable_files import replace_synced
from automode.session.inbox import withdraw
from automode.session.standing import why_nobody_hears

TIMEOUT: Final = 60.0
"""Seconds that ``apply`` waits for each answer: an evaluation between two steps may take a while."""

GRACE: Final = 1.0
"""Seconds in which a run that was just reading a request may still answer it."""

_DONE: Final = (CardState.APPROVED, CardState.RUNNING, CardState.ACCEPTED, CardState.ADOPTED)


@click.command()
@session_argument
@click.argument("card", metavar="[CARD]", required=False)
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Save the card, for automode apply."
)
@click.pass_context
def plan(context: click.Context, session: Path, card: str | None, out: Path | None) -> None:
    """Show the cards that wait for you, and save one (exit code 2 when one waits)."""
    with Session.open(session) as opened:
        if card is None:
            waiting = [row for row in opened.cards() if row.state in ASKS]
        else:
            row = find_card(opened, card)
            waiting = [row] if row.state in ASKS else []
            if not waiting:
                click.echo(f"card {row.card_id} does not wait: it is {row.state}")
        lineage = _trunk(opened)
        for row in waiting:
            click.echo(safe(card_summary(card_of(row))))
            for line in _remarks(opened, row, lineage):
                click.echo(f"  {line}")
        silent = (why_nobody_hears(opened) or _no_card_runs(opened)) if waiting else None
    if out is not None:
        _save(waiting, out, session, card)
    elif not waiting and card is None:
        click.echo("nothing to decide: no card waits")
    elif waiting:
        first = waiting[0].card_id
        click.echo(f"\n{len(waiting)} to decide: automode plan {quote(str(session))} {first} --out card.yaml")
    if silent is not None:
        click.echo(f"note: {silent}")
    if waiting:
        context.exit(CARDS_WAIT)


def _no_card_runs(session: Session) -> str | None:
    """Say that the mode lets no card run, where it does not."""
    modes = [r.body["mode"] for r in session.events(kind="session_started")]
    modes += [r.body["after"] for r in session.events(kind="mode_changed")]
    if not modes or modes[-1] in ("propose", "act"):
        return None
    return f"the mode is {modes[-1]}, in which no card runs: automode mode {quote(str(session.path))} propose"


def _save(waiting: list[CardRow], out: Path, session: Path, card: str | None) -> None:
    if not waiting:
        raise UsageError(
            f"nothing was saved to {shown(str(out), 400)}: no {'such ' if card else ''}card waits"
        )
    if len(waiting) > 1:
        ids = ", ".join(row.card_id for row in waiting)
        raise UsageError(f"{len(waiting)} cards wait ({ids}): name the one to save")
    try:
        replace_synced(out, to_yaml(card_of(waiting[0])).encode())
    except OSError as error:
        raise UsageError(f"{shown(str(out), 400)} cannot be written: {error.strerror}") from error
    click.echo(
        f"\nsaved card {waiting[0].card_id}, revision {waiting[0].rev}, to {shown(str(out), 400)}; ", nl=False
    )
    click.echo(f"let it run: automode apply {quote(str(out))} {quote(str(session))}")


def _remarks(session: Session, row: CardRow, lineage: LineageRow | None) -> list[str]:
    """What a person should know before deciding, beside what stands on the card."""
    found = []
    if row.state == CardState.REVISE:
        found.append(f"{'sent back':<9} {_last_word(session, row.card_id)}; edit it before it can run")
    stale = _outlived(session, card_of(row), lineage)
    if stale is not None:
        found.append(f"{'stale':<9} {stale}")
    return found


@click.command()
@click.argument("file")
@click.argument("session", metavar="[SESSION]", required=False)
@click.option(
    "--yes", "-y", "--auto-approve", is_flag=True, help="Do not ask; needed where there is no terminal."
)
@click.option(
    "--timeout",
    type=Seconds(),
    default=TIMEOUT,
    show_default=True,
    help="Seconds to wait for each answer of the run.",
)
@note_option
@actor_option
def apply(file: str, session: str | None, yes: bool, timeout: float, note: str, actor: str | None) -> None:
    """Let a saved card run, as it was saved or as you have edited it."""
    saved = told(file, from_yaml)
    with Session.open(session_named(session, saved.session)) as opened:
        row = _recorded(opened, saved)
        if row is None:
            return
        now = card_of(row)
        changed = edit_of(now, saved)
        click.echo(safe(card_summary(saved)))
        click.echo("")
        if changed:
            click.echo(f"changes to revision {now.rev}, which make revision {now.rev + 1}:")
            tell_difference(changed)
        else:
            click.echo(f"as recorded: revision {now.rev}, no changes")
        silent = why_nobody_hears(opened)
        if silent is not None:
            raise ConflictError(f"nothing was asked: {silent}")
        _confirm(now, yes)
        about = {"card": now.id, "note": note}
        rev = now.rev
        if changed:
            edit = {"verb": "edit", "rev": rev, "body": saved.dump()} | about
            rev = _asked(opened, edit, actor, timeout)
        _asked(opened, {"verb": "approve", "rev": rev} | about, actor, timeout)


def _confirm(card: PlanCard, yes: bool) -> None:
    if yes:
        return
    if not _terminal():
        raise UsageError("there is no terminal to ask on: give --yes to let the card run without being asked")
    answer = click.prompt(
        f"\nLet card {card.id} run? Only 'yes' is taken for an approval", default="", show_default=False
    )
    if answer.strip() != "yes":
        raise UsageError("nothing was asked of the run: you did not say yes")


def _terminal() -> bool:
    return sys.stdin.isatty()


def _recorded(session: Session, saved: PlanCard) -> CardRow | None:
    """Return the recorded row that a saved card is still the same proposal as; None where it has been approved as it is.

    Raises:
        ConflictError: The card, the revision or what it was made against is no longer what was saved.
        UsageError: It belongs to another session.
    """
    started = next(session.events(kind="session_started"), None)
    name = session.path.name if started is None else started.body["session"]
    if saved.session != name:
        raise UsageError(
            f"the card belongs to session {shown(saved.session)}, and this is session {shown(name)}"
        )
    row = next((r for r in session.cards() if r.card_id == saved.id), None)
    if row is None:
        raise ConflictError(f"the card is stale: session {shown(name)} has no card {saved.id} any more")
    now = card_of(row)
    # The price is worked out anew by the run, also of an edit that this very file has brought.
    apart = {name for name in difference(now, saved) if name.partition(".")[0] != "cost"}
    if row.state in _DONE and not apart:
        click.echo(f"card {row.card_id} is {row.state} already, as it was saved; there is nothing to do")
        return None
    if now.rev != saved.rev:
        raise ConflictError(_conflict(session, saved, now))
    outlived = _outlived(session, now, _trunk(session)) if row.state in (*ASKS, CardState.APPROVED) else None
    if outlived is not None:
        raise ConflictError(f"the card is stale: {outlived}")
    if row.state not in (*ASKS, CardState.APPROVED):
        why = _last_word(session, row.card_id)
        raise ConflictError(f"the card is stale: it is {row.state} by now{f' ({why})' if why else ''}")
    if row.state == CardState.REVISE and not apart:
        raise ConflictError(
            f"card {row.card_id} was sent back ({_last_word(session, row.card_id)}): edit the file first"
        )
    return row


def _conflict(session: Session, saved: PlanCard, now: PlanCard) -> str:
    """Say who changed what since the card was saved."""
    moves = [
        r for r in session.events(kind="card_moved") if r.body["card"] == now.id and r.body["difference"]
    ]
    since = [r.body for r in moves if r.body["rev"] > saved.rev]
    told_by = "; ".join(
        f"revision {body['rev']} by {shown(body['actor'])}: "
        + ", ".join(f"{shown(k)} {a!r} -> {b!r}" for k, (a, b) in body["difference"].items())
        for body in since
    )
    more = f" ({safe(told_by)[:600]})" if told_by else ""
    return (
        f"conflict: the card was saved at revision {saved.rev}, and is at revision {now.rev} by now{more}; "
        f"save it anew: automode plan {quote(str(session.path))} {now.id} --out card.yaml"
    )


def _outlived(session: Session, card: PlanCard, lineage: LineageRow | None) -> str | None:
    """Say what has changed since a card was made that it cannot outlive; None where nothing has."""
    started = next(session.events(kind="session_started"), None)
    if started is not None and card.base.policy != started.body["policy_digest"]:
        return f"it was made under policy {card.base.policy[:19]}, and the run is under {started.body['policy_digest'][:19]}"
    if lineage is not None and card.base.lineage != lineage.node:
        by = f", since card {lineage.card} changed the trunk at step {lineage.step}" if lineage.card else ""
        return f"it was made for {card.base.lineage}, and the run goes on as {lineage.node}{by}"
    return None


def _trunk(session: Session) -> LineageRow | None:
    """The trunk as it goes on now."""
    return next((node for node in reversed(session.lineage()) if node.kind == "trunk"), None)


def _last_word(session: Session, card: str) -> str:
    moves = [r for r in session.events(kind="card_moved") if r.body["card"] == card]
    return f"{shown(moves[-1].body['actor'])}: {shown(moves[-1].body['why'])}" if moves else ""


def _asked(session: Session, request: dict[str, Any], actor: str | None, timeout: float) -> int:
    """Ask, tell the answer, and return the card's revision after it.

    Raises:
        ConflictError: Nobody answered; the request was taken back.
        AutomodeError: The run refused.
    """
    after = session.last_seq()
    posted, answer = post_and_wait(session, request, actor, timeout)
    if answer is None:
        answer = _taken_back(session, posted, after, timeout)
    for fact in answer:
        click.echo(news(fact))
    moved = [f.body["rev"] for f in answer if f.kind == "card_moved" and f.body["card"] == request["card"]]
    return int(moved[-1]) if moved else int(request["rev"])


def _taken_back(session: Session, request: str, after: int, timeout: float) -> list[Record]:
    """Withdraw a request that was not answered, and hear an answer that came at that very moment."""
    withdraw(session.path, request)
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        answer = answer_to(session, request, after)
        if answer is not None:
            return answer
        time.sleep(0.05)
    raise ConflictError(
        f"the run did not answer within {duration(timeout)}, and the request was taken back; try again with a longer "
        "--timeout, or when the run is at it again"
    )
