"""Compiling a traced graph, for rungs that are long enough to wait for it.

Compiled code is taken into use only after it gave the graph's own numbers on the same inputs, and only where it is measurably
faster. On one CPU thread, for 16 members, it saved 40 % on a small transformer (after 37 to 62 s of compiling) and 10 % on a
perceptron bound by arithmetic, and was slower than the recorded graph on the smallest perceptron and on convolutions. The
optimizer's update stays outside of what is compiled (torch 2.13 drops an in-place addition to a 0-dimensional float64 input).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from automode.backends.stacked_gradients import TOLERANCES, Graph

TIMED_RUNS = 5
LEAST_SAVING = 0.1


def compiled(graph: Graph, inputs: list[Tensor]) -> str:
    """Compile a graph where that makes it faster; returns what came of it. The graph is marked as tried either way."""
    graph.compiled = False
    if graph.random:
        return "not compiled: its network draws random numbers, so that compiled numbers cannot be checked"
    import torch._inductor.config as inductor  # slow to load

    started = time.perf_counter()
    with torch.inference_mode():
        before = graph.run(*inputs)
        try:
            with ExitStack() as stack:
                # No worker processes that would outlive the training.
                stack.enter_context(inductor.patch(compile_threads=1))
                run: Callable[..., Sequence[Tensor]] = torch.compile(
                    graph.module, fullgraph=True, dynamic=False
                )
                after = run(*inputs)
        except Exception as error:  # no compiler here, or a graph that it does not take
            return (
                f"not compiled: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
            )
        took = time.perf_counter() - started
        if not _equal(before, after):
            return "not compiled: the compiled graph gave other numbers"
        plain, fast = (_fastest(function, inputs) for function in (graph.run, run))
    if fast > (1.0 - LEAST_SAVING) * plain:
        return f"not compiled: {1e3 * fast:.3g} ms a gradient compiled, {1e3 * plain:.3g} ms as it was"
    graph.run, graph.compiled = run, True
    return f"compiled in {took:.0f} s: {1e3 * fast:.3g} ms a gradient, {1e3 * plain:.3g} ms before"


def _equal(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    for a, b in zip(before, after, strict=True):
        scale = float(torch.linalg.vector_norm(a)) + 1e-30
        if not float(torch.linalg.vector_norm(a - b)) <= TOLERANCES[a.dtype] * scale:
            return False
    return True


def _fastest(function: Callable[..., object], inputs: list[Tensor]) -> float:
    best = float("inf")
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        function(*inputs)
        best = min(best, time.perf_counter() - started)
    return best
