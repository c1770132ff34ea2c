"""Greedy soups and Fisher-weighted averages."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.averages import uniform
from automode.merges.soups import fisher_average, greedy

State = dict[str, Tensor]


def vectors(*rows: list[float]) -> list[State]:
    return [{"w": torch.tensor(row)} for row in rows]


def random_states(seed: int, count: int) -> tuple[list[State], list[State]]:
    generator = torch.Generator().manual_seed(seed)
    states = [{"w": torch.randn(4, 3, generator=generator), "n": torch.tensor(i)} for i in range(count)]
    fishers = [{"w": torch.rand(4, 3, generator=generator) ** 4} for _ in range(count)]
    return states, fishers


def closeness(target: list[float]) -> object:
    return lambda state: -float((state["w"] - torch.tensor(target)).norm())


def test_a_greedy_soup_adds_what_helps_and_leaves_out_what_harms() -> None:
    candidates = vectors([2.0, 0.0], [0.0, 0.3], [-9.0, 9.0], [0.0, -0.3])
    soup = greedy(candidates, closeness([0.0, 0.0]))  # type: ignore[arg-type]
    assert soup.ingredients == (1, 3)
    assert soup.state["w"].abs().max().item() < 1e-7
    assert soup.evaluations == 4 + 3
    assert soup.score >= max(soup.single_scores)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6))
def test_a_greedy_soup_never_scores_below_its_best_candidate(seed: int, count: int) -> None:
    states, _ = random_states(seed, count)
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + 1))
    soup = greedy(states, lambda state: -float((state["w"] - target).abs().sum()))
    assert soup.score >= max(soup.single_scores)
    expected = uniform([states[index] for index in soup.ingredients])
    assert torch.equal(soup.state["w"], expected["w"])


def test_the_order_of_candidates_does_not_change_the_soup() -> None:
    candidates = vectors([2.0, 0.0], [0.0, 0.3], [-9.0, 9.0], [0.1, -0.4])
    one = greedy(candidates, closeness([0.0, 0.0]))  # type: ignore[arg-type]
    other = greedy(candidates[::-1], closeness([0.0, 0.0]), parent=candidates[0])  # type: ignore[arg-type]
    assert torch.equal(one.state["w"], other.state["w"])


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(MergeError, match="score of candidate 0 is not a number"):
        greedy(vectors([1.0]), lambda state: float("nan"))
    with pytest.raises(MergeError, match="nothing to merge"):
        greedy([], lambda state: 0.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_equal_fishers_give_the_uniform_mean(seed: int, count: int) -> None:
    states, fishers = random_states(seed, count)
    merged = fisher_average(states, [fishers[0]] * count)
    torch.testing.assert_close(merged["w"], uniform(states)["w"], rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-60, 60), count=st.integers(2, 4))
def test_fisher_weights_do_not_depend_on_a_models_overall_scale(seed: int, exponent: int, count: int) -> None:
    states, fishers = random_states(seed, count)
    doubles = [{"w": fisher["w"].double()} for fisher in fishers]
    scaled = [{"w": doubles[0]["w"] * 10.0**exponent}, *doubles[1:]]
    torch.testing.assert_close(fisher_average(states, scaled)["w"], fisher_average(states, doubles)["w"])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 5))
def test_fisher_averages_lie_within_the_members_so_weights_sum_to_one(seed: int, count: int) -> None:
    states, fishers = random_states(seed, count)
    merged = fisher_average(states, fishers)["w"]
    stacked = torch.stack([state["w"] for state in states])
    assert bool(((merged >= stacked.amin(0)) & (merged <= stacked.amax(0))).all())
    ones = [{"w": torch.full((4, 3), 0.7)} for _ in range(count)]
    assert torch.equal(fisher_average(ones, fishers)["w"], ones[0]["w"])


def test_more_information_pulls_harder_down_to_the_floor() -> None:
    states = vectors([0.0, 0.0], [1.0, 1.0])
    fishers = vectors([1.0, 0.0], [1.0, 1.0])
    # normalised: [2, floor 1e-3] and [1, 1]
    merged = fisher_average(states, fishers, floor=1e-3)["w"]
    torch.testing.assert_close(merged, torch.tensor([1 / 3, 1 / 1.001]))


def test_a_tensor_without_information_is_averaged_uniformly() -> None:
    states, nothing = vectors([0.0, 2.0], [1.0, 4.0]), vectors([0.0, 0.0], [0.0, 0.0])
    torch.testing.assert_close(fisher_average(states, nothing)["w"], torch.tensor([0.5, 3.0]))


def test_tied_weights_need_one_fisher_and_merge_to_one_tensor() -> None:
    def tied(value: float) -> State:
        shared = torch.full((2, 2), value)
        return {"embed": shared, "head": shared}

    fishers = [{"embed": torch.ones(2, 2)}, {"head": torch.ones(2, 2)}]
    merged = fisher_average([tied(0.0), tied(1.0)], fishers)
    assert merged["embed"].data_ptr() == merged["head"].data_ptr()
    assert torch.equal(merged["embed"], torch.full((2, 2), 0.5))


def test_buffers_need_no_fisher_but_parameters_that_differ_do() -> None:
    models = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    states = [model.state_dict() for model in models]
    states[1]["1.running_mean"] = torch.ones(2)
    fishers = [{name: torch.ones_like(p) for name, p in model.named_parameters()} for model in models]
    assert torch.equal(fisher_average(states, fishers)["1.running_mean"], torch.full((2,), 0.5))
    del fishers[1]["0.weight"]
    with pytest.raises(MergeError, match=r"estimate 1 lacks '0\.weight'"):
        fisher_average(states, fishers)


@pytest.mark.parametrize("bad", [[-1.0, 1.0], [float("nan"), 1.0], [1.0, 1.0, 1.0]])
def test_an_impossible_fisher_is_refused(bad: list[float]) -> None:
    with pytest.raises(MergeError, match="Fisher of 'w' in estimate 0"):
        fisher_average(vectors([0.0, 0.0], [1.0, 1.0]), vectors(bad, [1.0, 1.0]))


def test_wrong_counts_floors_and_overlaps_are_refused() -> None:
    states, fishers = random_states(0, 2)
    with pytest.raises(MergeError, match="1 Fisher estimates came for 2 states"):
        fisher_average(states, fishers[:1])
    with pytest.raises(MergeError, match="floor"):
        fisher_average(states, fishers, floor=0.0)
    base = torch.arange(4.0).view(2, 2)
    overlapping = {"a": base, "b": base.T}
    with pytest.raises(MergeError, match="share memory"):
        fisher_average([overlapping, overlapping], [overlapping, overlapping])
