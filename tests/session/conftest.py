"""Fixtures and builders for the session's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from automode.session import Record, SessionStore

MakeRecord = Callable[..., Record]


@pytest.fixture
def record() -> MakeRecord:
    """A record that needs only its ``seq``."""

    def make(seq: int, **fields: Any) -> Record:
        defaults: dict[str, Any] = {
            "role": "input",
            "kind": "observed",
            "v": 1,
            "body": {"n": seq},
            "t_wall": 1e9 + seq,
            "t_mono": float(seq),
        }
        return Record(seq=seq, **{**defaults, **fields})

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    """A fresh session's writer."""
    with SessionStore.create(tmp_path / "run", header={"project": "p"}) as opened:
        yield opened
