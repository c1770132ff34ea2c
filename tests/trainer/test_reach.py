"""One dataset for training and validation, told apart by samplers, is no overlap; what a sampler leaves out is never read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from automode.trainer.heldout import HeldOut
from automode.trainer.reach import as_read, positions_read
from automode.trainer.trainer import Trainer

DATASET = TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)


class EveryThird(Sampler[int]):
    """Draws random numbers and counts its passes, as samplers may."""

    def __init__(self) -> None:
        self.passes = 0
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Any:
        self.passes += 1
        torch.rand(1)
        order = torch.randperm(7, generator=self.generator) * 3
        return iter(order.tolist())

    def __len__(self) -> int:
        return 7


def loader(**given: Any) -> DataLoader[Any]:
    return DataLoader(DATASET, **({"batch_size": 4} if "batch_sampler" not in given else {}), **given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"shuffle": True}, None),
        ({"sampler": SubsetRandomSampler([7, 3, 5])}, [3, 5, 7]),
        ({"sampler": SubsetRandomSampler(torch.tensor([7, 3]))}, [3, 7]),
        ({"sampler": WeightedRandomSampler([0.0, 1.0, 2.0] + [0.0] * 17, 8)}, [1, 2]),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler([9, 1]), 1, drop_last=False)}, [1, 9]),
        ({"batch_sampler": BatchSampler(RandomSampler(DATASET), 4, drop_last=True)}, None),
    ],
)
def test_known_samplers_say_what_they_read_without_being_drawn_from(given: Any, expected: Any) -> None:
    before = torch.get_rng_state()
    for draw in (True, False):
        found = positions_read(loader(**given), draw=draw)
        assert (found if found is None else found.tolist()) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_sampler_is_drawn_from_only_where_that_is_allowed_and_leaves_no_trace() -> None:
    sampler = EveryThird()
    assert positions_read(loader(sampler=sampler), draw=False) is None
    assert sampler.passes == 0
    before, own = torch.get_rng_state(), sampler.generator.get_state()
    found = positions_read(loader(sampler=sampler), draw=True)
    assert found is not None
    assert found.tolist() == [0, 3, 6, 9, 12, 15, 18]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sampler.generator.get_state(), own)


def test_what_is_no_data_loader_is_read_as_a_whole() -> None:
    assert positions_read([1, 2], draw=True) is None
    assert as_read(loader()) is DATASET
    part = as_read(loader(sampler=SubsetRandomSampler([4, 2])))
    assert isinstance(part, Subset)
    assert part.indices == [2, 4]


def test_a_validation_set_holds_only_what_its_sampler_reads() -> None:
    half = Subset(DATASET, list(range(0, 20, 2)))
    held = HeldOut(
        DataLoader(half, batch_size=2, sampler=SubsetRandomSampler([0, 4, 5])), torch.device("cpu"), seed=1
    )
    assert held.ids.tolist() == [0, 8, 10]
    read = [ids.tolist() for _, ids in held.batches(None)]
    assert read == [[0, 8], [10]]
    inputs = torch.cat([batch[0] for batch, _ in held.batches(None)])
    assert torch.equal(inputs, DATASET.tensors[0][[0, 8, 10]])
    assert held.n_a + held.n_b == 3


def test_two_samplers_over_one_dataset_are_no_overlap_and_one_sample_in_both_is(tmp_path: Path) -> None:
    def fit(train: list[int], val: list[int]) -> Any:
        model = nn.Linear(3, 2)
        trainer = Trainer(automode=True, session_dir=tmp_path, progress=False, console=False)
        return trainer.fit(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            loss_fn=nn.CrossEntropyLoss(),
            train_loader=DataLoader(DATASET, batch_size=4, sampler=SubsetRandomSampler(train)),
            val_loader=DataLoader(DATASET, batch_size=4, sampler=SubsetRandomSampler(val)),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(list(range(12)), list(range(12, 20)))
    assert result.mode == "act"
    (started,) = result.session.events("session_started")
    assert started.body["run"]["train_samples"] == 12
    assert started.body["run"]["val_a"] + started.body["run"]["val_b"] == 8
    with pytest.warns(UserWarning, match="1 of the validation samples"):
        assert fit(list(range(13)), list(range(12, 20))).mode == "propose"


def test_the_samples_of_a_weighted_sampler_are_those_with_a_weight() -> None:
    weights = np.zeros(20)
    weights[[3, 4]] = 1.0
    found = positions_read(loader(sampler=WeightedRandomSampler(weights.tolist(), 4)), draw=False)
    assert found is not None
    assert found.tolist() == [3, 4]
