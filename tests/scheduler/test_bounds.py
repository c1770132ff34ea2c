"""The worst case bounds every order of arrival and is reached by one; a ladder is shrunk to what fits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import UsageError
from automode.scheduler import ASHA, Ladder, LadderFit, NoFit, fit_ladder, worst_case_resource


def spend(asha: ASHA, values: tuple[int, ...]) -> int:
    """Run on one worker; each trial reports its own constant value at every rung."""
    while (job := asha.next()) is not None:
        asha.report(job.trial, job.to_resource, float(values[job.trial]), attempt=job.attempt)
    return asha.spent


@pytest.mark.parametrize("quota", [False, True])
@pytest.mark.parametrize(
    ("count", "eta"), [(1, 2), (2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (5, 3), (6, 3), (6, 4)]
)
def test_the_worst_order_of_all_reaches_the_bound_and_none_exceeds_it(
    count: int, eta: int, quota: bool
) -> None:
    ladder = Ladder(1, eta * eta, eta)
    bound = worst_case_resource(count, ladder, quota=quota, retries=0)
    spent = [
        spend(ASHA(1, eta * eta, eta, candidates=count, quota=quota), order)
        for order in itertools.permutations(range(count))
    ]
    assert max(spent) == bound


def test_known_bounds() -> None:
    ladder = Ladder(120, 1080, 3)
    # 3 variants: 3 x 120, then one goes to 360 and on to 1080; one repeat of the longest segment, 720.
    assert worst_case_resource(3, ladder) == 3 * 120 + 240 + 720 + 720
    assert worst_case_resource(3, ladder, retries=0) == 3 * 120 + 240 + 720
    assert worst_case_resource(32, Ladder(1, 256, 4), quota=True, retries=0) == 32 + 8 * 3 + 2 * 12 + 48 + 192


def test_one_repeat_of_any_segment_is_covered() -> None:
    for failing in range(7):
        asha = ASHA(1, 4, 2, candidates=4)
        issued = 0
        while (job := asha.next()) is not None:
            if issued == failing and job.attempt == 1:
                asha.failed(job.trial, job.attempt)
            else:
                asha.report(job.trial, job.to_resource, -float(job.trial), attempt=job.attempt)
            issued += 1
        assert asha.spent <= worst_case_resource(4, asha.ladder)


@given(
    count=st.integers(1, 40),
    low=st.integers(1, 20),
    extra=st.integers(0, 500),
    eta=st.integers(2, 5),
    cap=st.integers(0, 5000),
    quota=st.booleans(),
)
def test_a_fitted_ladder_fits_and_is_the_largest_that_does(
    count: int, low: int, extra: int, eta: int, cap: int, quota: bool
) -> None:
    asked = Ladder(low, low + extra, eta)
    fit = fit_ladder(count, asked, cap, quota=quota)
    if isinstance(fit, NoFit):
        assert fit.needed == worst_case_resource(count, Ladder(low, low, eta), quota=True) > cap
        assert "cap" in fit.reason
        return
    assert isinstance(fit, LadderFit)
    assert fit.worst_case == worst_case_resource(count, fit.ladder, quota=fit.quota) <= cap
    assert (fit.ladder.min_resource, fit.ladder.reduction_factor) == (low, eta)
    assert fit.shrunk == (fit.ladder != asked or fit.quota != quota)
    if fit.ladder.max_resource < asked.max_resource:
        higher = Ladder(low, fit.ladder.max_resource + 1, eta)
        assert worst_case_resource(count, higher, quota=True) > cap


def test_what_fits_is_left_alone() -> None:
    ladder = Ladder(1, 27, 3)
    cap = worst_case_resource(9, ladder)
    assert fit_ladder(9, ladder, cap) == LadderFit(ladder=ladder, quota=False, worst_case=cap, shrunk=False)
    tight = fit_ladder(9, ladder, cap - 1)
    assert isinstance(tight, LadderFit)
    assert (tight.ladder, tight.quota, tight.shrunk) == (ladder, True, True)


def test_what_is_no_count_is_refused() -> None:
    with pytest.raises(UsageError, match="candidates is 0"):
        worst_case_resource(0, Ladder(1, 4, 2))
    with pytest.raises(UsageError, match="cap is -1"):
        fit_ladder(3, Ladder(1, 4, 2), -1)
