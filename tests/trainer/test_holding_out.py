"""A share of the training data held out by sample id: by class, seeded, out of every batch, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from automode.errors import DataError, UsageError
from automode.planner.policy import EvidencePolicy
from automode.trainer.curation import Curation
from automode.trainer.held_back import HeldBack
from automode.trainer.holding_out import hold_out
from automode.trainer.ids import RecordedLoader
from automode.trainer.new_labels import NewLabels

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
N = 200
NOTHING = np.empty(0, dtype=np.int64)


def data(n: int = N) -> TensorDataset:
    return TensorDataset(torch.arange(n), torch.arange(n) % 4)


def loader(dataset: Any = None, size: int = 16, **more: Any) -> RecordedLoader:
    given = data() if dataset is None else dataset
    seeded = torch.Generator().manual_seed(1)
    return RecordedLoader(
        DataLoader(given, **({"batch_size": size, "shuffle": True, "generator": seeded} | more))
    )


def policy(share: float | None = 0.2, least: int = 10) -> EvidencePolicy:
    return EvidencePolicy(holdout_share=share, min_samples=least)


def held(source: RecordedLoader, share: float = 0.2, seed: int = 3) -> HeldBack:
    with pytest.warns(UserWarning, match="training samples are held out to judge by, and never trained on"):
        found = hold_out(policy(share), "act", source, CPU, seed)
    assert found is not None
    return found[1]


def test_each_class_gives_its_share_and_the_seed_says_which() -> None:
    back = held(loader())
    assert back.ids.size == 40
    assert np.bincount(back.ids % 4).tolist() == [10] * 4
    assert back.trained == pytest.approx(0.8)
    assert held(loader()).ids.tolist() == back.ids.tolist()
    assert held(loader(), seed=4).ids.tolist() != back.ids.tolist()
    assert not np.isin(back.stand_ins, back.ids).any()


def test_what_is_held_out_is_read_in_two_halves() -> None:
    source = loader()
    with pytest.warns(UserWarning, match="held out"):
        found = hold_out(policy(), "act", source, CPU, 3)
    assert found is not None
    held_out, back = found
    assert held_out.ids.tolist() == back.ids.tolist()
    assert (held_out.n_a, held_out.n_b) == (20, 20)
    read = np.concatenate([batch[0].numpy() for batch, _ in held_out.batches(None)])
    assert read.tolist() == back.ids.tolist()


def test_no_batch_holds_any_and_the_others_come_as_the_loader_draws_them() -> None:
    plain = [inputs.tolist() for inputs, _ in loader()]
    source = loader()
    back = held(source)
    curation = Curation(source, NOTHING, held=back)
    for batch, whole in zip(source, plain, strict=True):
        (inputs, labels), positions = curation(batch, source.ids_of_batch())
        assert inputs.tolist() == [i for i in whole if i not in back.ids]
        assert labels.tolist() == [i % 4 for i in inputs.tolist()]
        assert list(positions or ()) == inputs.tolist()


def test_a_batch_of_which_nothing_would_remain_gets_others_in_their_places_and_the_same_ones_again() -> None:
    source = loader()
    back = held(source)
    gone, stays = back.ids[:3].tolist(), int(back.stand_ins[0])
    for _ in range(2):
        for rows, whole in (([gone[0]], 1), ([gone[1], stays], 2), (gone, 3)):
            (inputs, labels), positions = Curation(source, NOTHING, held=back)(
                [torch.tensor(rows), torch.tensor(rows) % 4], rows
            )
            stood_in = [int(back.stand_ins[np.searchsorted(back.ids, i)]) if i in gone else i for i in rows]
            assert inputs.tolist() == list(positions or ()) == stood_in
            assert labels.tolist() == [i % 4 for i in stood_in]
            assert len(stood_in) == whole


def test_what_an_adopted_card_leaves_out_is_left_out_besides() -> None:
    source = loader()
    back = held(source)
    more = np.setdiff1d(np.arange(30), back.ids)[:5]
    curation = Curation(source, more, NewLabels.of([50], [3]), back)
    seen = []
    for batch in source:
        (inputs, _), _ = curation(batch, source.ids_of_batch())
        seen += inputs.tolist()
    assert sorted(seen) == np.setdiff1d(np.arange(N), np.union1d(more, back.ids)).tolist()
    assert curation.excluded.tolist() == more.tolist()


def test_ids_are_those_of_the_root_dataset_and_a_sample_that_comes_twice_is_out_twice() -> None:
    source = loader(Subset(data(400), [*range(100, 250), *range(100, 120)]))
    back = held(source)
    assert back.of == 150
    curation = Curation(source, NOTHING, held=back)
    kept = [i for batch in source for i in curation(batch, source.ids_of_batch())[0][0].tolist()]
    assert not np.isin(kept, back.ids).any()
    assert len(kept) == 170 - back.ids.size - int((back.ids < 120).sum())


def test_batches_that_lose_their_ids_end_the_run() -> None:
    source = loader()
    curation = Curation(source, NOTHING, held=held(source))
    with pytest.raises(DataError, match="held-out samples cannot be kept out of training any more"):
        curation([torch.arange(3)], None)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ((torch.tensor(i), torch.tensor(0)) for i in range(N))


class Holder:
    """A batch that nobody can look into."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples


@pytest.mark.parametrize(
    ("source", "share", "told"),
    [
        (lambda: loader(Stream(), shuffle=False), 0.2, "IterableDataset has no positions"),
        (lambda: loader(size=7), 0.2, "batches of 7 are too small"),
        (lambda: loader(collate_fn=Holder), 0.2, "not tensors with one row a sample"),
        (loader, 0.05, "is 10, and the two halves need 10 each: name a larger share"),
        (lambda: RecordedLoader([(torch.zeros(9), torch.zeros(9))]), 0.2, "cannot hold training samples out"),
    ],
)
def test_what_cannot_be_held_out_is_refused_with_the_reason(source: Any, share: float, told: str) -> None:
    with pytest.raises(UsageError, match=told) as raised:
        hold_out(policy(share), "act", source(), CPU, 3)
    assert "pass a validation loader" in str(raised.value)


def test_training_data_are_never_split_but_to_act_on_and_where_it_is_asked_for() -> None:
    assert hold_out(policy(None), "act", loader(), CPU, 3) is None
    assert hold_out(policy(), "off", loader(), CPU, 3) is None
    for mode in ("observe", "propose"):
        with pytest.warns(UserWarning, match=f"holds nothing out in {mode} mode"):
            assert hold_out(policy(), mode, loader(), CPU, 3) is None  # type: ignore[arg-type]
