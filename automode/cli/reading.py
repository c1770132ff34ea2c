"""Commands that read a session and change nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import click

from automode.cli.sessions import card_argument, card_of, find_card, session_argument
from automode.cli.tables import duration, local_time, safe, table
from automode.cli.tree import tree
from automode.errors import UsageError
from automode.planner.cards import CardState
from automode.planner.yaml_text import shown
from automode.planner.yaml_writer import flow
from automode.session import Record, Session
from automode.session.records import ROLES
from automode.session.session_view import notes_on

CARDS_WAIT = 2
"""Exit code of ``automode cards`` and ``automode plan`` when a card waits for a person."""

ASKS = frozenset({CardState.PROPOSED, CardState.REVISE})
"""States in which a card waits for a person."""


@click.command()
@session_argument
@click.pass_context
def cards(context: click.Context, session: Path) -> None:
    """List a session's plan cards (exit code 2 when one waits for you)."""
    with Session.open(session) as opened:
        rows = opened.cards()
        proposed = {
            r.body["card"]["id"]: r.t_wall
            for r in opened.events(kind="card_proposed")
            if isinstance(r.body.get("card"), dict)
        }
    if not rows:
        click.echo("no cards")
        click.echo(f"what each rule has said: automode log {quote(str(session))} --kind rule_evaluated")
        return
    now = time.time()
    lines = []
    for row in rows:
        card = card_of(row)
        age = duration(now - proposed[row.card_id]) if row.card_id in proposed else "?"
        cost = f"{card.cost.sample_passes:,.0f} ({card.cost.share_of_remaining:.1%})"
        lines.append([row.card_id, str(row.rev), row.state, card.reason, str(card.step), cost, age])
    head = ["CARD", "REV", "STATE", "REASON", "STEP", "COST", "AGE"]
    click.echo(table(head, lines, right=(1, 4, 5, 6)))
    waiting = [row for row in rows if row.state in ASKS]
    if waiting:
        first = waiting[0]
        click.echo(
            f"\n{len(waiting)} waiting: automode show {quote(str(session))} {first.card_id}, then approve, reject, revise or edit"
        )
        context.exit(CARDS_WAIT)


@click.command()
@session_argument
@card_argument
@click.option("--rev", type=click.IntRange(min=1), help="This revision instead of the latest.")
def show(session: Path, card: str, rev: int | None) -> None:
    """Print a card as YAML, and what became of it."""
    with Session.open(session) as opened:
        row = find_card(opened, card)
        revisions = {r.rev: r for r in opened.revisions(row.card_id)}
        moves = [*_moves(opened, row.card_id)]
        notes = notes_on(opened).get(row.card_id, [])
    if rev is not None and rev not in revisions:
        known = ", ".join(map(str, sorted(revisions)))
        raise UsageError(f"card {row.card_id} has no revision {rev}; it has {known}")
    wanted = revisions[row.rev if rev is None else rev]
    click.echo(wanted.body.rstrip("\n"))
    click.echo(f"\nState: {row.state} (revision {row.rev})")
    for line in moves:
        click.echo(f"  {line}")
    if notes:
        click.echo("\nHow its trials were trained:")
    for line in notes:
        click.echo(f"  {line}")


def _moves(session: Session, card_id: str) -> Iterator[str]:
    for record in session.events(role="fact"):
        body = record.body
        when = f"{local_time(record.t_wall)}  row {record.frame_cursor:>7}"
        if record.kind == "card_proposed" and body["card"]["id"] == card_id:
            yield f"{when}  proposed by {shown(body['card']['created_by'])}"
        elif record.kind == "card_moved" and body["card"] == card_id:
            why = shown(body["why"], limit=400)
            yield f"{when}  {body['before']} -> {body['after']} by {shown(body['actor'])}, revision {body['rev']}: {why}"
            for name, (before, after) in body["difference"].items():
                yield f"{'':>{len(when)}}    {shown(name)}: {shown(flow(before), 80)} -> {shown(flow(after), 80)}"


@click.command()
@session_argument
@card_argument
def story(session: Path, card: str) -> None:
    """Tell why a card was made and what became of it, cause by cause."""
    from automode.session.replaying import story as tell

    with Session.open(session) as opened:
        click.echo(safe(tell(opened, find_card(opened, card).card_id)))


