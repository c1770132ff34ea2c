"""The sample ledger as quantiles, as a table, as text and as files."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from automode.session.ledger_file import write_file
from automode.session.sample_table import COLUMNS, SampleTable

N = 30


@pytest.fixture
def kept(told: Any) -> Path:
    """A session with a ledger of thirty samples: losses 0 to 29, the ten worst of negative margin."""
    columns: dict[str, Any] = {name: np.zeros(N) for name in COLUMNS}
    columns["sample_id"] = np.arange(N) * 10.0
    columns["visits"] = np.full(N, 3.0)
    columns["mean_loss"] = np.arange(N, dtype=np.float64)
    columns["margin"] = 19.5 - np.arange(N)
    columns["suspect"] = (np.arange(N) >= 25).astype(np.float64)
    write_file(
        told.path,
        SampleTable(
            step=640,
            moment="scan",
            columns=columns,
            slices={"even": np.arange(N) % 2 == 0},
            why_no_slice={"listed": "it is a list of held-out samples"},
        ),
    )
    return Path(told.path)


def test_quantiles_and_slices_are_shown_and_of_which_moment_they_are(cli: Any, kept: Path) -> None:
    lines = cli("ledger", kept).output.splitlines()
    assert lines[0] == "30 of 30 samples, as of the last scan, step 640"
    assert lines[1] == "left_out 0, relabelled 0, suspect 5"
    assert lines[2] == "listed: not known: it is a list of held-out samples"
    assert lines[4].split() == [
        "COLUMN",
        "SAMPLES",
        "LEAST",
        "5",
        "%",
        "25",
        "%",
        "MEDIAN",
        "75",
        "%",
        "95",
        "%",
        "GREATEST",
    ]
    loss = next(line for line in lines if line.startswith("mean_loss"))
    assert loss.split() == ["mean_loss", "30", "0", "1.45", "7.25", "14.5", "21.75", "27.55", "29"]
    assert next(line for line in lines if line.startswith("even")).split() == [
        "even",
        "15",
        "14",
        "0",
        "5.5",
        "2",
    ]


def test_parts_are_chosen_by_slice_condition_ids_and_rank(cli: Any, kept: Path, tmp_path: Path) -> None:
    def ids(*arguments: object) -> list[int]:
        text = cli("ledger", kept, "--format", "csv", *arguments).output
        return [int(row["sample_id"]) for row in csv.DictReader(io.StringIO(text))]

    assert ids("--slice", "even", "--where", "aum < 0") == [200, 220, 240, 260, 280]
    assert ids("--where", "aum<0 and suspect=no", "--where", "mean_loss>22") == [230, 240]
    assert ids("--top", 2) == [290, 280]
    assert ids("--bottom", 2, "--by", "mean_loss") == [0, 10]
    for name, text in {
        "a.txt": "20\n10\n",
        "b.csv": "x,sample_id\n1,20\n2,10\n",
        "c.json": "[20, 10]",
    }.items():
        (tmp_path / name).write_text(text)
        assert ids("--ids", tmp_path / name) == [20, 10]
    shown = cli("ledger", kept, "--top", 25).output
    assert "5 more: all of them with --out samples.csv" in shown
    assert shown.count("yes") == 5


def test_whole_ledgers_are_written_in_every_form(cli: Any, kept: Path, tmp_path: Path) -> None:
    file = tmp_path / "samples.json"
    told = cli("ledger", kept, "--out", file, "--where", "suspect=1").output
    assert told == f"5 of 30 samples written to {file}, as of the last scan, step 640\n"
    rows = json.loads(file.read_text())
    assert list(rows[0]) == [*COLUMNS, "slice even"]
    assert (rows[0]["sample_id"], rows[0]["suspect"], rows[0]["slice even"]) == (250, True, False)
    assert "exists" in cli("ledger", kept, "--out", file, code=1).output
    parquet = tmp_path / "samples.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        assert "needs pyarrow" in cli("ledger", kept, "--out", parquet, code=1).output
    else:
        cli("ledger", kept, "--out", parquet)
        assert importlib.import_module("pyarrow.parquet").read_table(parquet).num_rows == N


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--slice", "odd"), "there is no slice 'odd' in this ledger; it has even"),
        (("--slice", "listed"), "list of held-out samples"),
        (("--where", "mean_loss ~ 1"), "is no condition"),
        (("--by", "embedding_3", "--top", 1), "scan: {details: [embedding]}"),
        (("--top", 1, "--bottom", 1), "give one of them"),
        (("--format", "parquet"), "name a file with --out"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_words(
    cli: Any, kept: Path, arguments: tuple[object, ...], why: str
) -> None:
    assert why in cli("ledger", kept, *arguments, code=1).output


@pytest.mark.parametrize("text", ["one", "[1.5]", "[true]", "sample_id\nx\n", '[{"id": 3}]', "[", "5"])
def test_a_file_of_other_things_or_other_samples_is_refused(
    cli: Any, kept: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "ids").write_text(text)
    said = cli("ledger", kept, "--ids", tmp_path / "ids", code=1).output
    assert ("holds no sample ids" in said) or ("5 for one" in said)


def test_a_session_without_a_ledger_says_why(cli: Any, told: Any) -> None:
    assert "neither been scanned nor ended nor stored its state" in cli("ledger", told.path, code=1).output
