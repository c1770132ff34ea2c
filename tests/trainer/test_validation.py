"""Validation tells the truth about the whole set and its slices, and a mistake in either shows before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from automode.errors import DataError, UsageError
from automode.trainer.heldout import HeldOut
from automode.trainer.trainer import Trainer
from automode.trainer.validation import resolve_slices

COMMON: dict[str, Any] = {"progress": False, "console": False}
CPU = torch.device("cpu")


def samples(rows: int = 40) -> TensorDataset:
    torch.manual_seed(3)
    inputs = torch.randn(rows, 4)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def held_out(dataset: Any | None = None, **given: Any) -> HeldOut:
    return HeldOut(DataLoader(dataset or samples(), batch_size=7, **given), CPU, seed=1)


def script(**given: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(samples(64), batch_size=16),
        **given,
    }


def test_a_validation_equals_a_pass_by_hand(tmp_path: Path, observers: list[Any]) -> None:
    dataset = samples()
    made = script(val_loader=DataLoader(dataset, batch_size=7, shuffle=True))
    slices = {"first": list(range(10)), "positive": lambda inputs, targets: inputs[:, 1] > 0}
    result = Trainer(session_dir=tmp_path, val_every_n_epochs=1, **COMMON).fit(**made, slices=slices)
    inputs, targets = dataset.tensors
    with torch.no_grad():
        outputs = made["model"](inputs)
    right = (outputs.argmax(1) == targets).double()
    history = result.history
    assert history["val_loss"][0] == pytest.approx(
        float(nn.functional.cross_entropy(outputs, targets)), rel=1e-6
    )
    assert history["val_metric"][0] == pytest.approx(float(right.mean()))
    assert history["slices"][0] == {
        "first": pytest.approx(float(right[:10].mean())),
        "positive": pytest.approx(float(right[inputs[:, 1] > 0].mean())),
    }
    scores = observers[0].told("validated")[0][2]
    assert sorted(scores.ids.tolist()) == list(range(40))


def test_a_regression_is_judged_by_its_loss(tmp_path: Path, observers: list[Any]) -> None:
    inputs = torch.randn(30, 4)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Linear(4, 1)
    result = Trainer(session_dir=tmp_path, max_epochs=3, val_every_n_epochs=1, **COMMON).fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.MSELoss(),
        train_loader=DataLoader(data, batch_size=10),
        val_loader=DataLoader(data, batch_size=8),
    )
    assert result.history["val_loss"] == sorted(result.history["val_loss"], reverse=True)
    assert result.history["val_metric"] == sorted(result.history["val_metric"])


def test_ids_of_a_slice_are_positions_under_every_subset() -> None:
    half = Subset(samples(), list(range(0, 40, 2)))
    found = resolve_slices(
        {"some": [4, 0, 4], "array": np.array([38]), "tensor": torch.tensor([2, 6])}, held_out(half)
    )
    assert {name: ids.tolist() for name, ids in found.items()} == {
        "some": [0, 4],
        "array": [38],
        "tensor": [2, 6],
    }
    with pytest.raises(UsageError, match="names 1 samples that are not in the validation set, 3 for one"):
        resolve_slices({"odd": [2, 3]}, held_out(half))


def test_a_function_is_called_once_over_the_set_and_leaves_no_random_trace() -> None:
    calls = 0

    def mask(inputs: Any, targets: Any) -> Any:
        nonlocal calls
        calls += 1
        torch.rand(1)
        return inputs[:, 1] > 0

    dataset = samples()
    before = torch.get_rng_state()
    found = resolve_slices({"right": mask}, held_out(dataset))
    assert calls == 6
    assert torch.equal(torch.get_rng_state(), before)
    assert found["right"].tolist() == torch.nonzero(dataset.tensors[0][:, 1] > 0).flatten().tolist()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (3, "it must be a function of .* or a list of sample ids"),
        ("rare", "is a str; it must be a function"),
        ([0.5], "sample ids are a flat list of integers"),
        ([[1, 2]], "sample ids are a flat list of integers"),
        ([], "holds none of the 40 validation samples"),
        (lambda inputs, targets: targets, r"gave int64 values of shape \(7,\)"),
        (lambda inputs, targets: True, r"gave bool values of shape \(\)"),
        (lambda inputs, targets: targets > 5, "holds none of the 40 validation samples"),
    ],
)
def test_a_slice_that_is_none_is_refused(part: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_slices({"part": part}, held_out())


def test_a_slice_has_a_name() -> None:
    with pytest.raises(UsageError, match="a slice is named by a non-empty string, got 3"):
        resolve_slices({3: [1]}, held_out())  # type: ignore[dict-item]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(4), 0)] * 9)


def test_slices_need_samples_with_ids_and_validation_does_not(tmp_path: Path, observers: list[Any]) -> None:
    loader = DataLoader(Stream(), batch_size=4)
    with pytest.raises(
        UsageError, match=r"slices need to know the validation samples by id, but .*iterable only"
    ):
        Trainer(session_dir=tmp_path, **COMMON).fit(**script(val_loader=loader), slices={"a": [1]})
    result = Trainer(session_dir=tmp_path, val_every_n_epochs=1, **COMMON).fit(**script(val_loader=loader))
    assert result.history["val_loss"][0] > 0


@pytest.mark.parametrize("name", ["val_loader", "test_loader"])
def test_a_held_out_set_that_cannot_be_read_shows_before_training(
    name: str, tmp_path: Path, observers: list[Any]
) -> None:
    given = {"val_every_n_epochs": 1} if name == "val_loader" else {"do_test_after": True}
    trainer = Trainer(session_dir=tmp_path, **COMMON, **given)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"{name} is empty"):
        trainer.fit(**script(**{name: []}))
    with pytest.raises(DataError, match=f"{name} yields a dict, but must yield"):
        trainer.fit(**script(**{name: [{"x": torch.zeros(2, 4)}]}))
    with pytest.raises(DataError, match=rf"{name} yields a tuple of 3, .* collate_fn .* or leave {name} out"):
        trainer.fit(**script(**{name: [(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2))]}))
    assert observers == []
    assert list(tmp_path.iterdir()) == []
