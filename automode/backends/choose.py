"""Which backend a run gets."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import nn

from automode.backends.away import Away, make_away
from automode.backends.base import Backend, SegmentRunner
from automode.backends.inline import InlineBackend
from automode.backends.stackability import DTYPES, why_network_alone
from automode.backends.stacked import SLOTS, StackedBackend
from automode.errors import UsageError

BackendName = Literal["auto", "inline", "stacked", "process", "ray"]

COPIES = 12
"""Copies of its parameters that an open member holds at the most: its own, a row of weights, gradient, two moments and scratch,
the optimizer's own two moments, three averages of its trajectory and one of its variant."""

MEMORY_SHARE = 0.125
"""Share of a device's memory that all open members together may take: of all memory on a CPU, of the free one on CUDA."""


def make_backend(
    name: str,
    runner: SegmentRunner,
    *,
    model: nn.Module | None = None,
    slots: int | None = None,
    away: Away | None = None,
) -> Backend:
    """Make the backend of a name.

    Args:
        name: ``inline`` (one trial after another), ``stacked`` (alike trials together), or ``auto``: stacked where copies of
            the network can be stacked and at least two fit into memory, and inline otherwise. ``process`` (worker processes on
            this machine) and ``ray`` (actors of a cluster) train beside the trunk.
        runner: Makes segments; for stacking, :class:`~automode.backends.base.StackableSegment` ones.
        model: The trunk's network, which ``auto`` looks at and slots are counted by.
        slots: Trials taken at once by ``stacked``, as many as fit into memory, 16 at the most, unless given; by ``process`` and
            ``ray``, 2 unless given.
        away: What ``process`` and ``ray`` are made from.

    Raises:
        UsageError: There is no backend of that name, or ``slots`` is given where one trial runs at a time, or an option is
            not the backend's.
        NotExecutableError: Workers cannot have what training needs; the inline backend can.
    """
    match name:
        case "inline":
            if slots not in (None, 1):
                raise UsageError(f"the inline backend runs one trial at a time, and slots is {slots}")
            return InlineBackend(runner)
        case "stacked":
            return StackedBackend(runner, slots=slots if slots is not None else fitting_slots(model))
        case "auto":
            fitting = slots if slots is not None else fitting_slots(model)
            if fitting < 2 or model is None or why_network_alone(model) is not None:
                return InlineBackend(runner)
            return StackedBackend(runner, slots=fitting)
        case "process" | "ray":
            if away is None:
                raise UsageError(f"the {name} backend trains elsewhere: say by `away` what its workers get")
            return make_away(name, away, slots=2 if slots is None else slots)
    known = ", ".join(repr(known) for known in get_args(BackendName))
    raise UsageError(f"there is no backend {name!r}; choose one of {known}")


def fitting_slots(model: nn.Module | None) -> int:
    """Count the members that fit into memory beside the run, 16 at the most and 1 at the least."""
    parameters = [] if model is None else [p for p in model.parameters() if p.dtype in DTYPES]
    size = COPIES * sum(p.numel() * p.element_size() for p in parameters)
    memory = _memory(parameters[0].device) if parameters else None
    if memory is None or size == 0:
        return SLOTS
    return max(1, min(SLOTS, int(MEMORY_SHARE * memory / size)))


def _memory(device: torch.device) -> int | None:
    """Bytes of a device's memory, free ones where it is CUDA; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows, and systems that do not count
        return None
