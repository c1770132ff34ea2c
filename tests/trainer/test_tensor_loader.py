"""TensorLoader: the batches, the order and the random states of a DataLoader, sample ids, and an exact cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from automode import TensorLoader, Trainer
from automode.errors import UsageError
from automode.trainer import tensor_loader
from automode.trainer.checkpointing import CheckpointKeeper
from automode.trainer.ids import RecordedLoader

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {"progress": False, "console": False}


def data(rows: int = 50) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 5, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def states(loader: Any) -> list[Any]:
    held = b"" if loader.generator is None else loader.generator.get_state().numpy().tobytes()
    return [torch.get_rng_state().numpy().tobytes(), held]


@pytest.mark.parametrize("chunk", [1, 16 << 20], ids=["one batch at a time", "all at once"])
@pytest.mark.parametrize(("shuffle", "owned"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rows", [50, 48, 3])
def test_batches_order_and_random_states_are_those_of_a_data_loader(
    rows: int, drop_last: bool, shuffle: bool, owned: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_loader, "CHUNK_BYTES", chunk)
    told = []
    for kind in (DataLoader, TensorLoader):
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(8) if owned else None
        loader: Any = kind(
            data(rows), batch_size=8, shuffle=shuffle, drop_last=drop_last, generator=generator
        )
        story: list[Any] = [len(loader)]
        for _ in range(3):
            batches = iter(loader)
            story.append(states(loader))
            for batch in batches:
                assert type(batch) is list
                story += [[part.tolist() for part in batch], [part.dtype for part in batch], states(loader)]
            story.append(states(loader))
        told.append(story)
    assert told[0] == told[1]


def test_a_subset_is_read_through_to_the_tensors() -> None:
    root = data()
    parts = random_split(root, [30, 20], generator=torch.Generator().manual_seed(2))
    twice = Subset(parts[0], [3, 1, -1, 5])
    for dataset in (parts[0], twice, Subset(root, range(0, 50, 3))):
        torch.manual_seed(3)
        plain = [batch for _ in range(2) for batch in DataLoader(dataset, batch_size=4, shuffle=True)]
        torch.manual_seed(3)
        quick = [batch for _ in range(2) for batch in TensorLoader(dataset, batch_size=4, shuffle=True)]
        for mine, theirs in zip(quick, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_batch_that_is_written_to_changes_neither_the_data_nor_its_neighbours() -> None:
    dataset = data()
    before = [part.clone() for part in dataset.tensors]
    batches = list(TensorLoader(dataset, batch_size=10))
    versions = [batch[0]._version for batch in batches[1:]]
    batches[0][0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(dataset.tensors, before, strict=True))
    assert [batch[0]._version for batch in batches[1:]] == versions
    assert torch.equal(batches[1][0], before[0][10:20])


def test_sample_ids_are_known_and_skipped_batches_are_not_read() -> None:
    dataset = data()
    for skip in (0, 2, 5, 9):
        told = []
        for kind in (DataLoader, TensorLoader):
            torch.manual_seed(5)
            recorded = RecordedLoader(kind(Subset(dataset, range(10, 50)), batch_size=8, shuffle=True))
            assert recorded.reason is None
            assert recorded.recorded
            ids = [recorded.ids_of_batch() for _ in recorded.batches(skip=skip)]
            told.append((ids, recorded.order(), recorded.fingerprint, recorded.root_ids(ids)))  # type: ignore[arg-type]
        (mine, theirs) = told
        assert mine[:3] == theirs[:3]
        np.testing.assert_array_equal(mine[3], theirs[3])  # type: ignore[arg-type]


def script(kind: Any, *, owned: bool = True) -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    generator = torch.Generator().manual_seed(4) if owned else None
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "loss_fn": nn.CrossEntropyLoss(),
        "train_loader": kind(data(), batch_size=8, shuffle=True, generator=generator),
        "val_loader": kind(TensorDataset(data(70).tensors[0][50:], data(70).tensors[1][50:]), batch_size=8),
    }


@pytest.mark.parametrize("mode", [False, "observe", True])
def test_a_run_is_the_same_bit_by_bit(mode: Any, tmp_path: Path) -> None:
    told = []
    for kind in (DataLoader, TensorLoader):
        made = script(kind, owned=mode != "observe")
        torch.manual_seed(2)
        result = Trainer(
            max_epochs=4, automode=mode, val_every_n_epochs=1, session_dir=tmp_path, seed=3, **COMMON
        ).fit(**made)
        told.append([result.frame("loss").tolist(), result.history, states(made["train_loader"])])
        began = next(result.session.events("session_started"))
        assert began.body["run"]["has_ids"]
    assert told[0] == told[1]


class Cut(Exception):
    """Ends a run as if it had been killed."""


@pytest.mark.parametrize(("owned", "cut"), [(False, 3), (True, 7), (True, 10)])
def test_a_cut_does_not_show(owned: bool, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(folder: Path, **given: Any) -> Any:
        made = script(TensorLoader, owned=owned)
        del made["val_loader"]
        trainer = Trainer(max_epochs=3, automode="observe", session_dir=folder, **given, **COMMON)
        return trainer.fit(**made)

    def after_step(keeper: CheckpointKeeper) -> None:
        if keeper._loop.batches == cut:
            assert keeper.save("periodic") is not None
            raise Cut

    whole = fit(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointKeeper, "after_step", after_step)
        patch.setattr(CheckpointKeeper, "rescue", lambda *_: None)
        with pytest.raises(Cut):
            fit(tmp_path)
    torch.manual_seed(99)
    resumed = fit(tmp_path, resume="auto")
    (record,) = resumed.session.events("resumed")
    assert record.body["exact"]
    assert resumed.frame("loss").tolist() == whole.frame("loss").tolist()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)


def test_one_is_made_of_a_plain_data_loader() -> None:
    for given in (
        {"shuffle": True, "generator": torch.Generator().manual_seed(3)},
        {"drop_last": True},
        {"shuffle": True},
    ):
        loader = DataLoader(data(), batch_size=8, **given)  # type: ignore[arg-type]
        made = TensorLoader.of(loader)
        assert made.generator is loader.generator
        before = None if loader.generator is None else loader.generator.get_state()
        torch.manual_seed(1)
        plain = [batch[0].tolist() for batch in loader]
        if before is not None:
            loader.generator.set_state(before)
        torch.manual_seed(1)
        assert [batch[0].tolist() for batch in made] == plain


class Own(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * part for part in super().__getitem__(index))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: [1, 2], "a list came"),
        (lambda: DataLoader(Own(torch.zeros(8, 2)), 4), "its dataset is a Own"),
        (lambda: DataLoader(data(), 4, num_workers=1), "it has workers"),
        (lambda: DataLoader(data(), 4, collate_fn=list), "a collate function of its own"),
        (lambda: DataLoader(data(), batch_sampler=[[0, 1], [2]]), "a batch sampler of its own, or none"),
        (
            lambda: DataLoader(data(), 4, sampler=WeightedRandomSampler([1.0] * 50, 50)),
            "its sampler is a WeightedRandomSampler",
        ),
        (
            lambda: DataLoader(data(), 4, sampler=RandomSampler(data(), generator=torch.Generator())),
            "its sampler has a generator of its own",
        ),
    ],
)
def test_what_is_more_than_a_plain_loader_is_refused(make: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        TensorLoader.of(make())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((), "got nothing"),
        ((Own(torch.zeros(8, 2)),), "got Own"),
        ((torch.zeros(3), torch.zeros(4)), "tensors of one length, got 3, 4"),
    ],
)
def test_what_is_no_set_of_tensors_is_refused(given: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        TensorLoader(*given, batch_size=2)
    with pytest.raises(UsageError, match="batch_size must be a whole number"):
        TensorLoader(torch.zeros(3), batch_size=0)
