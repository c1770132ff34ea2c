"""Scalars as CSV: late columns, numbers as they are, and what a run that goes on keeps of the file."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from automode.session.csv_log import CsvLog


def lines(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_column_that_comes_late_is_added_and_cells_that_lack_it_are_empty(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "new" / "metrics.csv")
    log.log_block(["loss", "row"], [[0.1, 0], [math.nan, 1]], [1, 2])
    log.log_metrics({"val, loss": 1e-30, "epoch": 0}, step=2)
    log.log_block(["loss", "row"], [[math.inf, 2]], [3])
    log.close()
    assert lines(log.path) == [
        ["step", "row", "loss", "val, loss", "epoch"],
        ["1", "0", "0.1", "", ""],
        ["2", "1", "nan", "", ""],
        ["2", "", "", "1e-30", "0"],
        ["3", "2", "inf", "", ""],
    ]
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.csv"]


def test_a_run_that_goes_on_keeps_what_came_before_its_checkpoint(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv")
    # The guard kept row 2 from the weights, so that its step is that of row 1.
    log.log_block(["loss", "row"], [[0.5, 0], [0.4, 1], [9.0, 2], [0.3, 3]], [1, 2, 2, 3])
    log.log_metrics({"val_loss": 0.6}, step=2)
    log.log_metrics({"val_loss": 0.7}, step=3)
    log.close()
    again = CsvLog(tmp_path / "metrics.csv", after_step=2, after_row=2)
    again.log_block(["loss", "row"], [[9.5, 2]], [2])
    again.close()
    assert lines(again.path) == [
        ["step", "row", "loss", "val_loss"],
        ["1", "0", "0.5", ""],
        ["2", "1", "0.4", ""],
        ["2", "", "", "0.6"],
        ["2", "2", "9.5", ""],
    ]


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e300, -0.5, 2.0**60, 123456789.0]
    log = CsvLog(tmp_path / "metrics.csv")
    log.log_block(["x"], [[value] for value in values], range(5))
    log.close()
    assert [float(row[2]) for row in lines(log.path)[1:]] == values
