"""Safeguards: what is done at once where a run has certainly gone wrong, without a card and without a cooldown.

The order is: leave a step out that is not finite (the loop does that), go back to a good state at a lower rate, stop. Going back
is asked for by :class:`Rewind` and leaves the clock alone: rows, steps and compute stay counted, only the weights and what
belongs to them are those of before.
"""

from __future__ import annotations

from math import exp
from typing import Final

from automode.engine import lifecycle
from automode.engine.emission import Emission
from automode.engine.state import State
from automode.planner.divergence import WIDTH
from automode.planner.events import (
    ClipSet,
    CommandFailed,
    RateSet,
    Rewind,
    Rewound,
    Safeguarded,
    SetClip,
    SetLearningRate,
    StopRun,
)
from automode.planner.signals.readings import Reading
from automode.planner.signals.trend import TrendState

LARGEST_CAP: Final = 1e9
"""A gradient norm above this is no measure for a cap."""


def healthy(state: State) -> bool:
    """Whether nothing is wrong with the trunk as far as the rows tell: its state may be kept as a good one."""
    suite, level = state.suite, state.guards.level
    return (
        level.since is None
        and (state.rows == 0 or len(level.recent) == WIDTH)
        and suite.non_finite.bad_run == 0
        and not suite.shift.active
        and not _pending(state, "rewind")
    )


def watch(state: State, out: Emission) -> bool:
    """Follow the rows up to now, and act where that is certain to be needed.

    Returns:
        Whether the run is going back, so that the rules have nothing to look at.
    """
    guards, suite = state.guards, state.suite
    guards.level.look(state.step, rising=suite.trend.firm is TrendState.REGRESSING)
    if not _acts(state):
        return False
    _cap(state, out)
    finite = suite.non_finite
    # Steps that the guard leaves out are told one by one, and steps that a scaler leaves out are its own affair.
    if finite.skipped_run == 0 and finite.bad_run >= state.policy.safeguards.rewind_after_nonfinite:
        _not_finite(state, finite.bad_run, f"{finite.bad_run} steps in a row were not finite", out)
    elif guards.level.diverged(state.step) and _levels_count(state):
        _diverged(state, out)
    return _pending(state, "rewind")


def told(state: State, body: Safeguarded, out: Emission) -> bool:
    """Hear of a safeguard of the loop. Returns whether the rules have reason to look."""
    if body.what == "skipped":
        _skipped(state, body, out)
    return body.what in ("skipped", "overflowed", "stopped")


def _skipped(state: State, body: Safeguarded, out: Emission) -> None:
    """Several steps in a row that are left out are no accident of one batch."""
    guards = state.guards
    again, policy = body.step == guards.skipped_at, state.policy.safeguards
    guards.skipped = guards.skipped + 1 if again else 1
    guards.left_out = guards.left_out + 1 if again else 1
    guards.skipped_at = body.step
    if guards.left_out >= policy.stop_after_nonfinite:
        return
    if _acts(state) and guards.skipped >= policy.rewind_after_nonfinite:
        _not_finite(state, 0, f"{guards.skipped} steps in a row were left out: {body.why}", out)


def answered(state: State, body: Rewound | RateSet | ClipSet, out: Emission) -> tuple[Reading, ...] | None:
    """A command of the safeguards was carried out. Returns the readings of signals that changed by it, to be told."""
    match body:
        case Rewound():
            return _rewound(state, body, out)
        case RateSet():
            state.guards.level.restart(body.step, at=body.step)
        case ClipSet(card=None):
            state.guards.cap = body.norm
    return None


def _rewound(state: State, body: Rewound, out: Emission) -> tuple[Reading, ...] | None:
    """A good state is in the trunk: signals begin anew, and cards that were made against what was lost end."""
    guards = state.guards
    guards.rewound_at, guards.rewound_to = body.step, body.to_step
    guards.skipped = 0
    guards.level.restart(body.step, at=body.to_step)
    why = f"the trunk went back to its state of step {body.to_step}"
    state.adoptions += 1
    before, state.lineage = state.lineage, f"trunk:{state.adoptions}"
    lifecycle.grow(
        state, out, node=state.lineage, parents=(before,), role="trunk", card=None, verdict="rewound"
    )
    lifecycle.lose_lineage(state, why, out)
    return state.suite.reset(why)


