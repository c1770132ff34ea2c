"""Held-out data is split fairly and once, read without a trace, and recognised where it is training data."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from automode.planner.pricing import CHOOSING
from automode.trainer.evaluation import Evaluator
from automode.trainer.evidence import Evidence
from automode.trainer.heldout import HeldOut, find_overlap
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.steps import pair_step

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")


def classes(n: int = 90, seed: int = 0) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.zeros(n * 2 // 3), torch.ones(n // 4), torch.full((n - n * 2 // 3 - n // 4,), 2)]
    ).long()
    return TensorDataset(torch.randn(n, 5, generator=g), labels)


def held(dataset: Any, *, seed: int = 3, **options: Any) -> HeldOut:
    return HeldOut(DataLoader(dataset, **{"batch_size": 16, "shuffle": True, **options}), CPU, seed)


class Items(Dataset[Any]):
    """A dataset that shows nothing but items, and draws from every generator for each."""

    def __init__(self, rows: TensorDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        x, y = self.rows[index]
        return x + torch.rand(()) + random.random() + np.random.rand(), int(y)  # noqa: NPY002


class Quiet(Items):
    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@pytest.mark.parametrize("wrap", [lambda d: d, Items, Quiet], ids=["tensors", "noisy items", "items"])
def test_the_halves_are_disjoint_complete_and_alike_in_classes(wrap: Any) -> None:
    data = classes()
    found = held(wrap(data))
    assert found.reason is None
    assert found.ids.tolist() == list(range(90))
    in_a = found.is_a(found.ids)
    assert (found.n_a, found.n_b) == (45, 45)
    for label in range(3):
        mine = (data.tensors[1] == label).numpy()
        assert abs(int(in_a[mine].sum()) - int((~in_a)[mine].sum())) <= 1


def test_the_split_follows_the_seed_and_not_the_global_state() -> None:
    torch.manual_seed(0)
    first = held(classes(), seed=3)
    torch.manual_seed(9)
    assert np.array_equal(first.is_a(first.ids), held(classes(), seed=3).is_a(first.ids))
    assert not np.array_equal(first.is_a(first.ids), held(classes(), seed=4).is_a(first.ids))


def test_ids_are_those_of_the_root() -> None:
    root = classes()
    found = held(Subset(root, [80, 3, 41, 7]))
    assert found.ids.tolist() == [3, 7, 41, 80]
    for (x, y), ids in found.batches(None):
        torch.testing.assert_close(x, root.tensors[0][ids])
        torch.testing.assert_close(y, root.tensors[1][ids])


@pytest.mark.parametrize("part", ["A", "B", None])
@pytest.mark.parametrize("wrap", [lambda d: d, Quiet], ids=["tensors", "items"])
def test_a_pass_gives_each_sample_of_its_part_once_with_its_id(part: Any, wrap: Any) -> None:
    data = classes()
    found = held(wrap(data), drop_last=True)
    seen = []
    for (x, _), ids in found.batches(part):
        torch.testing.assert_close(x, data.tensors[0][ids])
        seen.extend(ids.tolist())
    expected = found.ids if part is None else found.ids[found.is_a(found.ids) == (part == "A")]
    assert sorted(seen) == expected.tolist()


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.parametrize("iterable", [False, True])
def test_a_pass_draws_no_random_number_even_when_it_is_left_half_way(iterable: bool) -> None:
    loader: Any = DataLoader(Items(classes()), batch_size=16, shuffle=True)
    found = HeldOut(list(loader) if iterable else loader, CPU, 0)
    before = states()
    passing = found.batches(None)
    next(passing)
    assert states() == before
    torch.rand(1)
    moved = states()
    next(passing)
    del passing
    assert states() == moved


def test_a_loader_without_ids_is_read_as_it_is_without_a_trace() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for index in range(10):
                yield torch.rand(2), index

    found = HeldOut(DataLoader(Stream(), batch_size=4), CPU, 0)
    assert found.reason is not None
    before = states()
    assert [ids.tolist() for _, ids in found.batches(None)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert states() == before


def test_what_a_dataset_draws_for_a_sample_is_the_same_for_every_network_judged() -> None:
    found = held(Items(classes()))
    torch.manual_seed(0)
    first = torch.cat([x for (x, _), _ in found.batches("B")])
    torch.manual_seed(1)
    torch.testing.assert_close(torch.cat([x for (x, _), _ in found.batches("B")]), first)


class Unsized(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(2)


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ([1, 2], "is a list"),
        (DataLoader(Endless()), "iterable only"),
        (DataLoader(classes(), batch_size=None), "does not batch"),
        (DataLoader(Unsized(), sampler=[0]), "no length"),
        (DataLoader(TensorDataset(torch.empty(0, 2))), "empty"),
    ],
)
def test_what_cannot_be_split_says_why(loader: Any, said: str) -> None:
    found = HeldOut(loader, CPU, 0)
    assert found.reason is not None
    assert said in found.reason
    assert found.n_a == found.n_b == 0


def test_values_to_regress_and_large_datasets_of_items_are_not_split_by_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert held(TensorDataset(torch.randn(11, 2), torch.randn(11))).n_a in (5, 6)
    monkeypatch.setattr("automode.trainer.heldout.READ_FOR_CLASSES", 10)
    monkeypatch.setattr(Items, "__getitem__", lambda *_: pytest.fail("an item was read"))
    assert held(Items(classes())).n_a == 45


def test_targets_that_a_dataset_keeps_in_view_are_used() -> None:
    data = Items(classes())
    data.targets = data.rows.tensors[1].tolist()  # type: ignore[attr-defined]
    data.__class__ = type("Kept", (Items,), {"__getitem__": lambda *_: pytest.fail("an item was read")})
    in_a = held(data).is_a(np.arange(90))
    assert abs(int(in_a[:60].sum()) - 30) <= 1


def test_one_dataset_for_both_overlaps_by_its_ids() -> None:
    data = classes()
    assert find_overlap(data, data) == find_overlap(data, Subset(data, range(90)))
    found = find_overlap(Subset(data, range(60)), Subset(data, range(50, 90)))
    assert (found.n, found.share, found.how) == (10, 0.25, "ids")
    assert find_overlap(Subset(data, range(50)), Subset(data, range(50, 90))).n == 0


@pytest.mark.parametrize("wrap", [lambda d: d, Quiet], ids=["tensors", "items"])
def test_copies_of_training_samples_are_found_by_content(wrap: Any) -> None:
    train, other = classes(seed=0), classes(seed=1)
    both = TensorDataset(torch.cat([other.tensors[0][:30], train.tensors[0][70:80]]), torch.zeros(40))
    found = find_overlap(wrap(train), wrap(both))
    assert (found.n, found.share, found.how) == (10, 0.25, "content")
    assert find_overlap(wrap(train), wrap(other)).n == 0


def test_small_whole_numbers_do_not_collide() -> None:
    """Digit images are whole numbers 0 to 16; of 4 000 distinct ones none may look like another."""
    rng = np.random.default_rng(0)
    rows = np.unique(rng.integers(0, 17, size=(4000, 64)), axis=0)
    for kind in (torch.float32, torch.uint8, torch.float64):
        data = torch.from_numpy(rows).to(kind)
        assert find_overlap(TensorDataset(data[:2000]), TensorDataset(data[2000:])).n == 0
        assert find_overlap(TensorDataset(data), TensorDataset(data[2000:].clone())).share == 1.0


def test_rows_that_agree_in_a_few_words_are_compared_in_full() -> None:
    train = torch.zeros(50, 400)
    train[:, 1] = torch.arange(50)  # the brief hash reads other words than this one
    assert find_overlap(TensorDataset(train), TensorDataset(train[:20] + 0.0)).n == 20
    other = train[:20].clone()
    other[:, 1] += 100
    assert find_overlap(TensorDataset(train), TensorDataset(other)).n == 0


def test_what_cannot_be_compared_is_unknown() -> None:
    assert find_overlap(Endless(), classes()).how == "unknown"
    single = Quiet(TensorDataset(torch.arange(5.0), torch.arange(5)))
    assert find_overlap(single, Quiet(TensorDataset(torch.arange(5.0), torch.arange(5)))).how == "unknown"
    assert find_overlap(Quiet(classes()), Unsized()).how == "unknown"


def test_of_a_large_val_a_some_fixed_samples_choose() -> None:
    data = classes(3000)
    found = held(data)
    few = np.concatenate([ids for _, ids in found.batches("few")])
    assert few.size == CHOOSING < found.n_a
    assert found.is_a(few).all()
    share = np.bincount(data.tensors[1].numpy()[few], minlength=3) / few.size
    # The shares of classes are drawn: 4 standard errors of the largest, false failure below 1 in 10,000, and the draw is fixed.
    assert np.abs(share - [2 / 3, 1 / 4, 1 / 12]).max() < 4 * np.sqrt(2 / 9 / CHOOSING)
    again = np.concatenate([ids for _, ids in pickle.loads(pickle.dumps(found)).batches("few")])
    assert np.array_equal(few, again)
    small = held(classes())
    assert np.array_equal(*(np.concatenate([ids for _, ids in small.batches(part)]) for part in ("few", "A")))


class Given:
    """States that are constant answers."""

    def put(self, model: nn.Module, state: Any, *, averaged: bool) -> int:
        model.load_state_dict(state)
        return 0


def test_what_was_chosen_on_some_samples_is_valued_on_all_of_val_a() -> None:
    data = classes(3000)
    found = held(data)
    loss = nn.CrossEntropyLoss()
    judge = Evaluator(
        step_fn=pair_step(loss, CPU),
        batches=found.batches,
        per_sample=per_sample_twin(loss),
        autocast=contextlib.nullcontext,
        n_a=found.n_a,
    )
    model = nn.Linear(5, 3)
    states = {
        name: {"weight": torch.zeros(3, 5), "bias": 5.0 * torch.eye(3)[label]}
        for name, label in (("raw", 2), ("ema3", 0), ("tail", 1))
    }
    evidence = Evidence(judge, Given(), {})  # type: ignore[arg-type]  # what a state is does not matter here
    best, value, passes = evidence.choose(model, states)
    assert (best, passes) == ("ema3", 3 * CHOOSING + found.n_a)
    model.load_state_dict(states["ema3"])
    assert value == pytest.approx(evidence.value(model)[0], abs=1e-12)
    assert evidence.choose(model, {"raw": states["raw"]})[2] == found.n_a
