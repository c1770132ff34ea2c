"""The place in the training data: said at any step boundary, and found again in a new process without replacing a sampler.

Before an epoch's iterator is made, every random state that it may draw from is noted (those of torch alone, where the samplers are
torch's own and samples are read in this process). To take the place up again, those
states are put back, the iterator is made the same way, and the batches that were trained on are passed over: a torch
``DataLoader``'s index lists are drawn and dropped without reading a sample; where workers may draw random numbers of their own,
and where there are no index lists, the batches are really read and dropped. Then the states of the cut are put back.

Whether the place is the same is checked, not believed: by a checksum of the index lists, or of the last batch that was read
again. What is not the same, or cannot be known, is said in words.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from automode.session.rng_state import pack_rng, unpack_rng
from automode.trainer.ids import RecordedLoader, array_bytes
from automode.trainer.live_state import LiveState, Parts, draws_nothing
from automode.trainer.random_state import RandomState, forked_rng
from automode.trainer.trees import tensors_in

_BYTES_COMPARED = 1 << 14
_TENSORS_COMPARED = 4
_OTHER_ORDER = (
    "the sampler, asked again under the same random states, gives other samples than those trained on: it draws from "
    "generators or counters that cannot be found"
)
_OTHER_CONTENT = (
    "the batch before the cut, read again under the same random states, has another content: the data draw from generators "
    "or counters that cannot be found"
)


class DataCursor:
    """Hands out the training batches, epoch by epoch, and knows the place.

    Args:
        loader: The user's loader.

    Attributes:
        read: Batches of the running epoch that were trained on; the loop counts them.
        epoch_begun: Whether the running epoch's iterator exists.
    """

    def __init__(self, loader: RecordedLoader) -> None:
        self.loader = loader
        self.read = 0
        self.epoch_begun = False
        self._live = LiveState(loader.loader)
        self._how = _way(loader)
        self._start: tuple[RandomState, Parts] | None = None
        self._content = 0
        self._open: Iterator[Any] | None = None
        self._cut: Mapping[str, Any] | None = None

    def batches(self) -> Iterator[Any]:
        """Give the batches of the next epoch; after :meth:`take_up`, the rest of the epoch that was cut."""
        if self._open is not None:
            batches, self._open = self._open, None
        else:
            self.read = 0
            self._start = (self._states(), self._live.take())
            batches = iter(self.loader)
            self.epoch_begun = True
        return batches if self._how in ("skip", "list") else map(self._looked_at, batches)

    def ended(self) -> None:
        """Know that the epoch is over."""
        self.epoch_begun = False
        self.read = 0

    def state(self) -> dict[str, Any]:
        """Say the place, and every random state there; plain data and tensors, for :meth:`take_up`."""
        found: dict[str, Any] = {"read": self.read, "begun": self.epoch_begun, "how": self._how}
        found["now"] = {"random": pack_rng(), "live": self._live.take()}
        if self.epoch_begun and self._start is not None:
            before, live = self._start
            with forked_rng():
                before.restore()
                found["start"] = {"random": pack_rng(), "live": live}
            found["order"] = self.loader.order(self.read)
            found["ahead"] = list(self.loader.ahead())
            found["content"] = self._content
        return found

    @property
    def began(self) -> tuple[RandomState, Parts] | None:
        """The random states that it may draw from and the loader's own, as the running epoch began; None between epochs."""
        return self._start if self.epoch_begun else None

    def doubts(self, epoch: int) -> list[str]:
        """Say what about this place cannot be exact, as far as it is known while the run goes on.

        Args:
            epoch: The running epoch, from 0.
        """
        loader, found = self.loader.loader, self._live.lost()
        if not isinstance(loader, DataLoader) or not loader.num_workers:
            return found
        if not getattr(loader, "in_order", True):
            found.append("the loader's workers hand out batches in any order (in_order=False)")
        if loader.persistent_workers and epoch > 0 and self._how != "skip":
            found.append(
                "the loader's workers live on from epoch to epoch (persistent_workers=True), and what they hold cannot be read"
            )
        return found

    def take_up(self, state: Mapping[str, Any]) -> list[str]:
        """Find the place again; the random states of the cut are put back by :meth:`go_on`.

        Args:
            state: What :meth:`state` gave.

        Returns:
            What is not the same, or cannot be known, in words; empty where the place is exactly the same.
        """
        self._cut = state["now"]
        self.read = int(state["read"])
        self.epoch_begun = bool(state["begun"])
        reasons = _put_random(state["now"]["random"])
        if not self.epoch_begun:
            return reasons + self._live.put(state["now"]["live"], samplers=True)
        _put_random(state["start"]["random"])
        reasons += self._live.put(state["start"]["live"], samplers=True)
        self._start = (self._states(), self._live.take())
        skipping = self._how == "skip"
        batches = self.loader.batches(skip=self.read if skipping else 0)
        missing = 0 if skipping else self._pass_over(batches)
        self._open = batches
        if missing:
            return [*reasons, f"the loader now ends {missing} batches before the place of the cut"]
        return reasons + self._compared(state)

    def go_on(self) -> None:
        """Put back the random states of the cut, right before training goes on; before a run's first step there is none."""
        cut, self._cut = self._cut, None
        if cut is not None:
            _put_random(cut["random"])
            self._live.put(cut["live"], samplers=not self.epoch_begun)

    def _states(self) -> RandomState:
        """The states that the next iterator may draw from: torch's own samplers draw from torch's generators alone."""
        return RandomState.of_torch() if self.loader.draws_from_torch else RandomState.capture()

    def _pass_over(self, batches: Iterator[Any]) -> int:
        """Read and drop what was trained on already; returns how many batches were not there."""
        passed = 0
        for batch in itertools.islice(batches, self.read):
            passed += 1
            if self._how == "read":
                self._looked_at(batch)
        return self.read - passed

    def _compared(self, state: Mapping[str, Any]) -> list[str]:
        if self._how != state["how"]:
            return ["the loader is read in another way than it was"]
        if self.loader.recorded:
            count, ahead = state["ahead"]
            if self.loader.order(self.read) != state["order"] or self.loader.ahead(count) != (count, ahead):
                return [_OTHER_ORDER]
        if self._how == "read" and self._content != state["content"]:
            return [_OTHER_CONTENT]
        return []

    def _looked_at(self, batch: Any) -> Any:
        self._content = _content_of(batch)
        return batch


