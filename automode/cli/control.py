"""Orders to a run that trains in another process, and where runs stand."""

from __future__ import annotations

import json
import time
from pathlib import Path
from shlex import quote
from typing import Any, Final

import click

from automode.cli.answering import actor_option, note_option, told
from automode.cli.asking import POLL, Seconds, name_of
from automode.cli.sessions import RUNS, session_argument
from automode.cli.tables import duration, safe, table
from automode.errors import AutomodeError, ConflictError, SessionError, UsageError
from automode.planner.card_text import submission_from_yaml
from automode.planner.controls import VERBS, HealthChecked, arguments_from, verb_of
from automode.planner.health_report import rows_of
from automode.session import Session
from automode.session.database import DATABASE_NAME
from automode.session.inbox import post, refusal_of, withdraw
from automode.session.standing import Standing, standing_of, why_nobody_hears

WAIT: Final = 60.0
"""Seconds that an order's outcome is waited for: most come within 0.2 s or a step, a test or a check takes what it takes."""


@click.command(epilog=f"VERB is one of {', '.join(VERBS)}.")
@session_argument
@click.argument("verb", metavar="VERB")
@click.argument("arguments", nargs=-1, metavar="[ARGUMENT]...")
@click.option("--file", help="Of fork and merge: a card of your own (YAML, - for standard input).")
@click.option(
    "--wait",
    type=Seconds(),
    default=WAIT,
    show_default=True,
    help="Seconds to wait for the outcome; 0: only post the order.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as one JSON object.")
@note_option
@actor_option
def ctl(
    session: Path,
    verb: str,
    arguments: tuple[str, ...],
    file: str | None,
    wait: float,
    as_json: bool,
    note: str,
    actor: str | None,
) -> None:
    """Pause, step, stop, test, change or check a run that trains in another process.

    ARGUMENTs are name=value: `step 500`, `set max_epochs=20`, `set lr=1e-4`, `set lr_mul=0.5`, `load best`, `load 80e82514`,
    `check gradients`, `fork lr_mul=0.3`. The run carries the order out between two steps.
    """
    known = verb_of(verb)
    given = arguments_from(known, arguments)
    if file is not None:
        if known not in ("fork", "merge"):
            raise UsageError(f"--file is for fork and merge, and not for {known}")
        given["card"] = told(file, submission_from_yaml)
    with Session.open(session) as opened:
        deaf = why_nobody_hears(opened)
        if deaf is not None:
            raise ConflictError(f"{known}: {deaf}")
        after = opened.last_seq()
        order = {"control": known, "arguments": given, "note": note, "actor": name_of(actor)}
        posted = post(opened.path, order)
        if wait == 0.0:
            click.echo(f"order {posted} is posted; the run carries it out between two steps")
            return
        _tell(_outcome(opened, known, posted, after, wait), as_json)


def _outcome(session: Session, verb: str, posted: str, after: int, wait: float) -> dict[str, Any]:
    until = time.monotonic() + wait
    while True:
        for record in session.events(kind="controlled", include_superseded=True, after=after):
            if record.body["request"] == posted:
                return record.body
        refusal = refusal_of(session.path, posted)
        if refusal is not None:
            raise AutomodeError(f"{verb} refused by the run: {refusal}")
        deaf = why_nobody_hears(session)
        if deaf is not None and withdraw(session.path, posted):
            raise ConflictError(f"{verb}: {deaf}; the order is taken back")
        if time.monotonic() >= until:
            raise ConflictError(
                f"{verb}: the run has not answered within {wait:g} s, and still may: it looks after each step (order {posted})"
            )
        time.sleep(POLL)


def _tell(body: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(json.loads(json.dumps(body), parse_constant=str), ensure_ascii=False))
    if body["refused"] is not None:
        raise AutomodeError(f"{body['verb']} refused by the run: {body['refused']}")
    if not as_json:
        click.echo(safe(f"step {body['step']}: {body['told']}"))


@click.command()
@session_argument
def status(session: Path) -> None:
    """Say whether a session's run trains, is paused, is held, has ended or was killed."""
    with Session.open(session) as opened:
        found = standing_of(opened)
        header = opened.header
    rows = [
        ["session", str(session)],
        ["run", f"{header.get('project', '?')} / {header.get('run_name', '?')}"],
        ["state", f"{found.condition}{f' ({found.why})' if found.why else ''}"],
        ["steps", _steps(found)],
        ["mode", found.mode],
        ["last event", "none" if found.since is None else f"{duration(time.time() - found.since)} ago"],
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {safe(value)}")
    if found.alive:
        click.echo(f"\nautomode ctl {quote(str(session))} {_next_verb(found)}")


def _next_verb(found: Standing) -> str:
    return {"paused": "resume", "held": "release"}.get(found.condition, "pause")


def _steps(found: Standing) -> str:
    return f"{found.steps:,}" if found.total is None else f"{found.steps:,} of {found.total:,}"


@click.command("ls")
@click.argument("folder", default=RUNS, metavar="[FOLDER]")
def ls(folder: str) -> None:
    """List the sessions under a folder (automode-runs), the newest last, and what each run does."""
    root = Path(folder)
    found = sorted({*root.glob(f"*/{DATABASE_NAME}"), *root.glob(f"*/*/{DATABASE_NAME}")}, key=_age)
    if not found:
        click.echo(f"no sessions under {folder}")
        return
    now, lines = time.time(), []
    for file in found:
        name = str(file.parent.relative_to(root))
        try:
            with Session.open(file.parent) as opened:
                standing = standing_of(opened)
        except SessionError as error:
            lines.append([safe(name), "unreadable", "", "", safe(str(error))[:60]])
            continue
        age = "" if standing.since is None else duration(now - standing.since)
        lines.append([safe(name), standing.condition, _steps(standing), standing.mode, age])
    click.echo(table(["SESSION", "STATE", "STEPS", "MODE", "AGE"], lines, right=(2, 4)))


def _age(file: Path) -> tuple[float, str]:
    return file.stat().st_mtime, str(file)


@click.command()
@session_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with every number.")
def checks(session: Path, as_json: bool) -> None:
    """Print what the health checks of a session have found."""
    with Session.open(session) as opened:
        found = [HealthChecked.model_validate(record.body) for record in opened.events("health_checked")]
    if not found:
        click.echo(f"no health checks; make them with: automode ctl {quote(str(session))} check")
        return
    for one in found:
        if as_json:
            click.echo(json.dumps(json.loads(one.model_dump_json()), ensure_ascii=False))
            continue
        for label, text in rows_of([one]):
            click.echo(safe(f"step {one.step:>7}  {label}: {text}" if label else f"{'':>12}  {text}"))
