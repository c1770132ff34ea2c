"""The bridge between the log on disk and the engine: records to envelopes and back, replay and story of a session."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from automode.engine import Difference, Recovered, WhatIf, fold, recover, what_if
from automode.engine import story as tell
from automode.errors import ReplayDifferenceError, SessionCorruptError, SessionError, UsageError
from automode.planner.events import COMMAND, EVENT_VERSION, FACT, INPUT, Envelope, Rows
from automode.planner.policy import PLANNER_VERSION, Policy
from automode.planner.rules import BUILT_IN, chosen
from automode.planner.rules.base import Rule
from automode.plugins import plugins
from automode.session.records import Record
from automode.session.session import Session

_ADAPTERS: dict[str, Any] = {"input": INPUT, "fact": FACT, "command": COMMAND}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What a replay found.

    Attributes:
        observations: Trunk rows folded.
        decisions: Facts and commands compared.
        seconds: CPU seconds that folding took, reading included.
        differences: How many decisions differ; 0 for a faithful replay.
        first: The first difference with the story of its card, or None.
        shown: The first differences, at most 20.
        label: Empty; or why this is a what-if, for which no zero is promised: another version of the planner decides today.
    """

    observations: int
    decisions: int
    seconds: float
    differences: int
    first: str | None
    shown: tuple[Difference, ...]
    label: str = ""

    @property
    def rate(self) -> float:
        """Observations folded a CPU second."""
        return self.observations / self.seconds if self.seconds > 0 else 0.0

    def check(self) -> None:
        """Raise if anything differs.

        Raises:
            ReplayDifferenceError: With the first difference.
        """
        if self.differences:
            raise ReplayDifferenceError(f"{self.differences} differences; the first: {self.first}")


def to_record(envelope: Envelope) -> Record:
    """Write an envelope as the log stores it."""
    return Record(
        seq=envelope.seq,
        role=envelope.role,
        kind=envelope.body.kind,
        v=EVENT_VERSION,
        body=envelope.body.model_dump(mode="json", by_alias=True),
        t_wall=envelope.t_wall,
        t_mono=envelope.t_mono,
        cause=envelope.cause,
        command_id=envelope.command_id,
        effective_at=envelope.effective_at,
        stream=envelope.stream,
        attempt=envelope.attempt,
        frame_cursor=envelope.frame_cursor,
    )


def to_envelope(record: Record) -> Envelope:
    """Read an envelope from the log.

    Raises:
        SessionCorruptError: The body is not what its kind says.
    """
    try:
        body = _ADAPTERS[record.role].validate_python(record.body)
    except ValidationError as error:
        raise SessionCorruptError(
            f"event {record.seq} ({record.kind}) cannot be read: {error.errors(include_url=False)[0]['msg']}"
        ) from error
    return Envelope(
        seq=record.seq,
        role=record.role,
        body=body,
        cause=record.cause,
        command_id=record.command_id,
        frame_cursor=record.frame_cursor,
        effective_at=record.effective_at,
        t_wall=record.t_wall,
        t_mono=record.t_mono,
        stream=record.stream,
        attempt=record.attempt,
    )


def replay(session: Session | str | os.PathLike[str]) -> ReplayReport:
    """Feed a session's inputs to a fresh machine, recompute every fact and command, and compare with the record.

    Needs no torch, and writes nothing.

    Args:
        session: An open session, or its folder.

    Returns:
        The report; ``differences`` is 0 when the machine decides today exactly as it did then.
    """
    if not isinstance(session, Session):
        with Session.open(session) as opened:
            return replay(opened)
    began = time.process_time()
    outcome = fold(_items(session), rules=_rules(session))
    seconds = time.process_time() - began
    first = None
    if outcome.shown:
        difference = outcome.shown[0]
        first = str(difference)
        card = _card_at(session, difference.seq)
        if card is not None:
            first += "\n" + story(session, card)
    return ReplayReport(
        observations=outcome.observations,
        decisions=outcome.decisions,
        seconds=seconds,
        differences=outcome.differences,
        first=first,
        shown=tuple(outcome.shown),
        label=_label(session),
    )


def _label(session: Session) -> str:
    """Say that the session was decided by another version of the planner, where it was."""
    for record in session.events(kind="session_started"):
        version = record.body["planner_version"]
        if version != PLANNER_VERSION:
            return f"a what-if: version {version} of the planner decided then, and version {PLANNER_VERSION} decides now"
    return ""


def replay_with(session: Session | str | os.PathLike[str], policy: Policy) -> WhatIf:
    """Say which cards another policy would have proposed on a session's observations, and when.

    Args:
        session: An open session, or its folder.
        policy: The other policy; it cannot change what scans saw, or when.
    """
    if not isinstance(session, Session):
        with Session.open(session) as opened:
            return replay_with(opened, policy)
    _policy(session)
    return what_if(_items(session), policy, rules=chosen(policy, _plugins(session)))


def story(session: Session | str | os.PathLike[str], card: str) -> str:
    """Tell what led to a card and what became of it, from the causes in the log.

    Raises:
        UsageError: The session knows no such card.
    """
    if not isinstance(session, Session):
        with Session.open(session) as opened:
            return story(opened, card)
    told = tell(card, (to_envelope(record) for record in session.events()))
    if not told:
        known = ", ".join(row.card_id for row in session.cards()) or "none"
        raise UsageError(f"there is no card {card} in this session; its cards: {known}")
    return told


def recovered(session: Session, until: int) -> Recovered:
    """Fold a session's log up to a record, to go on from there.

    Args:
        session: An open session.
        until: The record's ``seq``; it must not be superseded.

    Raises:
        ReplayDifferenceError: The log is not what this version decides, or has no such record.
        SessionError: A plugin that took part is not installed, or is of another version.
    """
    return recover(_items(session), rules=_rules(session), until=until)


def _rules(session: Session) -> tuple[Rule, ...]:
    """The rules that took part, those of third parties among them."""
    policy, offered = _policy(session), _plugins(session)
    return chosen(policy, offered) if offered and policy is not None else BUILT_IN


def _policy(session: Session) -> Policy | None:
    """The policy that the session ran under; None where it has not begun.

    Raises:
        SessionError: This version cannot read it.
    """
    for record in session.events(kind="session_started"):
        try:
            return Policy.model_validate(record.body["policy"])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise SessionError(
                f"the session's policy cannot be read (`{where}`: {first['msg']}): version {record.body.get('planner_version')} of "
                f"the planner wrote it, and this is version {PLANNER_VERSION}; replay it with the automode that recorded it"
            ) from error
    return None


def _plugins(session: Session) -> list[Rule]:
    """The rules of third parties that took part.

    Raises:
        SessionError: A plugin that took part is not installed, or is of another version.
    """
    for record in session.events(kind="session_started"):
        recorded = list(record.body.get("plugins", ()))
        if not recorded:
            return []
        installed = plugins()
        missing = sorted(set(recorded) - {plugin.distribution for plugin in installed})
        if missing:
            raise SessionError(
                f"the session ran with rules of {', '.join(missing)}: install them to replay it"
            )
        return [plugin.rule for plugin in installed if plugin.distribution in recorded]
    return []


def _items(session: Session) -> Iterator[Rows | Envelope]:
    for item in session.iter_replay():
        if item[0] == "rows":
            yield Rows(first=item[1], names=item[2], values=item[3])
        else:
            yield to_envelope(item[1])


def _card_at(session: Session, seq: int) -> str | None:
    for record in session.events(after=seq - 1):
        card = record.body.get("card")
        if isinstance(card, dict):
            card = card.get("id")
        return card if isinstance(card, str) else None
    return None
