"""The log that stands beside the example is what its script writes, and what the documentation says of it is told."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from automode.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
LOG = EXAMPLES / "loss_curve.csv"


def columns(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return head, np.array(rows, dtype=float)


def test_the_log_is_what_the_script_writes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "loss_curve.py"), "mine.csv"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "3000 steps logged to mine.csv" in done.stdout
    head, mine = columns(tmp_path / "mine.csv")
    stored_head, stored = columns(LOG)
    assert head == stored_head == ["step", "loss", "grad_norm", "lr"]
    # Another build of PyTorch sums in another order: the same run up to rounding, which training spreads.
    assert np.allclose(mine[:200], stored[:200], rtol=0.01)
    assert abs(np.median(mine[-1000:, 1]) / np.median(stored[-1000:, 1]) - 1.0) < 0.05


def test_the_spike_and_the_plateau_are_found_in_it() -> None:
    done = CliRunner().invoke(main, ["signals", str(LOG), "--json"])
    assert done.exit_code == 0
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"step": 700, "kind": "reading", "name": "loss_spike", "value": "SPIKE"} in found
    spikes = {e["step"] for e in found if e["value"] in ("SPIKE", "SHIFTED", "NON_FINITE", "REGRESSING")}
    assert spikes == {700}
    assert next(e["step"] for e in found if (e["name"], e["value"]) == ("trend", "PLATEAU")) > 1500
