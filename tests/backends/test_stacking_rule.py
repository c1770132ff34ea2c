"""When stacking pays: the rule, and the compiler that has to prove itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from automode.backends import graph_compiling, stacking_rule
from automode.backends.graph_compiling import compiled
from automode.backends.stacked_gradients import Graph


def graph_of(function: Callable[..., Any], rows: int = 8, **how: Any) -> Graph:
    module = make_fx(function)(torch.ones(3))
    return Graph(run=module, module=module, rows=rows, **{"made_in": 0.2, **how})


def too_short(members: int, steps: int, seconds: float, tensors: int, *, recorded: bool = False) -> bool:
    return stacking_rule.why_too_short(members, steps, seconds, tensors, recorded=recorded) is not None


def test_a_rung_must_repay_the_recording_of_a_graph() -> None:
    assert "no other trial" in str(stacking_rule.why_too_short(1, 10_000, 1.0, 4, recorded=True))
    assert "16 x 20 steps take 0.096 s" in str(stacking_rule.why_too_short(16, 20, 3e-4, 4, recorded=False))
    assert too_short(4, 100, 3e-4, 4)
    assert not too_short(4, 100, 3e-4, 4, recorded=True)
    assert not too_short(16, 1000, 3e-4, 4)
    assert too_short(16, 20, 3e-3, 27)
    assert not too_short(16, 200, 3e-3, 27)


def test_a_step_that_is_arithmetic_alone_is_not_worth_a_stack_however_long_the_rung() -> None:
    assert not too_short(8, 1000, 2e-3, 6)
    assert too_short(8, 20, 0.5, 6)
    assert too_short(8, 1000, 0.5, 6)


def test_a_group_must_have_been_seen_to_save_time() -> None:
    assert stacking_rule.why_slower(0.9, 4, 0.25) is None
    assert "1e+03 ms one after another" in str(stacking_rule.why_slower(0.96, 4, 0.25))


def test_a_kept_graph_is_filled_up_only_where_idle_rows_cost_less_than_a_new_graph() -> None:
    graph = graph_of(torch.exp, rows=8, made_in=0.2, step_seconds=1e-3)
    assert stacking_rule.pads(graph, 8, 10**9)
    assert stacking_rule.pads(graph, 6, 500)
    assert not stacking_rule.pads(graph, 6, 5000)
    assert not stacking_rule.pads(graph, 3, 1)
    graph.step_seconds = None
    assert not stacking_rule.pads(graph, 7, 1)


def test_a_stack_is_made_anew_once_half_of_it_is_idle_and_steps_enough_are_left() -> None:
    assert stacking_rule.should_restack(16, 8, 5000, 1e-3, 3e-4, 0.2)
    assert not stacking_rule.should_restack(16, 8, 200, 1e-3, 3e-4, 0.2)
    assert not stacking_rule.should_restack(16, 9, 5000, 1e-3, 3e-4, 0.2)


def test_compiling_waits_for_a_rung_that_repays_it_three_times() -> None:
    assert not stacking_rule.should_compile(60, 1000, 1e-3)
    assert stacking_rule.should_compile(60, 200_000, 1e-3)
    assert not stacking_rule.should_compile(470, 20_000, 2e-2)
    assert stacking_rule.should_compile(470, 50_000, 2e-2)


# The compiler itself is played by functions: what matters is that nothing is believed before it was tried.


def slow(x: Tensor) -> tuple[Tensor, ...]:
    for _ in range(300):
        x = x + 0.0
    return (x.exp(),)


@pytest.mark.parametrize(
    ("made", "said", "used"),
    [
        (lambda x: (x.exp(),), "compiled in", True),
        (lambda x: (x.exp() * 1.01,), "other numbers", False),
        (lambda x: (x.exp() * torch.nan,), "other numbers", False),
        (lambda x: slow(slow(x)[0].log()), "ms as it was", False),
        (RuntimeError("no compiler here"), "RuntimeError: no compiler here", False),
    ],
)
def test_compiled_code_is_used_only_if_it_is_right_and_faster(
    made: Any, said: str, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(module: Any, **how: Any) -> Callable[..., Sequence[Tensor]]:
        if isinstance(made, Exception):
            raise made
        function: Callable[..., Sequence[Tensor]] = made
        return function

    monkeypatch.setattr(graph_compiling.torch, "compile", play)
    graph = graph_of(slow)
    plain = graph.run
    assert said in compiled(graph, [torch.ones(3)])
    assert graph.compiled is used
    assert (graph.run is not plain) is used


def test_a_graph_that_draws_random_numbers_is_not_compiled() -> None:
    graph = graph_of(slow, random=True)
    assert "random numbers" in compiled(graph, [torch.ones(3)])
    assert graph.compiled is False
