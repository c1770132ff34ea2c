"""Replay: feed the inputs of a log to a fresh machine, and compare what it decides with what was recorded.

Decisions compare exactly, numbers to 1e-9 relative. Facts may be missing behind the last durable event of a run that was killed:
they are recomputed, not lost. Everything else that differs is an error that names the event.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isclose, isnan
from typing import Any

from automode.engine.machine import handle, initial
from automode.engine.state import State
from automode.errors import ReplayDifferenceError
from automode.planner.events import Envelope, Rows
from automode.planner.rules import BUILT_IN
from automode.planner.rules.base import Rule

REL_TOL = 1e-9
KEEP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One place where the replay and the record part."""

    seq: int
    what: str
    recorded: str | None
    recomputed: str | None

    def __str__(self) -> str:
        return f"event {self.seq}: {self.what}; recorded {self.recorded}, recomputed {self.recomputed}"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a replay found.

    Attributes:
        observations: Rows folded.
        decisions: Facts and commands compared.
        differences: How many differ.
        shown: The first of them, at most 20.
        state: The machine's state at the end.
    """

    observations: int = 0
    decisions: int = 0
    differences: int = 0
    shown: list[Difference] = field(default_factory=list)
    state: State

    def add(self, seq: int, what: str, recorded: object, recomputed: object) -> None:
        """Note a difference."""
        self.differences += 1
        if len(self.shown) < KEEP:
            self.shown.append(
                Difference(
                    seq=seq,
                    what=what,
                    recorded=None if recorded is None else _short(recorded),
                    recomputed=None if recomputed is None else _short(recomputed),
                )
            )


def fold(items: Iterable[Rows | Envelope], *, rules: Sequence[Rule] = BUILT_IN) -> Outcome:
    """Feed a log and compare.

    Args:
        items: The log in order: rows of the trunk up to each event's ``frame_cursor``, and every envelope.
        rules: The rules that the session ran with.
    """
    return fold_keeping(items, rules=rules)[0]


def fold_keeping(
    items: Iterable[Rows | Envelope], *, rules: Sequence[Rule] = BUILT_IN
) -> tuple[Outcome, dict[int, Envelope]]:
    """Do what :func:`fold` does, and return too what was decided behind the last recorded event, by ``seq``."""
    out = Outcome(state=initial(rules))
    due: dict[int, Envelope] = {}
    ended = False
    try:
        for item in items:
            match item:
                case Rows():
                    out.observations += len(item.values)
                    _decide(out.state, item, due)
                case Envelope(role="input"):
                    _leftovers(out, due, item.seq)
                    ended = item.body.kind == "run_ended"
                    _decide(out.state, item, due)
                case Envelope():
                    out.decisions += 1
                    _compare(out, due.pop(item.seq, None), item)
    except ReplayDifferenceError as error:
        out.add(out.state.next_seq, str(error), "the log", "another number of decisions")
    if ended:
        _leftovers(out, due, None)
    return out, due


def _decide(state: State, item: Rows | Envelope, due: dict[int, Envelope]) -> None:
    _, facts, commands = handle(state, [item])
    for envelope in (*facts, *commands):
        due[envelope.seq] = envelope


def _leftovers(out: Outcome, due: dict[int, Envelope], before: int | None) -> None:
    for seq in sorted(due):
        if before is None or seq < before:
            out.add(seq, "decided now, and not recorded", None, due.pop(seq).body)


def _compare(out: Outcome, computed: Envelope | None, recorded: Envelope) -> None:
    if computed is None:
        out.add(recorded.seq, "recorded, and not decided now", recorded.body, None)
        return
    for name in ("role", "cause", "command_id", "frame_cursor"):
        if getattr(computed, name) != getattr(recorded, name):
            out.add(recorded.seq, f"its {name}", getattr(recorded, name), getattr(computed, name))
            return
    where = first_difference(plain(recorded.body), plain(computed.body))
    if where is not None:
        out.add(recorded.seq, f"{recorded.body.kind}.{where[0]}", where[1], where[2])


def plain(body: Any) -> Any:
    """A body as plain data."""
    return body.model_dump(mode="json", by_alias=True)


def first_difference(a: Any, b: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Return (path, a's value, b's value) of the first difference of two plain values, numbers to 1e-9 relative."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            found = first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
        return None
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            found = first_difference(x, y, f"{path}[{i}]")
            if found is not None:
                return found
        return None
    return None if _same(a, b) else (path, a, b)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return isclose(a, b, rel_tol=REL_TOL) or (isnan(a) and isnan(b))
    return bool(a == b)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else text[:297] + "..."
