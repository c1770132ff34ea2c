"""New labels stand in a copy of a batch's targets; samples without one, and the data, keep what they had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from automode.errors import DataError
from automode.trainer.curation import Curation
from automode.trainer.ids import RecordedLoader
from automode.trainer.new_labels import NewLabels
from automode.trainer.relabelling import packed, unpacked

pytestmark = pytest.mark.torch

LABELS = NewLabels.of([30, 4, 17], [2, 0, 1])


def ids(*which: int) -> Any:
    return np.array(which, dtype=np.int64)


def test_the_targets_of_named_samples_are_replaced_in_a_copy() -> None:
    targets = torch.tensor([5, 6, 7, 8])
    batch = (torch.zeros(4, 2), targets)
    inputs, changed = LABELS.put(batch, ids(4, 40, 30, 1))
    assert inputs is batch[0]
    assert changed.tolist() == [0, 6, 2, 8]
    assert targets.tolist() == [5, 6, 7, 8]
    assert isinstance(LABELS.put(list(batch), ids(4, 40, 30, 1)), list)


def test_a_batch_without_named_samples_is_the_very_same() -> None:
    batch = (torch.zeros(2, 2), torch.tensor([5, 6]))
    assert LABELS.put(batch, ids(5, 99)) is batch
    assert NewLabels.none().put(batch, ids(4, 30)) is batch


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(2, 2), torch.tensor([0.5, 0.6])),
        (torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.long)),
        (torch.zeros(2, 2), torch.tensor([1, 2, 3])),
        (torch.zeros(2, 2), [1, 2]),
        {"inputs": torch.zeros(2, 2), "targets": torch.tensor([1, 2])},
    ],
)
def test_targets_that_are_no_classes_are_refused_and_not_passed_over(batch: Any) -> None:
    with pytest.raises(DataError, match="whole numbers, one a sample"):
        LABELS.put(batch, ids(4, 5))


def test_later_labels_come_before_earlier_ones_and_can_be_taken_away() -> None:
    both = NewLabels.of([17, 2], [9, 8]).over(LABELS)
    assert (both.ids.tolist(), both.labels.tolist()) == ([2, 4, 17, 30], [8, 0, 9, 2])
    assert both.without(ids(4, 30, 31)).ids.tolist() == [2, 17]


def test_what_is_stored_is_what_is_read() -> None:
    labels, chosen = unpacked(packed(LABELS, ids(4, 30)))
    assert labels.packed().tolist() == LABELS.packed().tolist()
    assert chosen.tolist() == [4, 30]
    assert unpacked(packed(NewLabels.none(), ids()))[0].size == 0
    assert NewLabels.unpacked(LABELS.packed()).packed().tolist() == LABELS.packed().tolist()


def test_curation_leaves_out_and_relabels_in_one_go_and_the_data_stay_as_they_are() -> None:
    data = TensorDataset(torch.arange(40), torch.zeros(40, dtype=torch.long))
    source = RecordedLoader(DataLoader(data, batch_size=8, shuffle=True))
    curation = Curation(source, ids(1, 2, 3), LABELS)
    seen = {}
    for batch in source:
        (inputs, targets), positions = curation(batch, source.ids_of_batch())
        assert list(positions or []) == inputs.tolist()
        seen |= dict(zip(inputs.tolist(), targets.tolist(), strict=True))
    assert len(seen) == 37
    assert {sample: label for sample, label in seen.items() if label} == {30: 2, 17: 1}
    assert not data.tensors[1].any()
    with pytest.warns(RuntimeWarning, match="3 that it relabelled have the labels of the data again"):
        curation((torch.arange(3), torch.arange(3)), None)
