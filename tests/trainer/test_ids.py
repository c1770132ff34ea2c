"""Ids are read while batches, random numbers and the user's loader stay what they were."""

from __future__ import annotations

import random
import warnings
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from automode.trainer.ids import RecordedLoader, fingerprint, root_of
from automode.trainer.recording_sampler import RecordedIterator

pytestmark = pytest.mark.torch

N = 37


def numbered(n: int = N) -> TensorDataset:
    """Each sample is its own id, so that a batch says what its ids must be."""
    return TensorDataset(torch.arange(n), torch.arange(n) * 2)


class NoisyDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Draws from all three global generators per item, as augmentations do."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002  # the legacy global one is the point
        return torch.tensor(index), noise


class EagerBatches:
    """A batch sampler that draws its random numbers in ``iter`` and, if asked, reuses one list.

    (Reused lists race with the index queue's own thread in the plain loader too, once there are workers.)
    """

    def __init__(self, *, reuse: bool) -> None:
        self.reuse = reuse

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(torch.randperm(N).tolist())

    def _batches(self, order: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in order:
            batch.append(index)
            if len(batch) == 5:
                yield batch if self.reuse else list(batch)
                batch.clear()

    def __len__(self) -> int:
        return N // 5


LOADERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sequential": lambda: {"batch_size": 8},
    "shuffle": lambda: {"batch_size": 8, "shuffle": True},
    "shuffle_drop_last": lambda: {"batch_size": 8, "shuffle": True, "drop_last": True},
    "weighted": lambda: {"batch_size": 8, "sampler": WeightedRandomSampler([1.0 + i for i in range(N)], 50)},
    "subset_random": lambda: {"batch_size": 4, "sampler": SubsetRandomSampler(range(3, 20))},
    "batch_sampler": lambda: {"batch_sampler": BatchSampler(RandomSampler(range(N)), 6, drop_last=False)},
    "eager_batch_sampler": lambda: {"batch_sampler": EagerBatches(reuse=False)},
    "reusing_batch_sampler": lambda: {"batch_sampler": EagerBatches(reuse=True)},
    "generator": lambda: {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(11)},
}


def seed_all(seed: int = 5) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def random_state() -> tuple[Any, ...]:
    state = np.random.get_state()  # noqa: NPY002
    return random.getstate(), state[1].tobytes(), state[2], torch.get_rng_state().numpy().tobytes()


def epochs(loader: Any, count: int) -> tuple[list[list[bytes]], tuple[Any, ...]]:
    seed_all()
    seen = []
    for _ in range(count):
        iterator = iter(loader)
        torch.rand(3)  # what a user draws between iter() and the first batch
        seen.extend([[part.numpy().tobytes() for part in batch] for batch in iterator])
        torch.rand(1)
    return seen, random_state()


def make(kind: str, workers: int, dataset: Any, *, persistent: bool = False) -> DataLoader[Any]:
    extra = {"persistent_workers": True} if persistent else {}
    return DataLoader(dataset, num_workers=workers, **LOADERS[kind](), **extra)


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_and_random_states_are_those_of_the_plain_loader_without_workers(kind: str) -> None:
    plain, plain_state = epochs(make(kind, 0, NoisyDataset()), 2)
    ours, our_state = epochs(RecordedLoader(make(kind, 0, NoisyDataset())), 2)
    assert ours == plain
    assert our_state == plain_state


