"""How a batch is looked at, and that global state comes back."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from automode.errors import MergeError
from automode.merges.batches import (
    batch_size,
    device_of,
    forked_random_state,
    forward_inputs,
    inputs_of,
    map_tensors,
    rows,
    training_flags_kept,
)


class Pair(NamedTuple):
    x: Tensor
    name: str


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(5, 2),
        (torch.zeros(5, 2), torch.zeros(5)),
        [{"a": torch.zeros(5)}, None],
        {"scale": torch.tensor(2.0), "x": torch.zeros(5, 3)},
        Pair(torch.zeros(5), "p"),
    ],
)
def test_the_number_of_samples_is_the_first_leading_dimension(batch: Any) -> None:
    assert batch_size(batch) == 5
    assert batch_size(rows(batch, 1, 4)) == 3
    assert type(rows(batch, 1, 4)) is type(batch)


def test_a_batch_without_samples_is_refused() -> None:
    for batch in ("text", torch.tensor(1.0), [None]):
        with pytest.raises(MergeError, match="no tensor with a leading dimension"):
            batch_size(batch)
    with pytest.raises(MergeError, match="empty tuple"):
        inputs_of(())


def test_mappings_go_in_by_keyword_and_tuples_by_their_first_element() -> None:
    class Keyword(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    assert forward_inputs(Keyword(), {"b": torch.tensor(1.0), "a": torch.tensor(3.0)}).item() == 2.0
    assert forward_inputs(nn.Identity(), (torch.ones(2), "label")).tolist() == [1.0, 1.0]


def test_a_model_that_returns_no_tensor_is_refused() -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(MergeError, match="returned a tuple"):
        forward_inputs(Pairs(), torch.ones(2))


def test_everything_that_is_no_tensor_passes_through() -> None:
    value = {"x": (torch.ones(1), [3, None]), "s": "text"}
    assert map_tensors(lambda tensor: tensor + 1, value) == {
        "x": (torch.tensor([2.0]), [3, None]),
        "s": "text",
    }


def test_the_random_state_is_seeded_inside_and_restored_after_an_error() -> None:
    def draw() -> Tensor:
        with forked_random_state(11, torch.device("cpu")):
            return torch.rand(3)

    before = torch.get_rng_state()
    assert torch.equal(draw(), draw())
    with pytest.raises(RuntimeError), forked_random_state(1, torch.device("cpu")):
        torch.rand(1) @ torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_flags_are_restored_one_by_one_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(RuntimeError), training_flags_kept(model):
        model.eval()(torch.rand(1, 9))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_model_without_tensors_computes_on_the_cpu() -> None:
    assert device_of(nn.Identity()) == torch.device("cpu")
    assert device_of(nn.BatchNorm1d(2, affine=False)) == torch.device("cpu")
