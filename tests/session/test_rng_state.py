"""Random states go out as plain text and come back exactly."""

# ruff: noqa: NPY002 - numpy's global generator is what is tested
from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from automode.errors import SessionError
from automode.session.checkpoints import CheckpointStore
from automode.session.rng_state import pack_rng, unpack_rng

pytestmark = pytest.mark.torch


def _draw() -> tuple[Any, ...]:
    return (
        [random.random() for _ in range(5)],
        random.gauss(0, 1),
        np.random.rand(5).tolist(),
        np.random.randn(3).tolist(),
        torch.rand(5).tolist(),
        torch.randn(3).tolist(),
    )


@pytest.fixture(autouse=True)
def _leave_the_global_states_alone() -> Any:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def test_what_follows_is_the_same_after_unpacking() -> None:
    random.gauss(0, 1)  # leaves half a pair behind in Python's generator,
    np.random.randn(3)  # and in numpy's
    packed = pack_rng()
    first = _draw()
    assert _draw() != first
    unpack_rng(packed)
    assert _draw() == first


def test_packing_draws_nothing() -> None:
    packed = pack_rng()
    pack_rng()
    first = _draw()
    unpack_rng(packed)
    assert _draw() == first


def test_the_packed_state_survives_json_and_safe_loading(tmp_path: Path) -> None:
    packed = pack_rng()
    first = _draw()
    unpack_rng(json.loads(json.dumps(packed)))
    assert _draw() == first
    store = CheckpointStore(tmp_path)
    unpack_rng(store.load(store.save({}, {"rng": packed}, {}))[1]["rng"])
    assert _draw() == first


def test_a_state_of_another_version_is_refused_and_changes_nothing() -> None:
    packed = pack_rng()
    with pytest.raises(SessionError, match="version 99"):
        unpack_rng({**packed, "version": 99})
    assert pack_rng() == packed


def test_states_for_other_cuda_devices_are_refused_and_change_nothing() -> None:
    packed = pack_rng()
    states = ["00" * 16] * (torch.cuda.device_count() + 1)
    with pytest.raises(SessionError, match="CUDA devices"):
        unpack_rng({**packed, "cuda": states})
    assert pack_rng() == packed


def test_a_numpy_state_of_another_kind_is_refused_and_changes_nothing() -> None:
    packed = pack_rng()
    other = {**packed["numpy"], "bit_generator": "PCG64"}
    with pytest.raises(SessionError, match="of another kind"):
        unpack_rng({**packed, "numpy": other})
    assert pack_rng() == packed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_after_unpacking() -> None:
    torch.rand(1, device="cuda")
    packed = pack_rng()
    assert len(packed["cuda"]) == torch.cuda.device_count()
    first = torch.rand(5, device="cuda").tolist()
    unpack_rng(packed)
    assert torch.rand(5, device="cuda").tolist() == first
