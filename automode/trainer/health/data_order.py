"""Would the running epoch's batches hold the same samples again? The sampler is copied and asked anew, and compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import Subset

from automode.trainer.health.ground import Finding, Ground
from automode.trainer.live_state import LiveState, Parts
from automode.trainer.random_state import RandomState
from automode.trainer.recording_sampler import checksum_of, noted
from automode.trainer.tensor_loader import TensorLoader


def check(ground: Ground) -> Finding:
    """Draw the running epoch's index lists again, from the random states that it began with, and compare them with those seen."""
    loader, cursor = ground.parts.loader, ground.parts.cursor
    given: Any = loader.loader
    if isinstance(given, list | tuple):
        return Finding(verdict="good", why="the batches are a list, which is read in its order")
    if not loader.recorded:
        return Finding(
            verdict="unknown", why=f"index lists are not seen here: {loader.reason or 'none are noted'}"
        )
    began = cursor.began
    if began is None:
        return Finding(
            verdict="unknown",
            why="no epoch is under way, so no batch has been handed out that could be compared",
        )
    random, live = began
    order = loader.order(cursor.read)
    count, drawn = loader.ahead()
    with ground.undisturbed():
        try:
            lists = _asked_anew(ground, given, random, live)
        except Exception as error:  # whatever the user's sampler does when it is copied
            why = f"the sampler cannot be copied ({type(error).__name__}: {error}); resume checks its order all the same"
            return Finding(verdict="unknown", why=why)
        read = [noted(positions) for positions in islice(lists, cursor.read)]
        ahead = [noted(positions) for positions in islice(lists, count)]
    numbers = {"batches": float(cursor.read), "drawn_ahead": float(count)}
    same = checksum_of(read, 0) == order and (len(ahead), checksum_of(ahead, 0)) == (count, drawn)
    if same:
        why = f"the {cursor.read} batches of this epoch, drawn again, hold the same samples in the same order"
        return Finding(verdict="good", why=why, numbers=numbers)
    why = (
        f"the {cursor.read} batches of this epoch, drawn again from the states that it began with, hold other samples: the sampler "
        "draws from generators or counters that cannot be found, and a resumed run will be approximate"
    )
    return Finding(verdict="bad", why=why, numbers=numbers)


def _asked_anew(ground: Ground, given: Any, random: RandomState, live: Parts) -> Iterator[Sequence[Any]]:
    """Give the epoch's index lists, drawn from the states that it began with."""
    if isinstance(given, TensorLoader):  # each of its epochs has an order of its own
        random.restore()
        LiveState(given).put(live, samplers=True)
        return (positions for positions, _ in given.epoch(ground.parts.cursor.read))
    batch_sampler, generator = _copied(given)
    random.restore()
    proxy = SimpleNamespace(generator=generator, batch_sampler=batch_sampler)
    if hasattr(batch_sampler, "sampler"):
        proxy.sampler = batch_sampler.sampler
    LiveState(proxy).put(live, samplers=True)
    again = given.persistent_workers and ground.loop.epoch > 0
    return _drawn(given, batch_sampler, generator, again=again)


def _copied(given: Any) -> tuple[Any, Any]:
    """Copy the batch sampler and the loader's generator together, with the very dataset that they read."""
    memo: dict[int, Any] = {}
    dataset = given.dataset
    while True:
        memo[id(dataset)] = dataset
        if not isinstance(dataset, Subset):
            break
        dataset = dataset.dataset
    found: tuple[Any, Any] = copy.deepcopy((given.batch_sampler, given.generator), memo)
    return found


def _drawn(given: Any, batch_sampler: Any, generator: Any, *, again: bool) -> Iterator[Sequence[Any]]:
    """Draw index lists as the loader does: it draws a number of its own before the first, unless its workers live on."""
    lists: Iterator[Sequence[Any]] = iter(batch_sampler)
    if not again:
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        if given.num_workers:  # such a loader asks twice, and the second time counts
            lists = iter(batch_sampler)
    return lists
