"""Importing the room stays light, and its public names are the ones it lists."""

from __future__ import annotations

import doctest
import subprocess
import sys

import automode.scheduler
from automode.scheduler import asha, candidates


def test_importing_the_scheduler_loads_no_heavy_package() -> None:
    code = (
        "import sys, automode.scheduler\n"
        "heavy = {'torch', 'scipy', 'optuna', 'pandas', 'sklearn', 'lightning', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_public_names_exist_and_are_sorted() -> None:
    assert automode.scheduler.__all__ == sorted(automode.scheduler.__all__)
    for name in automode.scheduler.__all__:
        assert hasattr(automode.scheduler, name)


def test_the_examples_in_the_documentation_run() -> None:
    for module in (asha, candidates):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0
