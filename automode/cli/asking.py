"""Posting a request to a session's run, and hearing its answer.

Only the run changes its session: what is asked for lies in the session's inbox until the run takes it up between two steps.
"""

from __future__ import annotations

import getpass
import math
import time
from typing import Any, Final

import click

from automode.errors import AutomodeError, ConflictError, UsageError
from automode.planner.approval import PLANNER
from automode.session import Record, Session
from automode.session.inbox import post, refusal_of
from automode.session.standing import why_nobody_hears
from automode.session.writer_lock import held

POLL: Final = 0.05
"""Seconds between two looks for an answer; the run looks five times a second, between two steps."""


class Seconds(click.FloatRange):
    """A time to wait: a number that is not negative, infinity among them."""

    def __init__(self) -> None:
        super().__init__(min=0.0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a word as click does, and refuse what is no number."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


def ask(session: Session, request: dict[str, Any], actor: str | None, wait: float) -> None:
    """Post a request and tell the answer, or that there is none yet.

    Args:
        session: Where.
        request: The verb and what it is about.
        actor: Who asks; None: whoever is logged in.
        wait: Seconds to wait for the answer.

    Raises:
        ConflictError: The run has ended.
        AutomodeError: The run refused the request.
    """
    if next(session.events(kind="run_ended"), None) is not None:
        raise ConflictError(str(why_nobody_hears(session)))
    posted, answer = post_and_wait(session, request, actor, wait)
    if answer is None:
        then = "the run takes it up between two steps"
        if not held(session.path):
            then = (
                "no run is training this session now, and one that takes the session up again begins with it"
            )
        click.echo(f"request {posted} is posted; {then}")
        return
    for fact in answer:
        click.echo(news(fact))
    if not answer:
        click.echo("done: there was nothing left to do")


def post_and_wait(
    session: Session, request: dict[str, Any], actor: str | None, wait: float
) -> tuple[str, list[Record] | None]:
    """Post a request and wait.

    Returns:
        The request's id, and what the run made of it, in order; None where it has not taken it up by then.

    Raises:
        AutomodeError: The run refused the request.
    """
    after = session.last_seq()
    complete = {"card": None, "rev": None, "body": None, "mode": None} | request | {"actor": name_of(actor)}
    posted = post(session.path, complete)
    until = time.monotonic() + wait
    while (answer := answer_to(session, posted, after)) is None:
        if time.monotonic() >= until:
            return posted, None
        time.sleep(POLL)
    return posted, answer


def answer_to(session: Session, request: str, after: int) -> list[Record] | None:
    """What the run made of a request, in order; None while it has not taken it up.

    Raises:
        AutomodeError: It refused the request.
    """
    decided = next(
        (r for r in session.events(kind="decided", after=after) if r.body["request"] == request), None
    )
    if decided is None:
        unread = refusal_of(session.path, request)
        if unread is not None:
            raise AutomodeError(f"refused by the run: {unread}")
        return None
    answer = [r for r in session.events(after=decided.seq) if r.cause == decided.seq and r.role != "input"]
    refused = next((fact for fact in answer if fact.kind == "request_refused"), None)
    if refused is not None:
        raise AutomodeError(f"refused by the run: {refused.body['why']}")
    return answer


def name_of(actor: str | None) -> str:
    """Give the name that stands in the record.

    Raises:
        UsageError: There is none, or it is the planner's.
    """
    if actor is None:
        try:
            actor = getpass.getuser()
        except (OSError, KeyError, ImportError):  # no login name, as in some containers
            raise UsageError("who are you? give --as NAME") from None
    if not actor.strip() or actor == PLANNER:
        raise UsageError(f"--as {actor!r} cannot be taken: give your own name")
    return actor


def news(record: Record) -> str:
    """Tell one consequence of a request in a line."""
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
