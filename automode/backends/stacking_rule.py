"""When training several members together pays: estimated before anything is made, measured once it runs.

What stacking saves is the cost of calling small operations: on one CPU thread a step of a network of a few thousand weights is
four fifths overhead, and 16 members cost little more than one; where a step is bound by arithmetic, little is saved. What it
costs is recording a graph, once for each kind and number of members. So a group is stacked only when its rung is long enough to
repay the recording, its first steps are timed against the members' own, and it is taken apart again where they are not faster:
a group is never slower than its members one after another by more than those few steps and the recording.
"""

from __future__ import annotations

from automode.backends.stacked_gradients import Graph

FEWEST_MEMBERS = 2
WARM_UP_STEPS = 4
"""Steps that every member takes alone at first: they train as any other, and tell what a step costs alone."""

CHECK_STEPS = 3
"""Steps of every member that making a stack takes: recorded, run for the check, and compared."""

TRACE_SECONDS = 0.05
TRACE_SECONDS_PER_TENSOR = 0.04
"""What recording a graph takes, about; measured .07 s (4 tensors) to 1 s (27) on one CPU thread."""

CALL_SECONDS_PER_TENSOR = 8e-5
"""What a step spends on calling operations, for each parameter tensor, about: forward, backward and update; the rest is
arithmetic. Measured .3 ms of .36 (4 tensors, 700 weights), .5 of 1.8 (6 tensors, 85 000 weights)."""

MOST_SAVING = 0.8
"""Share of the members' own time that a stack saves where a step is nothing but calls."""

LEAST_SAVING = 0.05
"""Share that it must have been seen to save."""

COMPILE_SECONDS = 10.0
COMPILE_SECONDS_PER_NODE = 0.12
COMPILE_SAVING = 0.3
COMPILE_MARGIN = 3.0
"""Compiling took 4 to 24 s (60 operations) and 37 to 62 s (470); what it saves is known only then (a transformer's step 40 %,
others nothing). With a third saved it must repay itself this many times; without, it has cost a tenth of what was left."""


def why_too_short(
    members: int, steps: int, step_seconds: float, tensors: int, *, recorded: bool
) -> str | None:
    """Tell why a group is not worth stacking, before anything is made for it.

    Args:
        members: How many there are.
        steps: Steps left to the rung.
        step_seconds: What a step of one of them takes alone.
        tensors: Parameter tensors of the network.
        recorded: Whether graphs were kept, one of which may fit.
    """
    if members < FEWEST_MEMBERS:
        return "no other trial is like it"
    alone = members * steps * step_seconds
    saved = alone * min(MOST_SAVING, CALL_SECONDS_PER_TENSOR * tensors / step_seconds)
    recording = 0.0 if recorded else TRACE_SECONDS + TRACE_SECONDS_PER_TENSOR * tensors
    if saved <= recording + CHECK_STEPS * members * step_seconds:
        return (
            f"{members} x {steps} steps take {alone:.2g} s one after another, of which stacking would save about "
            f"{saved:.2g} s, too little to repay preparing it"
        )
    return None


def why_slower(stacked: float, members: int, step_seconds: float) -> str | None:
    """Tell why a group is taken apart, from a measured stacked step; None where it saves enough."""
    alone = members * step_seconds
    if stacked <= (1.0 - LEAST_SAVING) * alone:
        return None
    return f"a step of {members} together took {1e3 * stacked:.3g} ms, and {1e3 * alone:.3g} ms one after another"


def pads(graph: Graph, members: int, steps: int) -> bool:
    """Whether a kept graph for more rows is better filled up than a new one made."""
    if graph.rows == members:
        return True
    if graph.rows > 2 * members or graph.step_seconds is None:
        return False
    return graph.step_seconds * (1.0 - members / graph.rows) * steps < graph.made_in


def should_restack(
    rows: int, members: int, steps: int, stacked: float, step_seconds: float, recording: float
) -> bool:
    """Whether a stack that has lost members is better made anew for those left than carried on with idle rows."""
    if members > rows // 2:
        return False
    smaller = stacked * max(0.4, members / rows)
    return steps * (min(stacked, members * step_seconds) - smaller) > 2.0 * recording


def should_compile(nodes: int, steps: int, stacked: float) -> bool:
    """Whether compiling a graph would repay itself several times over the steps left."""
    took = COMPILE_SECONDS + COMPILE_SECONDS_PER_NODE * nodes
    return COMPILE_SAVING * steps * stacked > COMPILE_MARGIN * took
