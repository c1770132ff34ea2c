"""The Trainer's page: its blocks run as one script, and it names every argument."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text(encoding="utf-8")


def test_its_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    script = tmp_path / "shown.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "step,row,loss,grad_norm,lr_0" in done.stdout
    assert "a callback asked for it" in done.stdout


@pytest.mark.torch
def test_it_names_every_argument() -> None:
    from automode import Trainer

    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert {name for name in names if not re.search(rf"\b{name}=", PAGE)} == set()
