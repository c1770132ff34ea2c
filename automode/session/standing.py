"""Where a session stands: whether its run trains, is paused, is held, has ended, or was killed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from automode.session.records import Record
from automode.session.session import Session
from automode.session.writer_lock import held

Condition = Literal["training", "paused", "held", "finished", "stopped", "failed", "killed"]

_WAITS = {"pause": "paused", "hold": "held"}
_GOES_ON = frozenset({"resume", "step", "stop", "release"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a session stands.

    Attributes:
        condition: What its run does, or what became of it.
        why: In words, by whom.
        steps: Rows of the trunk that count: attempted steps.
        total: Steps of the whole run; None where that is not known.
        mode: The mode in force.
        since: Seconds since the epoch of the log's youngest record; None where the log holds none.
    """

    condition: Condition
    why: str
    steps: int
    total: int | None
    mode: str
    since: float | None

    @property
    def alive(self) -> bool:
        """Whether a process hears what is asked of the run."""
        return self.condition in ("training", "paused", "held")


def standing_of(session: Session) -> Standing:
    """Read where a session stands.

    Args:
        session: An open session.
    """
    condition, why = _condition(session)
    total, mode = 0, "?"
    since: float | None = None
    for record in session.events():
        body, since = record.body, record.t_wall
        match record.kind:
            case "session_started":
                total, mode = int(body["run"]["total_steps"]), str(body["mode"])
            case "length_set":
                total = int(body["total_steps"])
            case "resumed" if body["total_steps"] is not None:
                total = int(body["total_steps"])
            case "mode_changed":
                mode = str(body["after"])
    return Standing(
        condition=condition, why=why, steps=session.rows(), total=total or None, mode=mode, since=since
    )


def why_nobody_hears(session: Session) -> str | None:
    """Say why no run takes orders and requests now; None where one does."""
    ended = next(session.events(kind="run_ended"), None)
    if ended is not None:
        return f"the run ended at step {ended.body['step']} ({ended.body['why']}); nobody answers requests any more"
    if not held(session.path):
        return "no run is training this session now: it was killed, or its machine is another one"
    return None


def _condition(session: Session) -> tuple[Condition, str]:
    ended = next(session.events(kind="run_ended"), None)
    if ended is not None:
        why = str(ended.body["why"])
        if why.startswith("failed: "):
            return "failed", why.removeprefix("failed: ")
        if ended.body.get("early") or why.startswith("stopped: "):
            return "stopped", why.removeprefix("stopped: ")
        return "finished", why
    if not held(session.path):
        return "killed", "no process writes it"
    last = _last_order(session)
    if last is None or last.body["verb"] in _GOES_ON:
        return "training", ""
    by = f"by {last.body['actor']} at step {last.body['step']}"
    if last.body["verb"] == "hold":
        return "held", f"finished at step {last.body['step']}"
    return "paused", f"{by}: {last.body['note']}" if last.body["note"] else by


def _last_order(session: Session) -> Record | None:
    """The last order that says whether the run waits; None where it has gone on since, or none came."""
    known = {*_WAITS, *_GOES_ON}
    resumed = max((record.seq for record in session.events(kind="resumed")), default=0)
    orders = [
        record
        for record in session.events(kind="controlled", after=resumed)
        if record.body["refused"] is None and record.body["verb"] in known
    ]
    return orders[-1] if orders else None
