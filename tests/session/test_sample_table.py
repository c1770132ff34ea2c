"""The sample ledger of a session: any slice of it, by conditions that are read and never evaluated."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session import Session, SessionStore
from automode.session.archive import export_session, import_session
from automode.session.durable_files import replace_synced
from automode.session.ledger_file import LEDGER_NAME, forget_later, ledger_columns, read_file, write_file
from automode.session.sample_filter import conditions
from automode.session.sample_table import COLUMNS, SampleTable

NAN = float("nan")


def table(**changes: Any) -> SampleTable:
    columns = {name: np.zeros(5) for name in COLUMNS}
    columns["sample_id"] = np.array([2.0, 3.0, 5.0, 8.0, 13.0])
    columns["visits"] = np.array([4.0, 4.0, 3.0, 1.0, 0.0])
    columns["mean_loss"] = np.array([0.5, 2.0, 2.0, 0.25, NAN])
    columns["margin"] = np.array([1.5, -1.0, -2.0, 3.0, NAN])
    columns["last_correct"] = np.array([1.0, 0.0, 0.0, 1.0, NAN])
    columns["suspect"] = np.array([0.0, 1.0, 1.0, 0.0, 0.0])
    fields: dict[str, Any] = {
        "step": 120,
        "moment": "scan",
        "columns": columns,
        "slices": {"small": np.array([True, False, True, False, True])},
        "why_no_slice": {"listed": "it is a list of held-out samples"},
        "total": 5,
    }
    return SampleTable(**(fields | changes))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("mean_loss > 0.4", [2, 3, 5]),
        ("aum<0 and visits>=4", [3]),
        ("suspect = yes AND aum <= -1.5", [5]),
        ("last_correct=no", [3, 5]),
        ("count != 4", [5, 8, 13]),
        ("mean_loss != 2", [2, 8]),
        ("id == 8", [8]),
        ("mean_loss < inf", [2, 3, 5, 8]),
    ],
)
def test_conditions_keep_the_samples_that_meet_all_of_them_and_none_of_which_a_value_is_not_known(
    text: str, ids: list[int]
) -> None:
    assert table().where(text).ids.tolist() == ids


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no condition"),
        ("mean_loss", "is no condition"),
        ("mean_loss >", "is no condition"),
        ("mean_loss > 1 or margin < 0", "is no condition"),
        ("__import__('os').remove('x')", "is no condition"),
        ("margin < visits", "is no number"),
        ("margin = nan", "what is not known"),
        ("mean_los > 1", "did you mean mean_loss"),
        ("gradient_norm > 1", r"scan: \{details: \[gradient_norm\]\}"),
    ],
)
def test_what_is_no_condition_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        table().where(text)


@given(st.text())
def test_any_text_is_a_condition_or_is_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert conditions(text)


@given(st.lists(st.floats(-5, 5) | st.just(NAN), min_size=5, max_size=5), st.floats(-5, 5))
def test_a_condition_and_its_opposite_part_the_known_samples(values: list[float], bound: float) -> None:
    columns = {**table().columns, "margin": np.array(values)}
    found = table(columns=columns)
    below, above = found.where(f"margin < {bound!r}"), found.where(f"margin >= {bound!r}")
    assert len(below) + len(above) == int(np.count_nonzero(~np.isnan(columns["margin"])))
    assert not set(below.ids) & set(above.ids)


def test_top_and_bottom_are_the_furthest_first_and_ties_keep_their_order() -> None:
    assert table().top(3, "mean_loss").ids.tolist() == [3, 5, 2]
    assert table().top(2, "aum", lowest=True).ids.tolist() == [5, 3]
    assert len(table().top(99, "margin")) == 4


def test_slices_and_ids_name_rows_and_what_is_not_known_says_why() -> None:
    assert table().in_slice("small").where("visits > 0").ids.tolist() == [2, 5]
    assert table().only([8, 2]).ids.tolist() == [8, 2]
    with pytest.raises(UsageError, match="list of held-out samples"):
        table().in_slice("listed")
    with pytest.raises(UsageError, match="it has small"):
        table().in_slice("large")
    with pytest.raises(UsageError, match="4 for one"):
        table().only([2, 4])


def test_quantiles_are_those_of_the_known_values() -> None:
    assert table().quantiles("mean_loss", (0.0, 0.5, 1.0)) == (0.25, 1.25, 2.0)
    assert table().where("visits = 0").quantiles("mean_loss") == ()


def test_exports_hold_whole_numbers_truths_and_nothing_where_a_value_is_not_known(tmp_path: Path) -> None:
    rows = json.loads(table().write(tmp_path / "x.json").read_text())
    assert rows[1] == {
        **dict.fromkeys(COLUMNS, 0),
        "sample_id": 3,
        "visits": 4,
        "mean_loss": 2.0,
        "margin": -1.0,
        "last_correct": False,
        "suspect": True,
        "left_out": False,
        "relabelled": False,
        "slice small": False,
    }
    assert (rows[4]["mean_loss"], rows[4]["last_correct"]) == (None, None)
    assert (
        table().top(1, "margin").write(tmp_path / "x.csv").read_text().splitlines()[1].startswith("8,1,0.25,")
    )


def test_a_file_gives_back_what_was_written_and_replaces_the_one_before(tmp_path: Path) -> None:
    more = {**table().columns, "embedding_10": np.full(5, 2.0), "embedding_9": np.full(5, 1.0)}
    write_file(tmp_path, table())
    write_file(tmp_path, table(step=240, moment="end", columns=more, why_no_column={"gradient_norm": "no"}))
    found = read_file(tmp_path)
    assert found is not None
    assert (found.step, found.moment, found.total) == (240, "end", 5)
    assert list(found.columns) == [*COLUMNS, "embedding_9", "embedding_10"]
    for name, values in more.items():
        np.testing.assert_array_equal(found.columns[name], values)
    np.testing.assert_array_equal(found.slices["small"], table().slices["small"])
    assert found.why_no_slice == {"listed": "it is a list of held-out samples"}
    with pytest.raises(UsageError, match="no gradient_norm: no"):
        found.column("gradient_norm")
    assert [file.name for file in tmp_path.iterdir()] == [LEDGER_NAME]


def test_a_run_that_goes_back_leaves_the_ledger_of_later_steps(tmp_path: Path) -> None:
    write_file(tmp_path, table())
    forget_later(tmp_path, 120)
    assert read_file(tmp_path) is not None
    forget_later(tmp_path, 119)
    assert read_file(tmp_path) is None
    forget_later(tmp_path, 119)


def test_a_damaged_file_is_told(store: SessionStore) -> None:
    file = write_file(store.path, table())
    data = file.read_bytes()
    for wrong in (b"", data[:100], data[:-4], data.replace(b"automode-ledger/1", b"automode-ledger/9")):
        replace_synced(file, wrong)
        with Session.open(store.path) as session, pytest.raises(SessionCorruptError, match="ledger"):
            session.ledger()
        with Session.open(store.path) as session, pytest.raises((SessionCorruptError, SessionError)):
            session.verify()


def test_the_ledger_travels_with_an_exported_session(store: SessionStore, tmp_path: Path) -> None:
    write_file(store.path, table())
    export_session(store.path, tmp_path / "run.zip")
    folder = import_session(tmp_path / "run.zip", tmp_path / "copy")
    with Session.open(folder) as session:
        assert session.ledger().ids.tolist() == [2, 3, 5, 8, 13]


def test_a_session_without_a_ledger_says_so(store: SessionStore) -> None:
    with Session.open(store.path) as session, pytest.raises(UsageError, match="holds no sample ledger"):
        session.ledger()


def test_samples_beyond_the_runs_arrays_were_never_visited() -> None:
    stored = {name: np.ones(3) for name in ("mean_loss", "last_loss", "ema_loss", "margin", "flips")}
    stored |= {
        "count": np.array([2, 0, 1]),
        "forgetting": np.zeros(3),
        "last_correct": np.ones(3, dtype=bool),
    }
    found = ledger_columns(stored, np.array([0, 1, 2, 7]), has_margins=False)
    assert found["visits"].tolist() == [2, 0, 1, 0]
    np.testing.assert_array_equal(found["mean_loss"], [1, NAN, 1, NAN])
    assert np.isnan(found["margin"]).all()
