"""The checks that make states comparable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automode.errors import MergeError
from automode.merges.averages import uniform
from automode.merges.state_dicts import (
    alias_groups,
    check_compatible,
    incompatibility,
    norm_statistics_keys,
    overlapping_keys,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_a_missing_key_is_named_with_what_to_do() -> None:
    full = nn.Linear(3, 2).state_dict()
    with pytest.raises(MergeError, match=r"member 1 lacks 'bias' \(2\).*mixture of experts"):
        check_compatible(full, [full, {"weight": full["weight"]}])


def test_an_extra_key_is_named() -> None:
    state = nn.Linear(3, 2).state_dict()
    with pytest.raises(MergeError, match="member 0 has 'more'"):
        check_compatible(state, [{**state, "more": torch.zeros(1)}])


def test_a_different_head_is_refused_with_both_shapes() -> None:
    with pytest.raises(MergeError, match=r"'weight' is 5 x 3 in member 0 and 2 x 3 in the parent"):
        check_compatible(nn.Linear(3, 2).state_dict(), [nn.Linear(3, 5).state_dict()])


def test_a_different_dtype_is_refused() -> None:
    state = nn.Linear(3, 2).state_dict()
    with pytest.raises(MergeError, match=r"float64 in member 0 and torch.float32"):
        check_compatible(state, [{key: value.double() for key, value in state.items()}])


def test_no_member_is_refused() -> None:
    with pytest.raises(MergeError, match="nothing to merge"):
        check_compatible(nn.Linear(3, 2).state_dict(), [])


def test_extra_state_and_sparse_tensors_are_refused() -> None:
    state = {"x": torch.zeros(2)}
    assert "tensor is needed" in str(incompatibility({"x": {"a": 1}}, [state]))  # type: ignore[dict-item]
    assert "tensor is needed" in str(incompatibility(state, [{"x": 3}]))  # type: ignore[dict-item]
    assert "sparse" in str(incompatibility({"x": torch.eye(2).to_sparse()}, [state]))


def test_tied_weights_are_found_and_stay_tied_through_a_merge() -> None:
    models = [Tied(), Tied()]
    states = [model.state_dict() for model in models]
    assert alias_groups(states[0]) == (("embed.weight", "head.weight"),)
    merged = uniform(states)
    assert alias_groups(merged) == (("embed.weight", "head.weight"),)
    torch.testing.assert_close(
        merged["head.weight"], (models[0].embed.weight + models[1].embed.weight).detach() / 2
    )


def test_a_member_that_came_untied_is_refused_unless_its_copies_agree() -> None:
    parent = Tied().state_dict()
    apart = {key: value.clone() for key, value in parent.items()}
    check_compatible(parent, [apart])
    apart["head.weight"] += 1
    with pytest.raises(MergeError, match=r"'embed\.weight' and 'head\.weight' are one tied weight"):
        check_compatible(parent, [apart])


def test_overlapping_views_are_told_from_ties_and_from_disjoint_views() -> None:
    base = torch.arange(12.0)
    assert overlapping_keys({"a": base[:6], "b": base[6:]}) is None
    assert overlapping_keys({"a": base, "b": base}) is None
    assert overlapping_keys({"a": base.view(3, 4), "b": base.view(3, 4).T}) == ("a", "b")


def test_norm_statistics_are_recognised_as_pairs_only() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    found = norm_statistics_keys(model.state_dict())
    assert found == {"1.running_mean", "1.running_var", "2.running_mean", "2.running_var"}
    assert norm_statistics_keys({"x.running_mean": torch.zeros(1)}) == frozenset()
    assert norm_statistics_keys(nn.BatchNorm1d(2).state_dict()) == {"running_mean", "running_var"}


def test_empty_tensors_are_no_ties() -> None:
    assert alias_groups({"a": torch.zeros(0), "b": torch.zeros(0)}) == ()
