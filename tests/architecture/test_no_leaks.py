"""Nothing in the repository names the machine that it was written on."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Absolute paths of somebody's machine. A character class in each keeps this file from matching itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.~:-])/(?:[w]ork|[r]oot|[h]ome/\w+|[U]sers/\w+|[o]pt/\w+)/[\w.]|[fF]ile:///|[C]:\\+[U]sers\\"
)

# A file that must hold such a path, with its reason.
ALLOWED: dict[str, str] = {}


def tracked_files() -> list[Path]:
    """List what git tracks, or every file outside the environment and the caches where there is no git."""
    git = shutil.which("git")
    if git is not None and (REPOSITORY / ".git").exists():
        listed = subprocess.run(
            [git, "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    else:
        files = [
            path
            for path in REPOSITORY.rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(REPOSITORY).parts)
        ]
    return [path for path in files if path.is_file() and path.suffix != ".pyc"]


def leaks(text: str) -> list[str]:
    return [line for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_no_tracked_file_holds_an_absolute_path_of_a_machine() -> None:
    files = tracked_files()
    assert REPOSITORY / "pyproject.toml" in files
    found = {}
    for path in files:
        name = path.relative_to(REPOSITORY).as_posix()
        lines = leaks(path.read_text(encoding="utf-8", errors="replace"))
        if lines and name not in ALLOWED:
            found[name] = lines
    assert found == {}


@pytest.mark.parametrize("folder", ["work", "root", "home/ada", "Users/ada", "opt/tools"])
def test_the_pattern_sees_a_path_wherever_it_stands(folder: str) -> None:
    path = f"/{folder}/project"
    assert all(leaks(text) for text in (path, f'"{path}"', f"cd {path}", f"PATH={path}", f"({path})"))


@pytest.mark.parametrize(
    "text",
    [
        "a/work/b",
        "~/work/b",
        "https://example.org/root/x",
        "frame/work",
        "the /work of a day",
        "./home/ada/x",
    ],
)
def test_the_pattern_leaves_other_slashes_alone(text: str) -> None:
    assert leaks(text) == []
