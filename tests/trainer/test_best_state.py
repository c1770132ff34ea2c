"""The best validated state: chosen by a mean over validations, kept apart from the trunk, and given back as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from automode.merges.trajectory import TrajectoryAverages
from automode.testing.bench import identical
from automode.trainer.best_state import BestState
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.steps import pair_step
from automode.trainer.trunk import Trunk, trainable

pytestmark = pytest.mark.torch


def make_trunk(*, averages: bool = True) -> Trunk:
    torch.manual_seed(0)
    model, loss, cpu = nn.Linear(3, 2), nn.CrossEntropyLoss(), torch.device("cpu")
    trunk = Trunk(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        scheduler=None,
        step_fn=pair_step(loss, cpu),
        loss_fn=loss,
        device=cpu,
    )
    if averages:
        trunk.averages = TrajectoryAverages(trainable(model), 100, every=1)
    return trunk


def move(trunk: Trunk, step: int) -> None:
    with torch.no_grad():
        for p in trunk.model.parameters():
            p.add_(1.0)
    assert trunk.averages is not None
    trunk.averages.update(trainable(trunk.model), step)


def scores(p: float, *, loss: float = 1.0) -> PerSampleScores:
    """Four samples with this probability of their class."""
    four = np.ones(4)
    return PerSampleScores(
        ids=np.arange(4), loss=loss * four, utility=p * four, correct=four, p_true=p * four, p_top=p * four
    )


def follow(best: BestState, trunk: Trunk, values: list[float]) -> list[Any]:
    seen = []
    for step, p in enumerate(values, start=1):
        move(trunk, step)
        best.note(step, scores(p))
        seen.append(best.step)
    return seen


def test_the_mean_over_three_validations_decides_and_not_the_luckiest() -> None:
    trunk = make_trunk()
    steps = follow(BestState(trunk, enabled=True), trunk, [0.2, 0.3, 0.4, 0.9, 0.3, 0.5, 0.5, 0.1])
    assert steps == [1, 2, 3, 4, 4, 6, 6, 6]


def test_what_is_kept_is_the_trunk_of_then_with_its_averages_and_training_on_does_not_reach_it() -> None:
    trunk = make_trunk()
    best = BestState(trunk, enabled=True)
    follow(best, trunk, [0.2, 0.8])
    then = {name: value.clone() for name, value in trunk.model.state_dict().items()}
    assert trunk.averages is not None
    averages = trunk.averages.candidates()
    for step in range(3, 9):
        move(trunk, step)
        best.note(step, scores(0.1))
    weights, rest = best.stored()
    assert best.step == rest["step"] == 2
    assert identical(weights, then)
    again = TrajectoryAverages(trainable(trunk.model), 100, every=1)
    again.load_state_dict(rest["averages"])
    assert all(identical(again.candidates()[name], averages[name]) for name in averages)


def test_it_survives_a_resume() -> None:
    trunk = make_trunk()
    best, other = BestState(trunk, enabled=True), BestState(trunk, enabled=True)
    follow(best, trunk, [0.2, 0.8, 0.7])
    other.load(best.state())
    assert identical(other.stored()[0], best.stored()[0])
    for one in (best, other):  # the mean goes on where it was
        one.note(4, scores(0.65))
    assert (best.step, other.step) == (4, 4)
    empty = BestState(trunk, enabled=True)
    other.load(empty.state())
    assert other.step is None
    other.note(5, scores(0.01))
    assert other.step == 5


def test_values_without_classes_are_compared_by_their_utility() -> None:
    trunk = make_trunk()
    best = BestState(trunk, enabled=True)
    for step, utility in enumerate([-3.0, -1.0, -5.0, -6.0], start=1):
        four = np.full(4, utility)
        best.note(step, PerSampleScores(ids=np.arange(4), loss=-four, utility=four))
    assert best.step == 2


def test_a_validation_that_is_not_finite_is_never_the_best_and_begins_the_mean_anew() -> None:
    trunk = make_trunk()
    best = BestState(trunk, enabled=True)
    best.note(1, scores(0.5, loss=float("nan")))
    assert best.step is None
    best.note(2, scores(0.2))
    best.note(3, scores(0.9, loss=float("inf")))
    best.note(4, scores(0.3))
    assert best.step == 4


@pytest.mark.parametrize(("enabled", "averages"), [(False, True), (True, False)])
def test_nothing_is_kept_where_nobody_asks_or_the_run_keeps_no_averages(
    enabled: bool, averages: bool
) -> None:
    best = BestState(make_trunk(averages=averages), enabled=enabled)
    best.note(1, scores(0.9))
    assert best.step is None


def test_where_the_trunk_is_replaced_the_mean_begins_anew_and_what_was_kept_stays() -> None:
    trunk = make_trunk()
    best = BestState(trunk, enabled=True)
    follow(best, trunk, [0.2, 0.8, 0.1, 0.1])
    best.replaced()
    assert best.step == 2
    best.note(5, scores(0.85))
    assert best.step == 5  # with the two of before in the mean it would not have been


def test_a_rollback_drops_what_was_kept_since_the_adoption_and_nothing_else() -> None:
    trunk = make_trunk()
    best = BestState(trunk, enabled=True)
    follow(best, trunk, [0.2, 0.8])
    best.rolled_back(2)
    assert best.step == 2
    best.note(3, scores(0.9))
    best.rolled_back(2)
    assert best.step is None
    assert best.stored() == ({}, {"step": None})
    best.note(4, scores(0.01))
    assert best.step == 4
