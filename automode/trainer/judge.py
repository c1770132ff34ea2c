"""What specialists are judged by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from automode.planner.metrics import Metric


class Judge(Protocol):
    """Scores candidates on val-A."""

    def choose(
        self,
        model: nn.Module,
        candidates: Mapping[str, Mapping[str, Tensor]],
        metric: Metric = "utility",
    ) -> tuple[str, float, float]:
        """Return (name of the best, its mean by the metric, sample passes spent)."""
        ...
