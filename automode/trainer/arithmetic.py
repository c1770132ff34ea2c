"""How this process computes: settings of torch that are the process's own, so that another process can compute alike."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Self

import torch

_BACKENDS = (
    "cudnn.benchmark",
    "cudnn.deterministic",
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
)
"""Settings under ``torch.backends``; those of single precision exist from torch 2.9 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Settings of torch that change what a computation gives, the number of threads apart.

    Attributes:
        dtype: Name of the default floating-point type.
        deterministic: Whether only deterministic algorithms may be used.
        warn_only: Whether others only warn.
        matmul: Precision of single-precision products, where torch knows it by this one name; else None.
        backends: Settings under ``torch.backends`` by name.
    """

    dtype: str
    deterministic: bool
    warn_only: bool
    matmul: str | None
    backends: tuple[tuple[str, Any], ...]

    @classmethod
    def capture(cls) -> Self:
        """Read this process's settings."""
        named = hasattr(torch.backends, "fp32_precision")
        return cls(
            dtype=str(torch.get_default_dtype()).removeprefix("torch."),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            # The newer names say it all, and reading it by the older one is an error once they were used.
            matmul=None if named else torch.get_float32_matmul_precision(),
            backends=tuple(
                (name, operator.attrgetter(name)(torch.backends))
                for name in _BACKENDS
                if named or not name.endswith("fp32_precision")
            ),
        )

    def apply(self) -> None:
        """Make them this process's settings."""
        torch.set_default_dtype(getattr(torch, self.dtype))
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        if self.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        for name, value in self.backends:
            place, _, last = name.rpartition(".")
            owner = operator.attrgetter(place)(torch.backends) if place else torch.backends
            if getattr(owner, last) != value:
                setattr(owner, last, value)
