"""A run taken up from a checkpoint: the fold goes on from the record that it stood at, and numbers never start again."""

from __future__ import annotations

from collections.abc import Iterable

from automode.engine import lifecycle, observing
from automode.engine.emission import Emission
from automode.engine.state import State
from automode.errors import ReplayDifferenceError
from automode.planner.events import (
    Checkpointed,
    Controlled,
    Envelope,
    Evaluate,
    HealthChecked,
    LengthSet,
    Resumed,
    Tested,
    Weights,
)


def skip(state: State, body: Resumed, event: Envelope) -> None:
    """Move the numbers of events and rows behind what is out of the story.

    Raises:
        ReplayDifferenceError: The state is not the one that the run was taken up from.
    """
    if body.at_seq != state.next_seq - 1 or event.seq < state.next_seq or event.frame_cursor < state.rows:
        raise ReplayDifferenceError(
            f"event {event.seq} takes the run up behind event {body.at_seq}, and the log goes on behind {state.next_seq - 1}"
        )
    state.next_seq = event.seq
    state.superseded += event.frame_cursor - state.rows
    state.rows = event.frame_cursor
    state.attempt = body.attempt


def told(state: State, body: Resumed | LengthSet, out: Emission) -> None:
    """Hear that the run goes on from a checkpoint, or that a person has set another length."""
    if isinstance(body, Resumed):
        _resumed(state, body, out)
    else:
        _lengthen(state, body.total_steps)


def noted(state: State, body: Checkpointed | Controlled | Tested | HealthChecked) -> None:
    """Know where the best validated state is stored; the rest is told to people, and nothing is decided on it."""
    if isinstance(body, Checkpointed) and body.why == "best":
        state.best = body.checkpoint


def _resumed(state: State, body: Resumed, out: Emission) -> None:
    """Go on as if nothing had happened where the rows will be the same; else start the signals anew.

    A look at val-B is paid for once: an exact run looks at the same candidate again and sees the same (see :func:`next_look`),
    while another run's candidates are others, so that the looks that were cut off stay spent.
    """
    if body.total_steps is not None:
        _lengthen(state, body.total_steps)
        lifecycle.keep_going(state, f"the run was taken up to go on to step {body.total_steps}", out)
    state.looked = body.looks
    if body.exact:
        return
    state.spending.looks = max(state.spending.looks, len(body.looks))
    observing.tell(state.suite.reset("the run was taken up, and not exactly as it was"), out)


def looked_at(weights: Weights, control: Weights) -> str:
    """Name what a look at val-B compares."""
    return f"{weights.checkpoint}/{weights.choice} {control.checkpoint}/{control.choice}"


def looks_of(commands: Iterable[Evaluate]) -> tuple[str, ...]:
    """Give what each look was at, by its number; every attempt's commands, in the order of the log."""
    found = {command.look: looked_at(command.weights, command.control) for command in commands}
    return tuple(found.get(look, "") for look in range(1, max(found, default=0) + 1))


def next_look(state: State, weights: Weights, control: Weights) -> int:
    """Spend a look and return its number: one that an attempt cut off has spent on the same, else a fresh one."""
    what = looked_at(weights, control)
    state.spending.spend()
    while (look := state.spending.looks) <= len(state.looked) and state.looked[look - 1] != what:
        state.spending.spend()
    return look


def _lengthen(state: State, total_steps: int) -> None:
    """Let the compute grow (or shrink) with the run; its cadences stay, since they are what its signals were set up for."""
    assert state.run is not None
    state.run = state.run.model_copy(update={"total_steps": total_steps})
    state.ledger.total = max(1, round(total_steps * state.passes_per_step))
    state.ledger.cap = round(state.policy.pacing.total_share * state.ledger.total)