def _way(loader: RecordedLoader) -> str:
    """How batches are passed over: ``skip`` (samples are not read), ``list`` (nothing happens) or ``read``."""
    given: Any = loader.loader
    if isinstance(given, list | tuple):
        return "list"
    if not loader.recorded:
        return "read"
    quiet = (
        draws_nothing(given.dataset) and given.collate_fn is default_collate and given.worker_init_fn is None
    )
    return "skip" if quiet or not given.num_workers else "read"


def _content_of(batch: Any) -> int:
    """A checksum of the beginning of the first tensors of a batch; of its text where it has none."""
    crc, tensors = 0, list(itertools.islice(_tensors(batch), _TENSORS_COMPARED))
    for tensor in tensors:
        head = tensor.detach().reshape(-1)[: _BYTES_COMPARED // tensor.element_size()]
        crc = zlib.crc32(array_bytes(head), zlib.crc32(str(tuple(tensor.shape)).encode(), crc))
    return crc if tensors else zlib.crc32(repr(batch)[:_BYTES_COMPARED].encode())


def _tensors(batch: Any) -> Iterable[Tensor]:
    return (tensor for tensor in tensors_in(batch) if tensor.layout is torch.strided)


def _put_random(packed: Mapping[str, Any]) -> list[str]:
    """Set the global random states; those of CUDA only where there are as many devices."""
    cuda = packed["cuda"]
    if cuda and len(cuda) != torch.cuda.device_count():
        unpack_rng({**packed, "cuda": []})
        return [
            f"random states of {len(cuda)} CUDA devices came, and there are {torch.cuda.device_count()} here"
        ]
    unpack_rng(dict(packed))
    return []
