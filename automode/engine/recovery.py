"""After a crash: the same fold gives the same state, and says what was asked of the world and not answered.

What the log holds was decided; what it lost behind its last durable event is decided again, in the same way. A driver
writes ``unrecorded`` first, and then carries ``commands`` out: each carries the id under which its answer is
expected, so that an answer that did arrive is not asked for twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from automode.engine.replay import Outcome, fold_keeping
from automode.engine.state import State
from automode.errors import ReplayDifferenceError
from automode.planner.events import Envelope, Rows
from automode.planner.rules import BUILT_IN
from automode.planner.rules.base import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Where a log left off.

    Attributes:
        state: The machine, ready for the next event.
        unrecorded: Facts and commands that follow from the log and are not in it, in order.
        commands: Every command without an answer, recorded or not, in order.
    """

    state: State
    unrecorded: tuple[Envelope, ...]
    commands: tuple[Envelope, ...]


def recover(
    items: Iterable[Rows | Envelope], *, rules: Sequence[Rule] = BUILT_IN, until: int | None = None
) -> Recovered:
    """Fold a log that broke off.

    Args:
        items: The log in order, as :func:`automode.engine.replay.fold` takes it.
        rules: The rules that the session ran with.
        until: The last event to fold; None: to the log's end.

    Raises:
        ReplayDifferenceError: The log is not what this machine decides, so going on would contradict it.
    """
    asked: dict[str, Envelope] = {}

    def watched() -> Iterable[Rows | Envelope]:
        for item in items:
            if isinstance(item, Envelope) and item.role == "command" and item.command_id is not None:
                asked[item.command_id] = item
            yield item
            if until is not None and isinstance(item, Envelope) and item.seq >= until:
                return

    outcome: Outcome
    outcome, due = fold_keeping(watched(), rules=rules)
    if until is not None and outcome.state.next_seq <= until:
        raise ReplayDifferenceError(
            f"event {until} is not in the log's story; it ends at {outcome.state.next_seq - 1}"
        )
    if outcome.differences:
        raise ReplayDifferenceError(f"the log cannot be taken up: {outcome.shown[0]}")
    unrecorded = tuple(due[seq] for seq in sorted(due))
    for envelope in unrecorded:
        if envelope.role == "command" and envelope.command_id is not None:
            asked[envelope.command_id] = envelope
    pending = [asked[command_id] for command_id in outcome.state.pending]
    return Recovered(
        state=outcome.state, unrecorded=unrecorded, commands=tuple(sorted(pending, key=lambda e: e.seq))
    )
