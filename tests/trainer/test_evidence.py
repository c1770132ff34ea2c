"""Paired differences where a network has no finite score: a broken control cannot outlive a sound candidate, nor the other way round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.planner.acceptance import judge_summary
from automode.planner.paired import PairedSummary
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.evidence import Evidence

N = 40


def scores(utility: Any) -> PerSampleScores:
    values = np.asarray(utility, dtype=np.float64)
    return PerSampleScores(ids=np.arange(values.size), loss=-values, utility=values)


def verdict(candidate: Any, control: Any) -> str:
    evidence = Evidence(SimpleNamespace(), SimpleNamespace(), {"first": np.arange(N // 2)})  # type: ignore[arg-type]
    group, slices = evidence.paired(scores(candidate), scores(control))
    return judge_summary(
        PairedSummary(n=group.n, mean=group.mean, variance=group.variance, effective_n=group.effective_n),
        alpha=0.05,
        slices={
            k: PairedSummary(n=s.n, mean=s.mean, variance=s.variance, effective_n=s.effective_n)
            for k, s in slices.items()
        },
    ).verdict


SOUND = -np.linspace(0.1, 0.4, N)


@pytest.mark.parametrize("broken", [np.nan, -np.inf])
@pytest.mark.parametrize("samples", [N, N // 2, 8])
def test_a_control_without_finite_scores_loses_to_a_candidate_that_has_them(
    broken: float, samples: int
) -> None:
    control = SOUND.copy()
    control[:: N // samples] = broken
    assert verdict(SOUND + 0.01, control) == "accepted"


@pytest.mark.parametrize("broken", [np.nan, -np.inf])
def test_a_candidate_without_finite_scores_is_never_adopted(broken: float) -> None:
    candidate = SOUND + 10.0
    candidate[3] = broken
    assert verdict(candidate, SOUND) == "inconclusive"
    assert verdict(candidate, np.full(N, np.nan)) == "inconclusive"


@given(
    st.lists(st.floats(-5.0, 5.0), min_size=N, max_size=N),
    st.lists(st.floats(-5.0, 5.0), min_size=N, max_size=N),
    st.sets(st.integers(0, N - 1), min_size=1),
)
def test_what_is_filled_in_is_never_more_than_the_finite_scores_would_give(
    candidate: list[float], control: list[float], lost: set[int]
) -> None:
    evidence = Evidence(SimpleNamespace(), SimpleNamespace(), {})  # type: ignore[arg-type]
    holed = np.array(control)
    holed[sorted(lost)] = np.nan
    group, _ = evidence.paired(scores(candidate), scores(holed))
    lowest = min([*candidate, *(v for i, v in enumerate(control) if i not in lost)])
    filled = np.where(np.isnan(holed), lowest, holed)
    assert group.mean == pytest.approx(float(np.mean(np.array(candidate) - filled)), abs=1e-12)
