"""The place in the training data: found again in another loader of the same making, or said to be lost."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from automode.trainer.data_cursor import DataCursor
from automode.trainer.ids import RecordedLoader

pytestmark = pytest.mark.torch

ROWS, BATCH, BATCHES = 30, 4, 8
MAKERS: dict[str, Callable[[], Any]] = {}


def maker(function: Callable[[], Any]) -> Callable[[], Any]:
    MAKERS[function.__name__] = function
    return function


def rows() -> TensorDataset:
    return TensorDataset(torch.arange(float(ROWS)), torch.arange(ROWS))


class Augmented(Dataset[Any]):
    """Every sample is drawn with global random numbers of all kinds, and with a generator of its own."""

    def __init__(self) -> None:
        self.own = random.Random(3)
        self.reads = 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        drawn = random.random() + float(np.random.rand()) + float(torch.rand(())) + self.own.random()  # noqa: NPY002
        return torch.tensor(float(index) + drawn + self.reads), index


class Stream(IterableDataset[Any]):
    """A stream that shuffles itself with a generator of its own, and may augment with the global one."""

    def __init__(self, augments: bool = False) -> None:
        self.own = np.random.default_rng(5)
        self.augments = augments

    def __iter__(self) -> Iterator[Any]:
        for index in self.own.permutation(ROWS):
            yield torch.tensor(float(index)) + (torch.rand(()) if self.augments else 0)


class Epochs(Sampler[int]):
    """Its own order for each epoch, by a counter; it saves itself too."""

    def __init__(self) -> None:
        self.epoch = 0
        self.order: list[int] = []

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        self.order = random.Random(self.epoch).sample(range(ROWS), ROWS)
        return iter(self.order)


class Saving(Epochs):
    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


class Lazy(Sampler[int]):
    """Draws each position when it is asked for, with the global generator that training draws from too."""

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        for _ in range(ROWS):
            yield int(torch.randint(ROWS, ()))


@maker
def shuffled() -> Any:
    return DataLoader(rows(), BATCH, shuffle=True)


@maker
def shuffled_by_a_generator() -> Any:
    return DataLoader(rows(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))


@maker
def with_replacement() -> Any:
    return DataLoader(rows(), BATCH, sampler=RandomSampler(rows(), replacement=True))


@maker
def weighted() -> Any:
    generator = torch.Generator().manual_seed(3)
    return DataLoader(
        rows(), BATCH, sampler=WeightedRandomSampler(torch.arange(1.0, ROWS + 1), ROWS, generator=generator)
    )


@maker
def own_batch_sampler() -> Any:
    return DataLoader(rows(), batch_sampler=BatchSampler(Epochs(), BATCH, drop_last=False))


@maker
def own_sampler_that_saves_itself() -> Any:
    return DataLoader(rows(), BATCH, sampler=Saving())


@maker
def augmented() -> Any:
    return DataLoader(Augmented(), BATCH, shuffle=True)


@maker
def augmented_with_a_generator() -> Any:
    return DataLoader(Augmented(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3))


@maker
def workers() -> Any:
    return DataLoader(rows(), BATCH, shuffle=True, num_workers=2)


@maker
def augmented_in_workers() -> Any:
    return DataLoader(
        Augmented(), BATCH, shuffle=True, num_workers=2, generator=torch.Generator().manual_seed(3)
    )


@maker
def stream() -> Any:
    return DataLoader(Stream(), BATCH)


@maker
def batches_in_a_list() -> Any:
    return list(torch.arange(float(ROWS)).split(BATCH))


def train(cursor: DataCursor, cut: int | None) -> tuple[list[Any], dict[str, Any] | None]:
    """Walk two epochs with a draw after each batch, as dropout draws; the batches, and the state after ``cut`` of them."""
    seen: list[Any] = []
    state = None
    cursor.go_on()
    epochs = 2 if cut is None or cut >= 0 else 1
    for _ in range(epochs):
        for batch in cursor.batches():
            values = batch[0] if isinstance(batch, list | tuple) else batch
            seen.append((values.tolist(), float(torch.rand(())), random.random()))
            cursor.read += 1
            if len(seen) == cut:
                state = stored(cursor.state())
        cursor.ended()
        if cut is not None and len(seen) == BATCHES and cut == 0:
            state = stored(cursor.state())
    return seen, state


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """What safe loading makes of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def cursor_of(make: Callable[[], Any]) -> DataCursor:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002
    return DataCursor(RecordedLoader(make()))


def rest_of(make: Callable[[], Any], state: dict[str, Any], epochs: int) -> tuple[list[Any], list[str]]:
    """Take the place up in a process whose random states are others, and walk on."""
    cursor = cursor_of(make)
    torch.manual_seed(1000)
    random.seed(1000)
    doubts = cursor.take_up(state)
    torch.rand(7)
    seen: list[Any] = []
    cursor.go_on()
    for _ in range(epochs):
        for batch in cursor.batches():
            values = batch[0] if isinstance(batch, list | tuple) else batch
            seen.append((values.tolist(), float(torch.rand(())), random.random()))
            cursor.read += 1
        cursor.ended()
    return seen, doubts


@pytest.mark.parametrize("name", MAKERS)
def test_the_rest_is_the_same_wherever_it_is_cut(name: str) -> None:
    make = MAKERS[name]
    whole, _ = train(cursor_of(make), None)
    cuts = (1, 3, BATCHES, BATCHES + 1, 2 * BATCHES - 1, 2 * BATCHES)
    for cut in cuts if "workers" not in name else (3, BATCHES + 1):
        _, state = train(cursor_of(make), cut)
        assert state is not None
        seen, doubts = rest_of(make, state, 2 if cut <= BATCHES else 1)
        assert seen == whole[cut:], cut
        assert doubts == []


