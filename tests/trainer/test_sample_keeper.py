"""Finding the slices' members takes a bounded time of a run, and one hiccup does not decide it."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from automode.trainer import sample_keeper
from automode.trainer.sample_keeper import SampleKeeper
from automode.trainer.sample_source import READ_BATCH

pytestmark = pytest.mark.torch

BATCHES = 20


def found(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a keeper finds where the batches take so long to read, the last ones as the last."""
    clock = itertools.accumulate(itertools.chain([0.0], seconds, itertools.repeat(seconds[-1])))
    monkeypatch.setattr(sample_keeper, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def batch(ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.as_tensor(ids), torch.as_tensor(ids) % 2

    scanner: Any = SimpleNamespace(
        train_ids=np.arange(BATCHES * READ_BATCH), source=SimpleNamespace(batch=batch)
    )
    keeper = SampleKeeper(
        folder=Path(), scanner=scanner, slices={"odd": lambda inputs, targets: targets == 1}, listed=()
    )
    return keeper._found()


def test_a_slow_first_batch_does_not_keep_the_rest_from_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    members, why = found(monkeypatch, [0.4, 0.001])
    assert members["odd"].tolist() == [i % 2 == 1 for i in range(BATCHES * READ_BATCH)]
    assert why == {}


def test_samples_that_take_too_long_to_read_are_not_read_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members, why = found(monkeypatch, [0.2])
    assert members == {}
    assert "would take about 4 s, and no more than 2 are taken" in why["odd"]
