from __future__ import annotations

import json
import math
from math import inf, isnan, nan
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from automode.errors import UsageError
from automode.planner.acceptance import (
    AlphaSpending,
    PairedSummary,
    judge,
    judge_moments,
    judge_summary,
    utility_classification,
)
from automode.planner.student_t import SIGNS, sign_tail, t_tail, upper_sign_quantile, upper_t_quantile

finite = st.floats(-1e6, 1e6, allow_nan=False)
samples = st.lists(finite, min_size=0, max_size=60)
alphas = st.floats(1e-6, 0.4)


# ------------------------------------------------------------------------------------------------ Student's t


@pytest.mark.parametrize("df", [0.7, 1, 1.5, 2, 3, 4.7, 10, 29, 100, 999, 9e4, 1.1e5, 3e7])
@pytest.mark.parametrize("alpha", [0.4, 0.05, 0.0304, 0.001, 1e-6])
def test_the_t_quantile_agrees_with_scipy(df: float, alpha: float) -> None:
    quantile = upper_t_quantile(alpha, df)
    assert quantile == pytest.approx(stats.t.isf(alpha, df), rel=1e-9)
    assert t_tail(quantile, df) == pytest.approx(alpha, rel=1e-7)


@pytest.mark.parametrize("df", [0.7, 1, 2, 5, 30, 1000])
@pytest.mark.parametrize("t", [-3.0, -0.1, 0.0, 1e-6, 0.3, 1.0, 2.5, 12.0, 300.0])
def test_the_t_tail_agrees_with_scipy(df: float, t: float) -> None:
    assert t_tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-10)


def test_the_t_tail_knows_the_infinities() -> None:
    assert t_tail(inf, 3.0) == 0.0
    assert t_tail(-inf, 3.0) == 1.0


@pytest.mark.parametrize(
    ("alpha", "df"), [(0.0, 3), (0.5, 3), (-1, 3), (nan, 3), (0.1, 0), (0.1, -2), (0.1, nan)]
)
def test_a_t_quantile_out_of_range_is_refused(alpha: float, df: float) -> None:
    with pytest.raises(UsageError, match=r"alpha|df"):
        upper_t_quantile(alpha, df)


@pytest.mark.parametrize(("t", "df"), [(nan, 3), (1.0, 0), (1.0, nan)])
def test_a_t_tail_out_of_range_is_refused(t: float, df: float) -> None:
    with pytest.raises(UsageError):
        t_tail(t, df)


# ---------------------------------------------------------------------------------------------------- utility


def test_the_utility_weighs_correctness_by_four_fifths_and_probability_by_one() -> None:
    utility = utility_classification([True, False, True], [1.0, 0.5, 0.25])
    assert utility.tolist() == pytest.approx([1.0, 0.1, 0.85])


def test_a_probability_that_could_not_be_computed_stays_nan() -> None:
    assert math.isnan(utility_classification([1], [nan])[0])


