"""Making decisions durable: envelopes become one transaction, and only then may a command be carried out.

When the disk refuses, nothing is lost and training goes on: what could not be written waits in memory, its commands wait with
it, and the next boundary tries again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from automode.engine import State
from automode.errors import SessionError
from automode.planner.card_text import to_yaml
from automode.planner.events import (
    Adopted,
    CardMoved,
    CardProposed,
    Checkpointed,
    Envelope,
    GateFitted,
    LineageGrew,
    Merged,
    RolledBack,
    RunEnded,
    Snapshotted,
    TrialReported,
)
from automode.session import CardRow, CheckpointRow, LineageRow, SessionStore
from automode.session.replaying import to_record

DECISIVE = frozenset(
    {
        "session_started",
        "card_proposed",
        "card_moved",
        "verdict_given",
        "adopted",
        "rolled_back",
        "run_ended",
        "decided",
        "checkpointed",
        "controlled",
        "length_set",
        "resumed",
    }
)
"""Kinds that wait for the disk even without a command."""

_COMPLETE = "the model in memory is complete, and the session replays up to its last durable event"


class Recorder:
    """Writes envelopes in order; hands back the commands that are durable.

    Args:
        store: The session's single writer.
        log: The session's logger.
    """

    def __init__(self, store: SessionStore, log: Any) -> None:
        self._store = store
        self._log = log
        self._waiting: list[tuple[Envelope, list[CardRow], list[LineageRow], list[CheckpointRow]]] = []
        self._failing = False
        self._superseded_after: int | None = None

    def supersede(self, after_seq: int) -> None:
        """Put what the log holds behind a record out of the story, in one transaction with what is written next."""
        self._superseded_after = after_seq

    @property
    def waiting(self) -> int:
        """Envelopes that are not on disk yet."""
        return len(self._waiting)

    def add(self, state: State, envelopes: Sequence[Envelope]) -> None:
        """Take envelopes of one call of the machine; rows derived from them are made now, while the state is theirs."""
        for envelope in envelopes:
            self._waiting.append(
                (envelope, _cards(state, envelope), _lineage(envelope), _checkpoints(envelope))
            )

    def write(self) -> list[Envelope]:
        """Write what waits as one transaction; returns the commands in it, which may now be carried out.

        A disk that refuses is told once; the commands are returned by the call that succeeds.
        """
        if not self._waiting:
            return []
        batch = self._waiting
        durable = any(e.role == "command" or e.body.kind in DECISIVE for e, *_ in batch)
        try:
            self._store.write(
                [to_record(e) for e, *_ in batch],
                cards=[row for _, cards, _, _ in batch for row in cards],
                lineage=[row for _, _, lineage, _ in batch for row in lineage],
                checkpoints=[row for _, _, _, checkpoints in batch for row in checkpoints],
                durable=durable,
                supersede_after=self._superseded_after,
            )
        except SessionError as error:
            if not self._failing:
                self._failing = True
                self._log.warning(
                    "session_not_written", why=str(error), then="training goes on; writing is tried again"
                )
            return []
        if self._failing:
            self._failing = False
            self._log.info("session_written_again", events=len(batch))
        self._waiting = []
        self._superseded_after = None
        return [e for e, *_ in batch if e.role == "command"]

    def flush_if_due(self, now: float) -> None:
        """Commit pending rows now and then; a disk that refuses is told once."""
        try:
            self._store.flush_if_due(now)
        except SessionError as error:
            if not self._failing:
                self._failing = True
                self._log.warning(
                    "session_not_written", why=str(error), then="training goes on; writing is tried again"
                )

    def close(self) -> None:
        """Write everything and close; the store is let go of in any case.

        Raises:
            SessionError: The disk still refuses.
        """
        if self._waiting:
            self._failing = True
            self.write()
        try:
            if not self._waiting:
                self._store.close()
                return
        except SessionError as error:
            self._store.abandon()
            raise SessionError(f"{error}; {_COMPLETE}") from error
        self._store.abandon()
        raise SessionError(
            f"{len(self._waiting)} events of the session could not be written: make room on the disk; {_COMPLETE}"
        )


def _cards(state: State, envelope: Envelope) -> list[CardRow]:
    match envelope.body:
        case CardProposed(card=card):
            return [_row(card, "proposed", envelope.seq)]
        case CardMoved() as moved:
            card = moved.edited or state.cards[moved.card].card
            return [_row(card, str(moved.after), envelope.seq)]
        case _:
            return []


def _row(card: Any, state: str, seq: int) -> CardRow:
    return CardRow(card_id=card.id, rev=card.rev, state=state, body=to_yaml(card), seq=seq)


def _lineage(envelope: Envelope) -> list[LineageRow]:
    body = envelope.body
    if not isinstance(body, LineageGrew):
        return []
    return [
        LineageRow(
            node=body.node,
            parents=body.parents,
            kind=body.role,
            card=body.card,
            step=body.step,
            checkpoint=body.checkpoint,
            seq=envelope.seq,
        )
    ]


def _checkpoints(envelope: Envelope) -> list[CheckpointRow]:
    seq = envelope.seq
    match envelope.body:
        case Snapshotted() as body:
            return [CheckpointRow(digest=body.checkpoint, step=body.step, kind=body.purpose, seq=seq)]
        case TrialReported(checkpoint=str(digest)) as body:
            return [CheckpointRow(digest=digest, step=body.resource, kind=f"trial {body.trial}", seq=seq)]
        case Merged() as body:
            # A run that was stopped may keep a state that is recorded already, and stores its last one all the same.
            stored = body.weights if body.control is None else body.control
            row = CheckpointRow(digest=stored.checkpoint, step=body.step, kind="merge", seq=seq)
            if body.best is None or body.best_step is None:
                return [row]
            return [row, CheckpointRow(digest=body.best, step=body.best_step, kind="best", seq=seq)]
        case GateFitted(checkpoint=str(digest)):
            return [CheckpointRow(digest=digest, step=0, kind="mixture", seq=seq)]
        case Adopted() as body:
            rows = [] if body.before is None else [(body.before, "before")]
            return [
                CheckpointRow(digest=digest, step=body.step, kind=kind, seq=seq)
                for digest, kind in (*rows, (body.checkpoint, "adopted"))
            ]
        case RolledBack() as body:
            return [CheckpointRow(digest=body.checkpoint, step=body.step, kind=body.kind, seq=seq)]
        case Checkpointed() as body:
            return [CheckpointRow(digest=body.checkpoint, step=body.step, kind="run", seq=seq)]
        case RunEnded(weights=str(digest)) as body:
            return [CheckpointRow(digest=digest, step=body.step, kind="final", seq=seq)]
        case _:
            return []