@pytest.mark.parametrize("name", ["shuffled", "augmented_with_a_generator", "own_batch_sampler", "stream"])
def test_a_cut_between_two_epochs_begins_the_next_one_as_it_would_have_begun(name: str) -> None:
    make = MAKERS[name]
    whole, _ = train(cursor_of(make), None)
    _, state = train(cursor_of(make), 0)
    assert state is not None
    assert state["begun"] is False
    seen, doubts = rest_of(make, state, 1)
    assert seen == whole[BATCHES:]
    assert doubts == []


def test_passing_over_batches_reads_no_sample_where_nothing_can_be_missed_by_it() -> None:
    _, state = train(cursor_of(augmented), 5)
    assert state is not None
    dataset = Augmented()
    cursor = cursor_of(lambda: DataLoader(dataset, BATCH, shuffle=True))
    cursor.take_up(state)
    assert dataset.reads == 0
    cursor.go_on()
    assert dataset.reads == 5 * BATCH  # the counter of the cut, put back


def test_a_sampler_whose_draws_cannot_be_repeated_is_said_to_be_approximate() -> None:
    _, state = train(cursor_of(lambda: DataLoader(rows(), BATCH, sampler=Lazy())), 5)
    assert state is not None
    _, doubts = rest_of(lambda: DataLoader(rows(), BATCH, sampler=Lazy()), state, 1)
    assert len(doubts) == 1
    assert "gives other samples" in doubts[0]


def test_a_stream_that_draws_between_the_steps_cannot_be_checked_and_is_said_to_be_approximate() -> None:
    whole, _ = train(cursor_of(lambda: DataLoader(Stream(augments=True), BATCH)), None)
    _, state = train(cursor_of(lambda: DataLoader(Stream(augments=True), BATCH)), 5)
    assert state is not None
    seen, doubts = rest_of(lambda: DataLoader(Stream(augments=True), BATCH), state, 2)
    assert (
        seen == whole[5:]
    )  # this one is the same: its order does not depend on what it could not draw again
    assert len(doubts) == 1
    assert "another content" in doubts[0]


class Unwilling(Saving):
    def state_dict(self) -> dict[str, Any]:
        if self.epoch:
            raise RuntimeError("not now")
        return {"epoch": self}


def test_a_sampler_that_cannot_save_itself_ends_no_run_and_is_a_reason_for_doubt() -> None:
    cursor = cursor_of(lambda: DataLoader(rows(), BATCH, sampler=Unwilling()))
    batches = cursor.batches()
    assert "more than numbers" in cursor.doubts(0)[0]
    next(batches)
    stored(cursor.state())
    assert "RuntimeError: not now" in cursor.doubts(0)[0]


class Hidden(IterableDataset[Any]):
    """A stream that goes on where another one stopped, by a counter that no attribute shows."""

    count = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(ROWS):
            Hidden.count += 1
            yield torch.tensor(float(Hidden.count))


def test_data_that_hide_a_counter_are_said_to_be_approximate() -> None:
    _, state = train(cursor_of(lambda: DataLoader(Hidden(), BATCH)), 5)
    assert state is not None
    _, doubts = rest_of(lambda: DataLoader(Hidden(), BATCH), state, 1)
    assert len(doubts) == 1
    assert "another content" in doubts[0]


def test_a_loader_that_lost_its_generator_is_said_to_be_approximate() -> None:
    _, state = train(cursor_of(shuffled_by_a_generator), 5)
    assert state is not None
    _, doubts = rest_of(shuffled, state, 1)
    assert any("generator" in doubt for doubt in doubts)


def test_a_loader_that_ends_before_the_place_is_said_to_be_approximate() -> None:
    def numbers() -> Iterator[Any]:
        yield from torch.arange(float(ROWS)).split(BATCH)

    cursor = cursor_of(numbers)
    for _ in cursor.batches():
        cursor.read += 1
        if cursor.read == 5:
            break
    state = stored(cursor.state())
    doubts = cursor_of(lambda: iter([torch.zeros(1)] * 3)).take_up(state)
    assert doubts == ["the loader now ends 2 batches before the place of the cut"]


@pytest.mark.parametrize(
    ("given", "epoch", "said"),
    [
        ({"num_workers": 2, "persistent_workers": True}, 1, "persistent_workers"),
        ({"num_workers": 2, "in_order": False}, 0, "in_order"),
        ({"num_workers": 2, "persistent_workers": True}, 0, None),
        ({"num_workers": 2}, 3, None),
        ({}, 3, None),
    ],
)
def test_what_cannot_be_exact_is_known_beforehand(
    given: dict[str, Any], epoch: int, said: str | None
) -> None:
    doubts = cursor_of(lambda: DataLoader(Augmented(), BATCH, **given)).doubts(epoch)
    assert len(doubts) == (said is not None)
    assert said is None or said in doubts[0]


def test_only_the_states_that_an_iterator_may_draw_from_are_noted_as_its_epoch_begins() -> None:
    noted = {}
    for name in ("shuffled", "augmented", "weighted", "own_batch_sampler"):
        cursor = cursor_of(MAKERS[name])
        next(iter(cursor.batches()))
        assert cursor.began is not None
        noted[name] = bool(cursor.began[0].numpy), bool(cursor.began[0].python)
    # What a sample draws while it is read is drawn after the samplers', and is put back with the states of the cut.
    assert noted["shuffled"] == noted["augmented"] == (False, False)
    assert noted["weighted"] == noted["own_batch_sampler"] == (True, True)
