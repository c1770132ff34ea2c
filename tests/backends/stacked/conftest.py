"""What the tests of the stacked backend share, under a name that they can import; and rungs that are stacked however short."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from automode.backends import stacking_rule

_spec = importlib.util.spec_from_file_location("stacked_bench", Path(__file__).with_name("stacked_bench.py"))
assert _spec is not None
assert _spec.loader is not None
_bench = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _bench
_spec.loader.exec_module(_bench)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here survives the test, so that the disk need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rungs are stacked too, and stay so however long their steps take."""
    monkeypatch.setattr(stacking_rule, "why_too_short", lambda *_, **__: None)
    monkeypatch.setattr(stacking_rule, "why_slower", lambda *_: None)
