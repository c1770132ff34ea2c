"""The suspects of a scan, as a table, as text and as files; what is not known stays empty."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode.errors import UsageError
from automode.planner.events import RuleEvaluated, Scanned
from automode.session import Session
from automode.session.artifacts import ArtifactStore
from automode.session.suspects import COLUMNS

ROWS = np.array(
    [
        [17, -2.5, 3.25, 4, 8, 0.1, 3, 0.9],
        [4, -1.0, 1.5, 4, 1, 0.3, 1, 0.3],
        [99, -0.5, 1.25, 3, np.nan, np.nan, np.nan, np.nan],
    ]
)
ABSTAINS = RuleEvaluated(
    step=120, rule="label_noise", outcome="silent", code="abstain", why="the detectors disagree"
)


def scan(step: int, review: str | None, **more: Any) -> Scanned:
    return Scanned(
        step=step, n=500, visits=4.0, suspects=3, why="estimated label noise 9.0%", review=review, **more
    )


@pytest.fixture
def scanned(told: Any) -> Path:
    """A session whose second scan named three suspects, and whose rule abstained."""
    digest = ArtifactStore(told.path / "artifacts").put_array(ROWS)
    told.tell(scan(60, None, noise=None), role="input")
    told.tell(scan(120, digest, noise=0.09), role="input")
    told.tell(ABSTAINS)
    return Path(told.path)


def test_a_terminal_shows_the_most_suspect_and_why_the_rule_is_silent(cli: Any, scanned: Path) -> None:
    lines = cli("suspects", scanned, "--limit", 2).output.splitlines()
    assert lines[0] == "scan of step 120: 500 samples, 3 of them suspects"
    assert lines[1] == "estimated label noise 9.0%"
    assert lines[2] == "label_noise silent (abstain): the detectors disagree"
    assert lines[4].split() == [
        "SAMPLE",
        "MARGIN",
        "LOSS",
        "VISITS",
        "LABEL",
        "NEAR",
        "NETWORK",
        "SAYS",
        "NEAR",
    ]
    assert lines[5].split() == ["17", "-2.5", "3.25", "4", "8", "0.1", "3", "0.9"]
    assert len(lines) == 9
    assert lines[-1].startswith("1 more: --limit 3")
    assert cli("suspects", scanned).output.splitlines()[-1].split()[-4:] == ["?"] * 4


def test_csv_and_json_come_whole_and_leave_what_is_not_known_empty(cli: Any, scanned: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("suspects", scanned, "--format", "csv").output)))
    assert list(rows[0]) == list(COLUMNS)
    assert [row["sample_id"] for row in rows] == ["17", "4", "99"]
    assert (rows[0]["given_label"], rows[2]["given_label"]) == ("8", "")
    found = json.loads(cli("suspects", scanned, "--format", "json", "--limit", 2).output)
    assert [row["suggested_label"] for row in found] == [3, 1]
    assert found[0] == {
        "sample_id": 17,
        "margin": -2.5,
        "mean_loss": 3.25,
        "visits": 4,
        "given_label": 8,
        "neighbour_agreement": 0.1,
        "suggested_label": 3,
        "suggested_agreement": 0.9,
    }


def test_files_are_written_once_by_their_ending(cli: Any, scanned: Path, tmp_path: Path) -> None:
    file = tmp_path / "suspects.csv"
    assert f"3 samples written to {file}" in cli("suspects", scanned, "--out", file).output
    assert file.read_text(encoding="utf-8").count("\n") == 4
    assert "exists" in cli("suspects", scanned, "--out", file, code=1).output
    cli("suspects", scanned, "--out", file, "--overwrite", "--limit", 1)
    assert file.read_text(encoding="utf-8").count("\n") == 2
    assert "csv, json or parquet" in cli("suspects", scanned, "--out", tmp_path / "x.xls", code=1).output
    assert "cannot be written" in cli("suspects", scanned, "--out", tmp_path / "no" / "x.csv", code=1).output


def test_parquet_needs_a_file_and_pyarrow(cli: Any, scanned: Path, tmp_path: Path) -> None:
    assert "name a file with --out" in cli("suspects", scanned, "--format", "parquet", code=1).output
    file = tmp_path / "suspects.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        assert (
            "needs pyarrow, which is not installed" in cli("suspects", scanned, "--out", file, code=1).output
        )
        assert not file.exists()
    else:
        cli("suspects", scanned, "--out", file)
        table = importlib.import_module("pyarrow.parquet").read_table(file)
        assert table.column("given_label").to_pylist() == [8, 1, None]


def test_an_earlier_scan_can_be_asked_for(cli: Any, scanned: Path) -> None:
    assert "scan of step 60: 500 samples, 0 of them" in cli("suspects", scanned, "--step", 60).output
    assert "there were scans at 60, 120" in cli("suspects", scanned, "--step", 61, code=1).output
    with Session.open(scanned) as session:
        assert len(session.suspects()) == 3
        assert session.suspects(60).noise is None


def test_a_session_without_a_scan_says_so(cli: Any, told: Any) -> None:
    assert "holds no scan" in cli("suspects", told.path, code=1).output
    with Session.open(told.path) as session, pytest.raises(UsageError, match="holds no scan"):
        session.suspects()
