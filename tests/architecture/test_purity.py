"""The pure rooms stay pure at run time: import contracts do not see through ``automode/__init__.py``, a fresh process does."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "optuna", "scipy", "sklearn")

PROBE = """
import sys
import {module}
print(*sorted(name for name in {unwanted!r} if name in sys.modules))
"""


def loaded_by(module: str, unwanted: tuple[str, ...]) -> list[str]:
    """Return which of the unwanted modules a fresh interpreter holds after importing the module."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module, unwanted=unwanted)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", ["automode", "automode.planner", "automode.scheduler", "automode.engine"])
def test_importing_a_pure_room_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(module, HEAVY) == []


def test_every_module_of_the_pure_rooms_loads_without_anything_heavy() -> None:
    walk = """
import importlib, pkgutil, sys
import automode.planner, automode.scheduler, automode.engine
for room in (automode.planner, automode.scheduler, automode.engine):
    for found in pkgutil.walk_packages(room.__path__, room.__name__ + "."):
        importlib.import_module(found.name)
print(*sorted(name for name in %r if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", walk % (HEAVY,)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_front_door_alone_loads_not_even_numpy_or_pydantic() -> None:
    assert loaded_by("automode", ("numpy", "pydantic", "yaml", "click", "structlog")) == []


def test_the_probe_notices_what_it_looks_for() -> None:
    assert loaded_by("json", ("json.decoder", "torch")) == ["json.decoder"]
