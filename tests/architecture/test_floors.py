"""The import contracts hold, and each of them breaks when it should."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Where a violation is planted, the line, and what the report must say.
VIOLATIONS = {
    "a clock in a pure room": ("planner/planted.py", "import time", "automode.planner.planted -> time"),
    "a file in a pure room": (
        "scheduler/planted.py",
        "from pathlib import Path",
        "automode.scheduler.planted -> pathlib",
    ),
    "torch inside a function": (
        "engine/planted.py",
        "def f():\n    import torch",
        "automode.engine.planted -> torch",
    ),
    "yaml outside yaml_text": ("planner/planted.py", "import yaml", "automode.planner.planted -> yaml"),
    "a lower room using an upper one": (
        "session/planted.py",
        "import automode.trainer",
        "automode.session.planted -> automode.trainer",
    ),
    "a pure room using a file room": (
        "planner/planted.py",
        "import automode.presets",
        "automode.planner.planted -> automode.presets",
    ),
    "a pickle anywhere": ("trainer/planted.py", "import pickle", "automode.trainer.planted -> pickle"),
    "a room without a floor": ("planted.py", "VALUE = 1", "planted"),
}


def lint(folder: Path) -> tuple[int, str]:
    code = "from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache", "--no-logo"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        REPOSITORY / "automode", tmp_path / "automode", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_house_stands_on_its_floors(copy: Path) -> None:
    code, report = lint(copy)
    assert code == 0, report


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_a_planted_violation_is_reported(copy: Path, violation: str) -> None:
    place, line, expected = VIOLATIONS[violation]
    (copy / "automode" / place).write_text(f"{line}\n", encoding="utf-8")
    code, report = lint(copy)
    assert code == 1, report
    assert expected in report


def test_no_room_may_look_at_the_test_builders(copy: Path) -> None:
    (copy / "automode" / "cli" / "planted.py").write_text("import automode.testing\n", encoding="utf-8")
    code, report = lint(copy)
    assert code == 1, report
    assert "automode.cli.planted -> automode.testing" in report