@pytest.mark.parametrize(
    ("kind", "persistent"),
    [
        ("shuffle", False),
        ("weighted", False),
        ("eager_batch_sampler", False),
        ("generator", False),
        ("shuffle", True),
    ],
)
def test_batches_and_random_states_are_those_of_the_plain_loader_with_two_workers(
    kind: str, persistent: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # fork in a process with threads, and few cores, both true of the plain loader
        plain, plain_state = epochs(make(kind, 2, numbered(), persistent=persistent), 2)
        recorded = RecordedLoader(make(kind, 2, numbered(), persistent=persistent))
        ours, our_state = epochs(recorded, 2)
        assert ours == plain
        assert our_state == plain_state
        for batch in recorded:
            assert list(recorded.ids_of_batch() or ()) == batch[0].tolist()


@pytest.mark.parametrize("kind", LOADERS)
def test_the_ids_of_each_batch_are_those_of_its_samples(kind: str) -> None:
    recorded = RecordedLoader(make(kind, 0, numbered()))
    for _ in range(2):
        batches, raw = [], []
        for batch in recorded:
            batches.append(batch[0])
            raw.append(recorded.ids_of_batch())
        ids = recorded.root_ids(raw)
        assert ids is not None
        assert ids.dtype == np.int64
        np.testing.assert_array_equal(ids, torch.cat(batches).numpy())
    assert recorded.reason is None


def test_an_epoch_left_early_does_not_shift_the_next_one() -> None:
    recorded = RecordedLoader(make("shuffle", 0, numbered()))
    next(iter(recorded))
    for batch in recorded:
        assert list(recorded.ids_of_batch() or ()) == batch[0].tolist()


class Brittle(TensorDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        if index == 9:
            raise OSError("unreadable sample")
        return super().__getitem__(index)


def test_a_batch_that_fails_does_not_shift_the_next_one() -> None:
    recorded = RecordedLoader(DataLoader(Brittle(torch.arange(N)), batch_size=8))
    iterator = iter(recorded)
    next(iterator)
    with pytest.raises(OSError, match="unreadable sample"):
        next(iterator)
    batch = next(iterator)
    assert list(recorded.ids_of_batch() or ()) == batch[0].tolist() == list(range(16, 24))


def test_nested_subsets_are_mapped_to_the_root() -> None:
    root = numbered()
    inner = Subset(Subset(root, torch.arange(36, 5, -1)), [4, 0, 9, -1])  # 32, 36, 27, 6
    found, positions = root_of(inner)
    assert found is root
    assert positions is not None
    assert positions.tolist() == [32, 36, 27, 6]
    recorded = RecordedLoader(DataLoader(inner, batch_size=3))
    batches = [(batch[0], recorded.ids_of_batch()) for batch in recorded]
    ids = recorded.root_ids([raw for _, raw in batches if raw is not None])
    np.testing.assert_array_equal(ids, torch.cat([values for values, _ in batches]))
    assert recorded.length == N


def test_negative_positions_count_from_the_end_as_the_dataset_counts_them() -> None:
    recorded = RecordedLoader(DataLoader(numbered(), batch_sampler=[[0, -1], [-2, -N]]))
    batches = [(batch[0], recorded.ids_of_batch()) for batch in recorded]
    ids = recorded.root_ids([raw for _, raw in batches if raw is not None])
    np.testing.assert_array_equal(ids, torch.cat([values for values, _ in batches]))


@pytest.mark.parametrize(
    "batches", [[torch.tensor([3, 1])], [np.array([3, 1])], [(3, 1)], [[np.int64(3), np.int64(1)]]]
)
def test_index_lists_of_other_types_are_read_too(batches: list[Any]) -> None:
    recorded = RecordedLoader(DataLoader(numbered(), batch_sampler=batches))
    for batch in recorded:
        raw = recorded.ids_of_batch()
        assert raw is not None
        np.testing.assert_array_equal(recorded.root_ids([raw]), batch[0])


class Streamed(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(6))


class Doubling(DataLoader[Any]):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield batch


class Keyed(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.tensor(float(key))


@pytest.mark.parametrize(
    ("loader", "count", "said"),
    [
        (DataLoader(Streamed(), batch_size=2), 3, "IterableDataset has no positions"),
        (DataLoader(numbered(), batch_size=None), N, "batch_size=None"),
        (DataLoader(numbered(), batch_size=8, in_order=False), 5, "in_order=False"),
        ([1, 2, 3], 3, "a list is not a torch DataLoader"),
        (Doubling(numbered(), batch_size=8), 10, "overrides DataLoader.__iter__"),
        (DataLoader(Subset(numbered(), [0.5, 1.0]), batch_sampler=[]), 0, "flat list of integers"),
    ],
)
def test_what_has_no_ids_says_why_and_is_iterated_as_it_is(loader: Any, count: int, said: str) -> None:
    recorded = RecordedLoader(loader)
    assert recorded.reason is not None
    assert said in recorded.reason
    assert sum(1 for _ in recorded) == count
    assert recorded.ids_of_batch() is None


def test_keys_that_are_not_integers_end_the_ids_and_not_the_epoch() -> None:
    recorded = RecordedLoader(DataLoader(Keyed(), batch_sampler=[["1", "2"], ["2"]]))
    assert [batch.tolist() for batch in recorded] == [[1.0, 2.0], [2.0]]
    assert recorded.ids_of_batch() is None
    assert recorded.reason is not None
    assert "integer positions" in recorded.reason


def test_the_users_loader_is_not_modified() -> None:
    loader = make("shuffle", 0, numbered())
    before = dict(vars(loader))
    recorded = RecordedLoader(loader)
    list(recorded)
    assert vars(loader) == before
    assert type(loader.batch_sampler) is BatchSampler
    assert len(recorded) == len(loader)


def test_attributes_set_between_epochs_count_as_on_the_plain_loader() -> None:
    loader = make("sequential", 0, numbered())
    recorded = RecordedLoader(loader)
    list(recorded)
    loader.collate_fn = len
    assert list(recorded) == [8, 8, 8, 8, 5]


def test_a_loader_whose_persistent_workers_run_already_is_left_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(numbered(), batch_size=8, num_workers=1, persistent_workers=True)
        list(loader)
        recorded = RecordedLoader(loader)
    assert recorded.reason is not None
    assert "persistent workers" in recorded.reason


def test_a_fingerprint_follows_type_length_and_content() -> None:
    same = fingerprint(numbered())
    assert same == fingerprint(numbered())
    assert same == fingerprint(Subset(numbered(), [1, 2]))
    assert same != fingerprint(numbered(N + 1))
    assert same != fingerprint(TensorDataset(torch.arange(N), torch.arange(N) * 3))
    assert fingerprint([(torch.zeros(2), 1)]) != fingerprint([(torch.ones(2), 1)])
    assert fingerprint(ConcatDataset([numbered(), numbered()])) == f"ConcatDataset:{2 * N}:-"
    assert fingerprint(Streamed()) == "Streamed:?:-"


def test_a_fingerprint_fetches_no_item_and_draws_no_random_number() -> None:
    seed_all()
    before = random_state()
    fingerprint(NoisyDataset())
    assert random_state() == before


def test_index_lists_that_are_noted_as_arrays_are_the_same_lists() -> None:
    dataset = TensorDataset(torch.arange(30))
    kept: dict[bool, list[Any]] = {}
    order = {}
    for packs in (False, True):
        recorded = RecordedLoader(DataLoader(dataset, batch_size=4, shuffle=True))
        torch.manual_seed(5)
        batches = recorded.batches()
        assert isinstance(batches, RecordedIterator)
        batches.packs = packs
        kept[packs] = []
        for (samples,) in batches:
            positions = recorded.ids_of_batch()
            assert isinstance(positions, array if packs else list)
            assert samples.tolist() == list(positions)
            kept[packs].append(positions)
        order[packs] = recorded.order()
    # Each is its own, though one room is packed into, and the last one is shorter.
    assert list(map(list, kept[True])) == kept[False]
    assert list(map(len, kept[True])) == [4] * 7 + [2]
    assert order[True] == order[False] != 0
