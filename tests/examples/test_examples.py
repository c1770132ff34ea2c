"""Every example runs as a person runs it, in a folder of its own, and ends by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT_A_SESSION = {"loss_curve.py"}  # a bare loop: tests/examples/test_loss_curve.py


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({path.name for path in EXAMPLES.glob("*.py")} - WITHOUT_A_SESSION))
def test_an_example_runs_to_its_end_and_leaves_a_session(script: str, tmp_path: Path) -> None:
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("**/session.db"))
    if script == "01_quickstart.py":
        assert "4096 of the validation samples" in done.stderr
        assert "mode: propose (act was asked for)" in done.stdout
        assert "session: automode-runs" in done.stdout
