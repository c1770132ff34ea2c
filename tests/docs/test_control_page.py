"""What the page on control shows works as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from automode.planner.controls import CHECKS, VERBS, arguments_from, verb_of

pytestmark = pytest.mark.torch

PAGE = (Path(__file__).parents[2] / "docs" / "control.md").read_text(encoding="utf-8")


def test_the_runnable_block_runs_from_an_empty_folder(tmp_path: Path) -> None:
    blocks = re.findall(r"<!-- runnable -->\n```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == PAGE.count("```python") == 1
    script = tmp_path / "shown.py"
    after = "\nreport = replay(next((__import__('pathlib').Path('automode-runs') / 'control').iterdir()))\nreport.check()\n"
    script.write_text(blocks[0] + after, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "health at step 20: good" in done.stdout
    assert "max_epochs=5" in done.stdout


def test_every_order_that_it_shows_can_be_given() -> None:
    shown = re.findall(r"^automode ctl last (\S+)(?: ([^#\n]*))?", PAGE, re.MULTILINE)
    assert len(shown) >= 5
    for verb, words in shown:
        arguments_from(verb_of(verb), words.split())


def test_every_verb_and_every_check_is_explained() -> None:
    tables = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`([a-z_]+)(?: N)?`", tables))
    assert named >= {*VERBS, *CHECKS}
