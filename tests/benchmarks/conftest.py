"""Benchmarks are scripts: their folder is on the path while they are tested, as it is when one is run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark_modules() -> Iterator[Callable[..., SimpleNamespace]]:
    """Imports benchmarks and parts of them, under the names that a test gives them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield lambda **names: SimpleNamespace(**{given: import_module(name) for given, name in names.items()})
    finally:
        sys.path.remove(str(BENCHMARKS))
