"""The process-wide random states, taken and put back, so that automode's own iterations change nothing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomState:
    """States of the global generators of Python, numpy (the legacy one) and torch.

    Attributes:
        python: State of :mod:`random`; empty: not taken, and left alone when the states are put back.
        numpy: State of ``numpy.random``'s global generator; empty likewise.
        cpu: State of torch's CPU generator.
        cuda: State of the generator of each CUDA device; empty while CUDA is not in use.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cpu: torch.Tensor
    cuda: tuple[torch.Tensor, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """Take the states as they are now."""
        return cls(
            python=random.getstate(),
            numpy=tuple(np.random.get_state(legacy=True)),  # noqa: NPY002  # the global generator is what is saved
            cpu=torch.get_rng_state(),
            cuda=_cuda_states(),
        )

    @classmethod
    def of_torch(cls) -> RandomState:
        """Take torch's states alone, in a tenth of the time."""
        return cls(python=(), numpy=(), cpu=torch.get_rng_state(), cuda=_cuda_states())

    def restore(self) -> None:
        """Put the states back."""
        if self.python:
            random.setstate(self.python)
        if self.numpy:
            np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        for device, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, device)

    def same_as(self, other: RandomState) -> bool:
        """Tell whether two states would give the same random numbers."""
        return (
            self.python == other.python
            and self.numpy[2:] == other.numpy[2:]
            and np.array_equal(self.numpy[1], other.numpy[1])
            and torch.equal(self.cpu, other.cpu)
            and len(self.cuda) == len(other.cuda)
            and all(torch.equal(mine, theirs) for mine, theirs in zip(self.cuda, other.cuda, strict=True))
        )


def _cuda_states() -> tuple[torch.Tensor, ...]:
    # Asking for them would start CUDA in a process that does not use it.
    in_use = torch.cuda.is_initialized() and torch.cuda.is_available()  # type: ignore[no-untyped-call]
    return tuple(torch.cuda.get_rng_state_all()) if in_use else ()


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, those of CUDA only where it is in use.

    Args:
        seed: At least 0.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    # Not torch.manual_seed: before CUDA has started, that would leave a seed behind for it.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def forked_rng() -> Iterator[None]:
    """Run a block whose random numbers leave no trace: every global state is put back, also on an exception.

    A generator that a user made and passed to a loader or sampler is not global and is not covered.
    """
    before = RandomState.capture()
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Run a block under fixed global CPU random states, and put the states back, also on an exception.

    Args:
        seed: At least 0; the same seed gives the block the same random numbers.
    """
    with forked_rng():
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
        # Not torch.manual_seed: before CUDA has started, that would leave a seed behind for it.
        torch.default_generator.manual_seed(seed)
        yield
