"""Averages of states: identities, bounds, and what is never averaged."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from automode.errors import MergeError
from automode.merges.averages import interpolate, swa, uniform, weighted

State = dict[str, Tensor]


def random_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": (torch.randn(5, 3, generator=generator) * 10).to(dtype),
        "b": torch.randn((), generator=generator).to(dtype),
        "count": torch.tensor(seed % 97),
        "mask": torch.tensor([bool(seed % 2), True]),
    }


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_every_element_lies_within_the_members_bounds(
    seeds: list[int], dtype: torch.dtype, data: st.DataObject
) -> None:
    states = [random_state(seed, dtype) for seed in seeds]
    weights = data.draw(
        st.lists(st.floats(0, 1e6), min_size=len(seeds), max_size=len(seeds)).filter(lambda w: sum(w) > 1e-3)
    )
    for merged in (uniform(states), weighted(states, weights)):
        for key in ("a.weight", "b"):
            stacked = torch.stack([state[key] for state in states])
            assert merged[key].dtype == dtype
            assert bool((merged[key] >= stacked.amin(0)).all())
            assert bool((merged[key] <= stacked.amax(0)).all())


@settings(max_examples=30, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=6), order=st.randoms(use_true_random=False)
)
def test_the_order_of_members_does_not_matter(seeds: list[int], order: object) -> None:
    states = [random_state(seed) for seed in seeds]
    shuffled = list(states)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = uniform(states, parent=states[0]), uniform(shuffled, parent=states[0])
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-6, atol=1e-7)


def test_rounding_in_double_precision_does_not_leave_the_bounds() -> None:
    low = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    high = torch.nextafter(low, torch.tensor(2.0, dtype=torch.float64))
    states = [{"w": low}] * 6 + [{"w": high}]
    for merged in (uniform(states), weighted(states, [0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1])):
        assert bool(((merged["w"] >= low) & (merged["w"] <= high)).all())


@pytest.mark.parametrize("copies", [1, 2, 3, 7])
def test_merging_copies_of_one_state_gives_it_back_bit_by_bit(copies: int) -> None:
    state = random_state(3)
    for merged in (
        uniform([state] * copies),
        swa([state] * copies),
        weighted([state] * copies, range(1, copies + 1)),
    ):
        for key, value in state.items():
            assert torch.equal(merged[key], value)
            assert merged[key].data_ptr() != value.data_ptr()


def test_a_weight_of_one_gives_that_member_even_beside_a_diverged_one() -> None:
    good, bad = random_state(1), random_state(2)
    bad["a.weight"] = torch.full((5, 3), float("nan"))
    assert torch.equal(weighted([good, bad], [1.0, 0.0])["a.weight"], good["a.weight"])


def test_infinities_that_all_members_share_survive() -> None:
    causal = torch.full((3, 3), float("-inf")).triu(1)
    states = [{"mask": causal.clone(), "w": torch.tensor([value])} for value in (1.0, 2.0, 6.0)]
    for merged in (
        uniform(states),
        swa(states),
        interpolate(states[0], states[1], 0.3),
        interpolate(*states[:2], 1.25),
    ):
        assert torch.equal(merged["mask"], causal)
    assert uniform(states)["w"].item() == 3.0


def test_a_diverged_member_is_named() -> None:
    good, bad = random_state(1), random_state(2)
    bad["a.weight"][0, 0] = float("nan")
    for merge in (
        lambda: uniform([good, bad]),
        lambda: swa([good, bad]),
        lambda: interpolate(good, bad, 1.1),
    ):
        with pytest.raises(MergeError, match=r"'a.weight' is not finite"):
            merge()


def test_integers_and_booleans_come_from_the_parent() -> None:
    states, parent = [random_state(seed) for seed in (10, 21)], random_state(33)
    merged = uniform(states, parent=parent)
    assert merged["count"].item() == 33
    assert torch.equal(merged["mask"], parent["mask"])
    assert swa(states)["count"].item() == 21


def test_inputs_are_never_written_to() -> None:
    states = [random_state(seed) for seed in (1, 2)]
    kept = [{key: value.clone() for key, value in state.items()} for state in states]
    uniform(states), swa(states), interpolate(*states, 0.5)
    for state, before in zip(states, kept, strict=True):
        assert all(torch.equal(state[key], before[key]) for key in state)


def test_the_ends_of_an_interpolation_are_exact() -> None:
    a, b = random_state(1), random_state(2)
    assert torch.equal(interpolate(a, b, 0.0)["a.weight"], a["a.weight"])
    assert torch.equal(interpolate(a, b, 1.0)["a.weight"], b["a.weight"])
    torch.testing.assert_close(
        interpolate(a, b, 1.25)["a.weight"], a["a.weight"] + 1.25 * (b["a.weight"] - a["a.weight"])
    )


def test_variances_never_extrapolate() -> None:
    a, b = nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict()
    b["running_var"] = torch.tensor([0.01, 9.0])
    assert torch.equal(interpolate(a, b, 2.0)["running_var"], b["running_var"])
    assert torch.equal(interpolate(a, b, -1.0)["running_var"], a["running_var"])


def test_swa_takes_a_generator_and_agrees_with_torchs_averaged_model() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    reference = AveragedModel(model)

    def snapshots() -> object:
        for _ in range(7):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            reference.update_parameters(model)
            yield model.state_dict()

    ours = swa(snapshots())  # type: ignore[arg-type]
    for key, value in reference.module.state_dict().items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_weights_that_cannot_be_normalised_are_refused(weights: list[float]) -> None:
    with pytest.raises(MergeError, match="weight"):
        weighted([random_state(1), random_state(2)], weights)


def test_nothing_to_average_is_refused() -> None:
    for merge in (lambda: uniform([]), lambda: swa(iter(()))):
        with pytest.raises(MergeError, match="nothing to"):
            merge()


def test_a_wild_interpolation_coefficient_is_refused() -> None:
    for t in (-1.5, 2.5, float("nan")):
        with pytest.raises(MergeError, match="interpolation coefficient"):
            interpolate(random_state(1), random_state(2), t)