@click.command()
@session_argument
def lineage(session: Path) -> None:
    """Draw the family tree of the weights."""
    with Session.open(session) as opened:
        nodes = opened.lineage()
        verdicts = {
            r.body["node"]: r.body["verdict"]
            for r in opened.events(kind="lineage_grew")
            if r.body.get("verdict") is not None
        }
    click.echo("\n".join(tree(nodes, verdicts)) if nodes else "no lineage yet")


@click.command()
@session_argument
@click.option("--kind", help="Only events of this kind, such as card_moved.")
@click.option("--role", type=click.Choice(ROLES), help="Only what came in, was decided, or was commanded.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with everything.")
def log(session: Path, kind: str | None, role: Any, as_json: bool) -> None:
    """Print the session's events in order."""
    with Session.open(session) as opened:
        found = False
        for record in opened.events(kind=kind, role=role):
            found = True
            click.echo(_as_json(record) if as_json else _as_line(record))
        if not found and kind is not None:
            known = sorted({record.kind for record in opened.events(role=role)})
            click.echo(f"no events of kind {shown(kind)}; there are: {', '.join(known) or 'none'}", err=True)


def _as_json(record: Record) -> str:
    # NaN goes out as text, as in the cards, so that any reader of JSON can take the lines.
    fields = {name: getattr(record, name) for name in Record.__slots__}
    return json.dumps(json.loads(json.dumps(fields), parse_constant=str), ensure_ascii=False)


def _as_line(record: Record) -> str:
    head = f"{record.seq:>6}  {local_time(record.t_wall)}  row {record.frame_cursor:>7}  {record.role:<7} {record.kind:<17}"
    return f"{head} {shown(_gist(record.body), limit=160)}".rstrip()


def _gist(body: dict[str, Any]) -> str:
    """The parts of an event that fit a line, its reason in words last."""
    if isinstance(card := body.get("card"), dict):
        return f"{card.get('id')} {card.get('action')} {card.get('reason')}: {card.get('because')}"
    parts = [
        f"{key} {flow(value)}"
        for key, value in body.items()
        if key not in {"kind", "why", "note"} and value is not None and not isinstance(value, dict | list)
    ]
    words = body.get("why") or body.get("note")
    return ", ".join(parts) + (f": {words}" if words else "")


@click.command()
@session_argument
def trials(session: Path) -> None:
    """Show each card's ladder: what the trials reported, who was promoted and why, and who trained otherwise."""
    with Session.open(session) as opened:
        reasons = {row.card_id: row.reason for row in opened.cards()}
        ladders, notes = _ladders(opened), notes_on(opened)
    if not ladders:
        click.echo("no trials")
        return
    head = ["TRIAL", "VARIANT", "RUNG", "VALUE", "WEIGHTS", "DECISION", "RANK", "WHY"]
    for i, (card, rows) in enumerate(ladders.items()):
        click.echo(f"{'' if i == 0 else chr(10)}card {card} ({reasons.get(card, '?')})")
        click.echo(table(head, rows, right=(0, 2, 3, 6)))
        for line in notes.get(card, []):
            click.echo(f"  {line}")


def _ladders(session: Session) -> dict[str, list[list[str]]]:
    """Decisions on trials by card, in order, each with the report that it follows from."""
    # A trial's first decision stands before the command that names its variant.
    names = {
        (r.body["card"], r.body["trial"]): r.body["variant"]["name"]
        for r in session.events(kind="start_trial")
    }
    reports: dict[tuple[str, int, int], tuple[str, str]] = {}
    ladders: dict[str, list[list[str]]] = {}
    for record in session.events():
        body = record.body
        match record.kind:
            case "trial_reported":
                reports[body["card"], body["trial"], body["resource"]] = (
                    f"{body['value']:.4f}" if isinstance(body["value"], float) else str(body["value"]),
                    body["choice"],
                )
            case "trial_decided":
                card, trial, resource = body["card"], body["trial"], body["resource"]
                value, choice = reports.get((card, trial, resource), ("-", "-"))
                rank = "-" if body["rank"] is None else str(body["rank"])
                name = names.get((card, trial), "?")
                row = [str(trial), name, str(resource), value, choice, body["decision"], rank, body["why"]]
                ladders.setdefault(card, []).append(row)
            case _:
                continue
    return ladders
