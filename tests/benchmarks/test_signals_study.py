"""The study of the signals: its scores and baselines on cases that can be told by hand, and its quick form from end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study(benchmark_modules: Callable[..., Any]) -> Any:
    return benchmark_modules(baselines="_study_baselines", scores="_study_scores")


def test_a_share_has_wilsons_interval(study: Any) -> None:
    assert study.scores.share(8, 10) == "8/10 = 0.800 [0.490, 0.943]"
    assert study.scores.share(0, 54) == "0/54 = 0.000 [0.000, 0.066]"
    assert study.scores.share(0, 0) == "none"


def test_the_truth_is_what_the_next_budget_brings(study: Any) -> None:
    probe = [1.0] * 81 + [0.5] * 40  # flat for 1600 steps, then halved
    drop = study.scores.gains(0, probe)
    assert drop[0] == 0.0
    assert drop[1600] == 0.5
    assert max(drop) == (len(probe) - 41) * 20
    assert study.scores.lasting(drop, 1600) == 0
    assert study.scores.lasting(dict.fromkeys(drop, 0.5), 1600) is None


@pytest.mark.parametrize(
    ("alarm", "false", "true", "found"), [(None, 0, 0, 0), (300, 0, 1, 1), (1590, 1, 0, 0)]
)
def test_a_first_alarm_is_judged_by_what_came(
    study: Any, alarm: int | None, false: int, true: int, found: int
) -> None:
    score = study.scores.Plateaus()
    score.add("run", 0, 1600, [1.0] * 81 + [0.5] * 40, alarm)
    assert (score.false, score.true, score.found, score.with_plateau) == (false, true, found, 1)


def test_alarms_close_together_are_one(study: Any) -> None:
    assert study.scores.merged([5, 7, 30, 41, 60]) == [5, 30, 60]


def test_the_baselines_alarm_where_their_sources_do(study: Any) -> None:
    rules = study.baselines
    flat = np.ones(2000)
    assert rules.reduce_on_plateau(flat) == 599  # the first mean is the best, and five more are not better
    assert rules.early_stopping(flat) == 400
    assert rules.averaged_patience(flat) == 439
    assert rules.no_trend(np.exp(0.1 * np.random.default_rng(0).standard_normal(2000)), 800, 0.01) is not None
    falling = np.linspace(1.0, 0.01, 2000)
    for rule in (rules.reduce_on_plateau, rules.early_stopping, rules.averaged_patience):
        assert rule(falling) is None
    spiked = flat.copy()
    spiked[500], spiked[600:605], spiked[700] = 11.0, 3.0, np.nan
    assert rules.megatron(spiked) == [500]
    assert 604 in rules.kill_loss_spike(spiked)
    noisy = spiked * np.exp(0.05 * np.random.default_rng(1).standard_normal(2000))
    assert {500, 700} <= set(rules.averaged_z(noisy))


@pytest.mark.slow
def test_the_quick_form_runs_to_its_end() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "signals_study.py"), "--quick"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    for part in (
        "Plateau: 3 segments",
        "False plateau within 1200 steps of a kick",
        "Spikes: 8 events",
        "NaN and infinity told at their own step: 2/2",
        "Slow divergence: 1 of 1 runs doubled",
    ):
        assert part in done.stdout
