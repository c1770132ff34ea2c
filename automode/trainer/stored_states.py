"""Where states of a run and of its trials are kept, as far as training has to know it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor


class Checkpoints(Protocol):
    """Saves and loads states by digest."""

    def save(
        self, weights: Mapping[str, Tensor], rest: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> str:
        """Make a state durable; returns its digest."""
        ...

    def load(self, digest: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Return (weights, rest, manifest), verified."""
        ...

    def delete(self, digests: Iterable[str]) -> list[str]:
        """Delete these; returns what was deleted."""
        ...
