"""What is left out is taken from batches of any shape, and nothing else about a batch changes."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from automode.trainer.curation import Curation
from automode.trainer.ids import RecordedLoader

pytestmark = pytest.mark.torch

N = 40
Pair = namedtuple("Pair", "inputs targets")


def loader(dataset: Any = None) -> RecordedLoader:
    data = TensorDataset(torch.arange(N), 2 * torch.arange(N)) if dataset is None else dataset
    return RecordedLoader(
        DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
    )


def ids(*which: int) -> Any:
    return np.array(which, dtype=np.int64)


def test_what_is_left_out_is_in_no_batch_and_the_others_come_as_they_came_before() -> None:
    plain = [inputs for inputs, _ in loader()]
    source = loader()
    curation = Curation(source, ids(39, 3, 3, 17))
    assert curation.excluded.tolist() == [3, 17, 39]
    seen = []
    for (inputs, targets), whole in zip(source, plain, strict=True):
        (kept, labels), positions = curation((inputs, targets), source.ids_of_batch())
        assert kept.tolist() == [i for i in whole.tolist() if i not in (3, 17, 39)]
        assert labels.tolist() == [2 * i for i in kept.tolist()]
        assert positions is not None
        assert list(positions) == kept.tolist()
        seen += kept.tolist()
    assert sorted(seen) == [i for i in range(N) if i not in (3, 17, 39)]


def test_ids_are_those_of_the_root_dataset() -> None:
    source = loader(Subset(TensorDataset(torch.arange(100), torch.arange(100)), range(50, 90)))
    curation = Curation(source, ids(55, 3))
    kept = []
    for batch in source:
        (inputs, _), positions = curation(batch, source.ids_of_batch())
        assert source.root_ids([positions or []]).tolist() == inputs.tolist()  # type: ignore[union-attr]
        kept += inputs.tolist()
    assert sorted(kept) == [i for i in range(50, 90) if i != 55]


def test_every_container_loses_the_same_rows() -> None:
    source = loader()
    curation = Curation(source, ids(1))
    batch = {
        "pair": Pair(torch.arange(6).view(3, 2), np.arange(3)),
        "names": ["a", "b", "c"],
        "parts": [torch.arange(3), torch.tensor(7.0)],
        "epoch": 4,
        "weights": torch.ones(2),
    }
    found, positions = curation(batch, [0, 1, 2])
    assert positions == [0, 2]
    assert isinstance(found["pair"], Pair)
    assert found["pair"].inputs.tolist() == [[0, 1], [4, 5]]
    assert found["pair"].targets.tolist() == [0, 2]
    assert found["names"] == ["a", "c"]
    assert found["parts"][0].tolist() == [0, 2]
    assert float(found["parts"][1]) == 7.0
    assert found["epoch"] == 4
    assert found["weights"].tolist() == [1.0, 1.0]


def test_a_batch_without_such_samples_or_without_ids_is_the_very_same() -> None:
    source = loader()
    curation = Curation(source, ids(1, 2))
    batch = (torch.arange(3), torch.arange(3))
    assert curation(batch, [5, 6, 7])[0] is batch
    with pytest.warns(RuntimeWarning, match="2 samples that an adopted card left out are trained on again"):
        assert curation(batch, None)[0] is batch
    assert curation(batch, [10**6, 5, 6])[0] is batch  # told once


def test_a_batch_of_which_hardly_anything_remains_is_trained_on_as_it_came() -> None:
    source = loader()
    curation = Curation(source, ids(0, 1, 2))
    batch = (torch.arange(4), torch.arange(4))
    assert curation(batch, [0, 1, 2, 3])[0] is batch
    assert curation((batch[0], batch[1]), [0, 1, 5, 6])[0][0].tolist() == [2, 3]