@pytest.mark.parametrize(
    ("correct", "p", "said"),
    [
        ([1, 0], [0.5], "shape"),
        ([2], [0.5], "only 0 and 1"),
        ([1], [1.5], "probability"),
        ([1], [-2.3], "probability"),
    ],
)
def test_utilities_of_the_wrong_kind_are_refused(correct: list[int], p: list[float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        utility_classification(correct, p)


# --------------------------------------------------------------------------------------------------- verdicts


def test_a_clear_gain_is_accepted_and_says_why() -> None:
    evidence = judge(np.random.default_rng(0).normal(0.5, 1.0, 400), alpha=0.03)
    assert evidence.accepted
    assert evidence.z > evidence.threshold > 1.8
    assert evidence.lower > 0.0
    assert "better than the control" in evidence.why
    assert "400" in evidence.why


def test_a_clear_loss_is_rejected() -> None:
    evidence = judge(np.random.default_rng(0).normal(-0.5, 1.0, 400), alpha=0.03)
    assert evidence.verdict == "rejected"
    assert evidence.z <= -1.64


def test_a_gain_that_noise_could_explain_is_inconclusive() -> None:
    evidence = judge([1.0, -1.0, 1.0, -0.9], alpha=0.05)
    assert evidence.verdict == "inconclusive"
    assert "not shown to be better" in evidence.why


@pytest.mark.parametrize(
    "differences",
    [[], [1.0], [0.1] * 50, [0.0] * 50, [1.0, nan, 2.0, 3.0], [1.0, inf, 2.0], [1e-3 + 0.1] * 1000],
)
def test_no_evidence_is_never_accepted(differences: list[float]) -> None:
    evidence = judge(differences, alpha=0.4)
    assert evidence.verdict == "inconclusive"
    assert math.isnan(evidence.z)
    assert "control is kept" in evidence.why


@given(samples, alphas, st.integers(0, 59), st.sampled_from([nan, inf, -inf]))
def test_one_difference_that_is_not_finite_prevents_acceptance(
    values: list[float], alpha: float, at: int, bad: float
) -> None:
    values.insert(min(at, len(values)), bad)
    assert judge(values, alpha=alpha).verdict == "inconclusive"


@given(samples, alphas)
def test_changing_the_sign_changes_the_sign_of_everything(values: list[float], alpha: float) -> None:
    there, back = judge(values, alpha=alpha), judge([-v for v in values], alpha=alpha)
    if math.isnan(there.z):
        assert math.isnan(back.z)
    else:
        assert back.z == pytest.approx(-there.z)
        assert back.mean == pytest.approx(-there.mean)
        assert back.lower == pytest.approx(-there.upper)
        assert back.threshold == there.threshold
    assert not (there.accepted and back.accepted)


@given(
    st.integers(2, 10_000),
    finite,
    st.floats(0.0, 1e3),
    st.floats(1e-6, 1e6),
    alphas,
)
def test_a_larger_mean_never_makes_a_verdict_worse(
    n: int, mean: float, more: float, variance: float, alpha: float
) -> None:
    assume(PairedSummary(n=n, mean=mean, variance=variance).sound)
    assume(PairedSummary(n=n, mean=mean + more, variance=variance).sound)
    order = {"rejected": 0, "inconclusive": 1, "accepted": 2}
    less = judge_moments(mean, variance, n, alpha=alpha)
    larger = judge_moments(mean + more, variance, n, alpha=alpha)
    assert order[larger.verdict] >= order[less.verdict]


@given(samples, alphas, st.integers(1, 50))
def test_more_candidates_never_make_it_easier(values: list[float], alpha: float, n: int) -> None:
    one, many = judge(values, alpha=alpha), judge(values, alpha=alpha, n_candidates=n)
    assert many.threshold >= one.threshold
    assert one.accepted or not many.accepted


@given(samples, alphas)
def test_the_verdict_is_a_function_of_the_sums(values: list[float], alpha: float) -> None:
    masks = {"even": np.arange(len(values)) % 2 == 0}
    direct = judge(values, alpha=alpha, slices=masks)
    d = np.array(values)
    again = judge_summary(
        PairedSummary.of(d), alpha=alpha, slices={"even": PairedSummary.of(d[masks["even"]])}
    )
    assert repr(direct) == repr(again)


def test_sums_by_welford_give_the_same_summary() -> None:
    d = np.random.default_rng(3).normal(0.1, 1.0, 500)
    mean, m2 = 0.0, 0.0
    for n, x in enumerate(d.tolist(), 1):
        step = x - mean
        mean += step / n
        m2 += step * (x - mean)
    told, own = PairedSummary.from_sums(500, mean, m2), PairedSummary.of(d)
    assert (told.mean, told.variance) == pytest.approx((own.mean, own.variance))
    assert PairedSummary.from_sums(0, 0.0, 0.0).z() != 0.0


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_two_groups_joined_are_summarised_as_one(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    here, there = rng.normal(1.0, 2.0, n), rng.normal(-3.0, 0.5, m)
    joined, whole = (
        PairedSummary.of(here).joined(PairedSummary.of(there)),
        PairedSummary.of(np.concatenate([here, there])),
    )
    assert joined.n == whole.n
    assert joined.mean == pytest.approx(whole.mean, nan_ok=True)
    assert joined.variance == pytest.approx(whole.variance, nan_ok=True, abs=1e-12)


@pytest.mark.no_cover
def test_the_false_acceptance_rate_under_the_null_is_alpha() -> None:
    # 6000 normal null data sets of 60: with the effective df the true rate is at most alpha = 0.05; 390 acceptances
    # (5.3 standard deviations above 300) or more have probability below 1e-6.
    rng = np.random.default_rng(11)
    d = rng.standard_normal((6000, 60))
    accepted = sum(judge(row, alpha=0.05).accepted for row in d)
    assert 150 < accepted < 390


@pytest.mark.no_cover
@pytest.mark.parametrize("flips", [0.003, 0.006, 0.015])
def test_few_samples_that_differ_do_not_look_like_many(flips: float) -> None:
    # 3000 null data sets of 1000 samples, of which only a handful differ, by +-0.8 at equal odds. At alpha = 0.05 more than 210
    # acceptances (5 sd above 150) have probability below 1e-6. With n - 1 degrees of freedom 0.003 fails this test.
    rng = np.random.default_rng(5)
    accepted = 0
    for _ in range(3000):
        d = np.where(rng.random(1000) < flips, rng.choice([-0.8, 0.8], 1000), 0.0)
        accepted += judge(d, alpha=0.05).accepted
    assert accepted < 210


def test_three_flips_for_the_better_are_no_proof() -> None:
    d = [0.8] * 3 + [0.0] * 997
    assert judge(d, alpha=0.05).verdict == "inconclusive"
    naive = PairedSummary.of(d)
    assert judge_moments(naive.mean, naive.variance, naive.n, alpha=0.05).accepted


# ----------------------------------------------------------------------------------------------------- slices


def better(n: int = 400) -> np.ndarray:
    return np.random.default_rng(2).normal(1.0, 1.0, n)


def test_a_slice_made_significantly_worse_prevents_acceptance() -> None:
    d = better()
    d[:40] -= 3.0
    evidence = judge(d, alpha=0.03, slices={"night": np.arange(40), "day": np.arange(40, 400)})
    assert evidence.verdict == "inconclusive"
    assert evidence.slices["night"].worse
    assert not evidence.slices["day"].worse
    assert "night" in evidence.why
    assert judge(d, alpha=0.03).accepted


def test_a_slice_exactly_at_its_threshold_is_not_worse() -> None:
    whole = PairedSummary(n=400, mean=1.0, variance=1.0)
    at = PairedSummary(n=100, mean=-0.164, variance=1.0)
    assert judge_summary(whole, alpha=0.03, slices={"s": at}, slice_z=-at.z()).accepted
    assert not judge_summary(whole, alpha=0.03, slices={"s": at}, slice_z=1.6).accepted


def test_an_overall_z_exactly_at_the_threshold_is_accepted() -> None:
    summary = PairedSummary(n=50, mean=0.3, variance=1.0)
    z = summary.z()
    assert judge_summary(summary, alpha=0.4, least_z=z).accepted
    assert not judge_summary(summary, alpha=0.4, least_z=math.nextafter(z, inf)).accepted


@pytest.mark.parametrize(
    ("part", "worse"),
    [
        (PairedSummary(n=0, mean=nan, variance=nan), False),
        (PairedSummary(n=1, mean=-5.0, variance=0.0), False),
        (PairedSummary(n=1, mean=nan, variance=nan), True),
        (PairedSummary(n=30, mean=nan, variance=nan), True),
        (PairedSummary(n=30, mean=0.0, variance=0.0), False),
        (PairedSummary(n=30, mean=-0.1, variance=0.0), True),
        (PairedSummary(n=30, mean=0.1, variance=0.0), False),
    ],
)
def test_slices_without_a_z_are_judged_on_the_safe_side(part: PairedSummary, worse: bool) -> None:
    evidence = judge_summary(PairedSummary(n=400, mean=1.0, variance=1.0), alpha=0.03, slices={"s": part})
    assert evidence.slices["s"].worse is worse
    assert evidence.accepted is not worse


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ([0, 400], "outside"),
        ([-1], "outside"),
        ([1, 1], "twice"),
        ([True, False], "mask"),
        ([0.5], "indices"),
    ],
)
def test_a_slice_that_points_at_no_sample_is_refused(which: list[float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        judge(better(), alpha=0.05, slices={"s": which})


def test_an_empty_slice_is_allowed_and_judged_by_nothing() -> None:
    assert judge(better(), alpha=0.05, slices={"s": []}).accepted


# ------------------------------------------------------------------------------------------------- parameters


def test_a_tolerated_loss_makes_acceptance_easier_and_a_demanded_gain_harder() -> None:
    summary = PairedSummary(n=100, mean=0.1, variance=1.0)
    verdicts = [judge_summary(summary, alpha=0.05, delta=d).verdict for d in (0.2, 0.0, -0.5)]
    assert verdicts == ["accepted", "inconclusive", "rejected"]


@pytest.mark.parametrize(
    "changed",
    [
        {"alpha": 0.0},
        {"alpha": 0.7},
        {"n_candidates": 0},
        {"slice_z": -1.0},
        {"delta": nan},
        {"least_z": inf},
    ],
)
def test_impossible_parameters_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        judge([1.0, 2.0, 3.0], **{"alpha": 0.05, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("d", [[[1.0, 2.0]], 3.0])
def test_differences_of_another_shape_are_refused(d: object) -> None:
    with pytest.raises(UsageError, match="shape"):
        PairedSummary.of(d)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "variance"), [(-1, 0.0), (3, -1.0)])
def test_impossible_summaries_are_refused(n: int, variance: float) -> None:
    with pytest.raises(UsageError, match="impossible"):
        PairedSummary(n=n, mean=0.0, variance=variance)


@given(st.lists(st.floats(-1e150, 1e150), min_size=1, max_size=40))
def test_the_effective_number_lies_between_one_and_n(values: list[float]) -> None:
    with np.errstate(over="ignore"):
        effective = PairedSummary.of(values).effective_n
    assert effective is None or 1.0 - 1e-9 <= effective <= len(values) + 1e-9


def chance_of_acceptance(differing: int, alpha: float, *, effective: bool) -> float:
    """Exact probability that signs drawn by a fair coin are accepted, where so many of 1000 samples differ by 1."""
    total = 0.0
    for better in range(differing + 1):
        d = np.zeros(1000)
        d[:better], d[better:differing] = 1.0, -1.0
        s = PairedSummary.of(d)
        seen = s if effective else PairedSummary(n=s.n, mean=s.mean, variance=s.variance)
        if judge_summary(seen, alpha=alpha).accepted:
            total += math.comb(differing, better) / 2.0**differing
    return total


@given(
    st.lists(st.floats(1e-3, 1.0) | st.sampled_from([0.8, 1.0]), min_size=4, max_size=12),
    st.sampled_from([0.16, 0.05, 0.03, 0.008]),
)
def test_no_sizes_of_differences_make_random_signs_pass_more_often_than_alpha(
    sizes: list[float], alpha: float
) -> None:
    """Enumerated over all signs: exact for these sizes."""
    d = np.array(sizes)
    signs = 1 - 2 * ((np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1)
    sums, squares = signs @ d, float((d**2).sum())
    x = -NormalDist().inv_cdf(alpha / SIGNS)
    assert (sums >= x * np.sqrt(squares) * (1 + 1e-9)).mean() <= alpha
    needed = upper_sign_quantile(alpha, d.size)
    for passed, row in zip(sums >= x * np.sqrt(squares), signs[:64] * d, strict=False):
        z = PairedSummary.of(row).z()
        assert isnan(z) or passed == (z >= needed) or z == pytest.approx(needed, rel=1e-6)


def test_a_gain_on_all_samples_is_seen_behind_a_few_that_outweigh_them() -> None:
    rng = np.random.default_rng(5)
    d = rng.normal(0.02, 0.01, 175)
    d[:2] = 0.8
    found = judge(d, alpha=0.03)
    assert found.verdict == "accepted"
    assert found.p_value <= 0.03
    assert upper_t_quantile(0.03, PairedSummary.of(d).degrees_of_freedom) > found.z > found.threshold


@given(st.floats(0.001, 0.4), st.integers(20, 5000))
def test_what_random_signs_need_has_that_tail(alpha: float, n: int) -> None:
    assert sign_tail(upper_sign_quantile(alpha, n), n) == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize(("alpha", "n"), [(0.0, 10), (0.5, 10), (0.05, 1)])
def test_random_signs_of_nothing_are_refused(alpha: float, n: int) -> None:
    with pytest.raises(UsageError, match="the value of"):
        upper_sign_quantile(alpha, n)


@pytest.mark.no_cover
def test_few_differing_samples_are_not_taken_for_many() -> None:
    # Enumerated, no chance involved. What is left above alpha is the coarseness of whole signs, and shrinks from look to look.
    worst: dict[bool, list[float]] = {True: [], False: []}
    for look in (1, 2, 3):
        alpha = AlphaSpending(0.05).alpha(look)
        for effective, found in worst.items():
            found.append(
                max(chance_of_acceptance(m, alpha, effective=effective) / alpha for m in range(2, 61))
            )
    assert worst[False] == pytest.approx([2.06, 2.06, 1.73], abs=0.01)
    assert worst[True] == pytest.approx([1.24, 1.08, 0.98], abs=0.01)


# --------------------------------------------------------------------------------------------- alpha spending


@given(st.floats(1e-6, 0.49), st.integers(1, 3000))
def test_the_looks_never_spend_more_than_the_total(total: float, looks: int) -> None:
    spending = AlphaSpending(total)
    alphas = [spending.spend() for _ in range(looks)]
    assert math.fsum(alphas) < total
    assert alphas == sorted(alphas, reverse=True)
    assert spending.spent == pytest.approx(math.fsum(alphas))


def test_infinitely_many_looks_spend_the_total() -> None:
    spending = AlphaSpending(0.05)
    # The rest of sum 1/i^2 after N terms is about 1/N.
    spent = math.fsum(spending.alpha(i) for i in range(1, 20_001))
    assert spent == pytest.approx(0.05 * (1.0 - 6.0 / math.pi**2 / 20_000), rel=1e-6)


def test_alpha_spending_goes_on_from_its_state() -> None:
    spending = AlphaSpending(0.04)
    spending.spend()
    spending.spend()
    again = AlphaSpending.from_state(json.loads(json.dumps(spending.state())))
    assert again.spend() == spending.spend()
    assert again.looks == 3


@pytest.mark.parametrize("total", [0.0, 0.5, -0.1, nan])
def test_an_impossible_total_is_refused(total: float) -> None:
    with pytest.raises(UsageError, match="total"):
        AlphaSpending(total)


def test_looks_are_counted_from_one() -> None:
    with pytest.raises(UsageError, match="counted from 1"):
        AlphaSpending().alpha(0)


@pytest.mark.no_cover
def test_a_session_of_cards_that_are_no_better_keeps_its_control() -> None:
    # 400 sessions of 20 looks; one accepts anything with probability at most 0.05. 45 or more (5.7 sd above 20) of them
    # have probability below 1e-6.
    rng = np.random.default_rng(7)
    misled = 0
    for _ in range(400):
        spending = AlphaSpending(0.05)
        misled += any(judge(d, alpha=spending.spend()).accepted for d in rng.standard_normal((20, 100)))
    assert misled < 45
