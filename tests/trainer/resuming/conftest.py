"""One server for the tests of this folder: processes that have torch loaded are forked from it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("resuming_scripts", Path(__file__).with_name("scripts.py"))
assert _spec is not None
assert _spec.loader is not None
_scripts = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _scripts
_spec.loader.exec_module(_scripts)


@pytest.fixture(scope="session")
def scripts() -> Any:
    """The scripts' module."""
    return _scripts


@pytest.fixture(scope="session")
def run() -> Iterator[Any]:
    """Runs one job in a process of its own: ``run(job, cell, folder, **given)``."""
    with _scripts.server() as started:
        yield started