def failed(state: State, body: CommandFailed, out: Emission) -> None:
    """There is no good state to go back to: where it was the loss that diverged, at least the rate is lowered."""
    if body.command != "rewind":
        return
    state.guards.skipped = 0
    factor = state.policy.safeguards.rate_factor
    if _acts(state) and state.guards.level.since is not None and factor < 1.0:
        out.command(SetLearningRate(factor=factor, why=f"the run diverged and cannot go back: {body.error}"))


def _acts(state: State) -> bool:
    return state.mode == "act" and state.started and not (state.trunk_ended or state.ended)


def _pending(state: State, *kinds: str) -> bool:
    return any(command.kind in kinds for command in state.pending.values())


def _levels_count(state: State) -> bool:
    """Losses that a user's own step returns need not be what its optimizer minimises, so that only NaN is certain there."""
    return state.run is not None and not state.run.own_step


def _not_finite(state: State, bad: int, why: str, out: Emission) -> None:
    policy = state.policy.safeguards
    if _may_rewind(state):
        _rewind(state, state.step - WIDTH, why, out)
    elif policy.rewind and bad >= policy.stop_after_nonfinite and not state.guards.stopped:
        state.guards.stopped = True
        out.command(StopRun(why=f"{why}, and going back did not help"))


def _diverged(state: State, out: Emission) -> None:
    level = state.guards.level
    if not _may_rewind(state):
        return
    assert level.since is not None
    why = (
        f"the median loss of {WIDTH} steps is {_shown(level.level)}, and was {_shown(level.lowest)}; far above for "
        f"{state.step - level.since} steps"
    )
    _rewind(state, level.sound_at - WIDTH, why, out)


def _may_rewind(state: State) -> bool:
    policy = state.policy.safeguards
    return (
        policy.rewind
        and state.guards.rewinds < policy.max_rewinds
        and not _pending(state, "rewind", "set_learning_rate")
    )


def _rewind(state: State, to_step: int, why: str, out: Emission) -> None:
    """Ask for it: further back and at a rate lowered by more, where the last time was not enough."""
    guards, policy = state.guards, state.policy.safeguards
    if guards.rewound_at is not None and guards.rewound_to is not None and to_step <= guards.rewound_at:
        to_step = guards.rewound_to - 1
    soon = guards.rewound_at is not None and state.step - guards.rewound_at <= state.planning_budget
    guards.in_a_row = guards.in_a_row + 1 if soon else 1
    guards.rewinds += 1
    factor = policy.rate_factor**guards.in_a_row
    out.command(Rewind(to_step=max(0, to_step), rate_factor=factor, why=why))


def _cap(state: State, out: Emission) -> None:
    """Cap the gradient norm while spikes come in bursts, and lift the cap when they have ended."""
    guards, suite, policy = state.guards, state.suite, state.policy
    if _pending(state, "set_clip"):
        return
    if guards.cap is not None and not suite.burst.active:
        out.command(SetClip(norm=None, why="no burst of spikes is going on any more"))
    if guards.cap is not None or not policy.safeguards.clip or guards.clips >= policy.safeguards.max_clips:
        return
    ceiling = suite.grad_norm_z.ceiling
    if suite.burst.active and ceiling is not None and 0.0 < ceiling < LARGEST_CAP:
        guards.clips += 1
        out.command(
            SetClip(
                norm=float(f"{ceiling:.6g}"),
                why=f"{suite.burst.recent} spikes within {suite.burst.window} steps; the cap is what was ordinary before",
            )
        )


def _shown(level: float) -> str:
    return f"{exp(level):.4g}" if level < 700.0 else "beyond all numbers"
