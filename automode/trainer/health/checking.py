"""Running health checks: each on its own, timed, and without ever ending the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from automode.errors import AutomodeError
from automode.planner.controls import CHECKS, Check, CheckArguments, HealthChecked
from automode.trainer.health import activations, data_order, determinism, gradients, numerics, throughput
from automode.trainer.health.ground import Finding, Ground
from automode.trainer.loop import Loop
from automode.trainer.run_parts import RunParts

MADE_BY: Final[Mapping[Check, Callable[[Ground], Finding]]] = {
    "determinism": determinism.check,
    "gradients": gradients.check,
    "activations": activations.check,
    "numerics": numerics.check,
    "throughput": throughput.check,
    "data_order": data_order.check,
}


def checked(parts: RunParts, loop: Loop, asked: CheckArguments) -> Iterator[HealthChecked]:
    """Make one check, or all of them.

    Args:
        parts: The run.
        loop: Where it stands; rows must have been drained from the probe.
        asked: Which, and with how many batches.
    """
    ground = Ground(parts, loop, asked.steps)
    for name in CHECKS:
        if asked.what not in ("all", name):
            continue
        began = time.perf_counter()
        found = _made(MADE_BY[name], ground)
        yield HealthChecked(
            step=parts.trunk.step,
            check=name,
            verdict=found.verdict,
            why=found.why,
            seconds=time.perf_counter() - began,
            numbers=found.numbers,
            worst=found.worst,
        )


def _made(check: Callable[[Ground], Finding], ground: Ground) -> Finding:
    try:
        return check(ground)
    except AutomodeError as error:
        return Finding(verdict="unknown", why=str(error)[:1000])
    except Exception as error:  # the user's model and data do what they do
        return Finding(verdict="unknown", why=f"{type(error).__name__}: {error}"[:1000])
