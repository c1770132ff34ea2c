"""The ledger says what a visit-by-visit reading says, in any grouping, and hands it out safely."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automode.errors import DataError, NotExecutableError, UsageError
from automode.trainer.sample_ledger import METRICS, SampleLedger, export_samples

DECAY = 0.6


def by_hand(n: int, ids: Any, losses: Any, margins: Any) -> dict[str, list[float]]:
    rows: dict[str, list[Any]] = {
        name: [float("nan")] * n for name in ("mean_loss", "last_loss", "ema_loss", "margin")
    }
    rows |= {"count": [0] * n, "flips": [0] * n, "forgetting": [0] * n, "last_correct": [False] * n}
    history: dict[int, list[tuple[float, float]]] = {}
    for i, loss, margin in zip(ids, losses, margins, strict=True):
        history.setdefault(i, []).append((loss, margin))
    for i, visits in history.items():
        ls, ms = [v[0] for v in visits], [v[1] for v in visits]
        ema = ls[0]
        for loss in ls[1:]:
            ema = DECAY * ema + (1 - DECAY) * loss
        right = [m > 0 for m in ms]
        rows["count"][i] = len(ls)
        rows["mean_loss"][i], rows["last_loss"][i], rows["ema_loss"][i] = np.mean(ls), ls[-1], ema
        rows["margin"][i] = np.mean(ms)
        rows["flips"][i] = sum(a != b for a, b in itertools.pairwise(right))
        rows["forgetting"][i] = sum(a and not b for a, b in itertools.pairwise(right))
        rows["last_correct"][i] = right[-1]
    return rows


def assert_holds(ledger: SampleLedger, expected: dict[str, list[float]]) -> None:
    for name, values in expected.items():
        np.testing.assert_allclose(ledger.column(name), values, rtol=2e-5, atol=2e-5, err_msg=name)


visits = st.lists(
    st.tuples(st.integers(0, 6), st.floats(-4, 9, width=32), st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0])),
    max_size=60,
)


@given(visits, st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_grouping_of_visits_gives_what_one_by_one_gives(
    rows: list[tuple[int, float, float]], cuts: list[int]
) -> None:
    ids = np.array([row[0] for row in rows], dtype=np.int64)
    losses = np.array([row[1] for row in rows], dtype=np.float32)
    margins = np.array([row[2] for row in rows], dtype=np.float32)
    ledger = SampleLedger(7, ema_decay=DECAY)
    bounds = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    for start, stop in itertools.pairwise(bounds):
        part = slice(start, stop)
        ledger.update(ids[part], losses[part], margins[part], margins[part] > 0)
    if rows:
        assert_holds(ledger, by_hand(7, ids, losses, margins))
    assert ledger.visits == len(rows)
    assert ledger.n_seen == len(set(ids.tolist()))


@pytest.mark.parametrize("replacement", [False, True])
def test_blocks_of_many_epochs_keep_the_order_of_visits(replacement: bool) -> None:
    rng = np.random.default_rng(0)
    n = 40
    ids = rng.integers(0, n, 900) if replacement else np.concatenate([rng.permutation(n) for _ in range(12)])
    losses = rng.exponential(size=len(ids)).astype(np.float32)
    margins = rng.normal(size=len(ids)).astype(np.float32)
    ledger = SampleLedger(n, ema_decay=DECAY)
    for part in (slice(0, 17), slice(17, 330), slice(330, None)):
        ledger.update(ids[part], losses[part], margins[part], margins[part] > 0)
    assert_holds(ledger, by_hand(n, ids, losses, margins))


def test_a_ledger_without_a_length_grows_with_its_ids() -> None:
    ledger = SampleLedger(None)
    for ids in ([3], [0, 900], [3, 5]):
        ledger.update(np.array(ids), np.ones(len(ids), np.float32), None, None)
    assert ledger.seen().tolist() == [0, 3, 5, 900]
    assert ledger.column("count")[3] == 2
    assert np.isnan(ledger.column("margin", np.array([3]))).all()


def test_visits_that_are_not_finite_are_left_out_and_counted() -> None:
    ledger = SampleLedger(4)
    bad = np.array([1.0, np.nan, np.inf, 2.0], np.float32)
    margins = np.array([1.0, 1.0, 1.0, np.nan], np.float32)
    ledger.update(np.arange(4), bad, margins, margins > 0)
    assert ledger.seen().tolist() == [0]
    assert ledger.skipped == 3
    ledger.update(
        np.array([1]), np.array([np.nan], np.float32), np.array([1.0], np.float32), np.array([True])
    )
    assert ledger.skipped == 4


@pytest.mark.parametrize("ids", [[-1], [4], [0, 9]])
def test_ids_outside_the_dataset_are_refused(ids: list[int]) -> None:
    with pytest.raises(DataError, match="sample ids from"):
        SampleLedger(4).update(np.array(ids), np.ones(len(ids), np.float32), None, None)


def test_margins_are_given_always_or_never() -> None:
    ledger = SampleLedger(4)
    one, yes = np.ones(1, np.float32), np.array([True])
    with pytest.raises(DataError, match="at every update"):
        ledger.update(np.array([0]), one, one, None)
    ledger.update(np.array([0]), one, one, yes)
    with pytest.raises(DataError, match="at every update"):
        ledger.update(np.array([0]), one, None, None)


def filled(n: int = 200) -> SampleLedger:
    """Loss and id rise together, the margin falls, and the last twenty samples were never seen."""
    ledger = SampleLedger(n + 20, fingerprint="TensorDataset:220:-")
    values = np.linspace(0, 2, n).astype(np.float32)
    ledger.update(np.arange(n), values, -values, -values > 0)
    return ledger


def test_quantiles_are_over_the_samples_seen() -> None:
    found = filled().quantiles()
    assert set(found) == set(METRICS)
    assert all(len(values) == 101 for values in found.values())
    np.testing.assert_allclose(found["mean_loss"], np.linspace(0, 2, 101), atol=1e-5)
    np.testing.assert_allclose(found["margin"], np.linspace(-2, 0, 101), atol=1e-5)
    assert SampleLedger(3).quantiles() == {}


def test_a_quantile_range_holds_its_share_and_adjoining_ranges_share_nothing() -> None:
    ledger = filled()
    assert ledger.ids_in_quantile("ema_loss", 0.85, 1.0).tolist() == list(range(170, 200))
    assert ledger.ids_in_quantile("margin", 0.0, 0.1).tolist() == list(range(180, 200))
    parts = [ledger.ids_in_quantile("last_loss", k / 7, (k + 1) / 7) for k in range(7)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))


def test_equal_values_rank_by_id() -> None:
    ledger = SampleLedger(10)
    ledger.update(np.arange(10), np.zeros(10, np.float32), None, None)
    assert ledger.ids_in_quantile("mean_loss", 0.5, 1.0).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(("lo", "hi"), [(0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1)])
def test_quantiles_out_of_order_are_refused(lo: float, hi: float) -> None:
    with pytest.raises(UsageError, match="0 <= from < to <= 1"):
        filled().ids_in_quantile("mean_loss", lo, hi)


def test_unknown_metrics_columns_and_absent_margins_are_refused() -> None:
    with pytest.raises(UsageError, match="must be one of"):
        filled().ids_in_quantile("loss", 0, 1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no column"):
        filled().column("loss")
    with pytest.raises(UsageError, match="ema_decay"):
        SampleLedger(3, ema_decay=1.0)
    ledger = SampleLedger(3)
    ledger.update(np.arange(3), np.ones(3, np.float32), None, None)
    with pytest.raises(DataError, match="no margins"):
        ledger.ids_in_quantile("margin", 0, 1)
    assert "margin" not in ledger.quantiles()


def test_a_state_gives_the_same_ledger_back() -> None:
    ledger = filled()
    again = SampleLedger.from_state(ledger.state())
    more = (
        np.array([3, 3, 210]),
        np.array([5.0, 1.0, 2.0], np.float32),
        np.array([1.0, -1.0, 1.0], np.float32),
    )
    for one in (ledger, again):
        one.update(*more, more[2] > 0)
    for name in ("count", *METRICS, "flips", "forgetting", "last_correct"):
        np.testing.assert_array_equal(again.column(name), ledger.column(name))
    assert (again.fingerprint, again.length, again.skipped) == (
        ledger.fingerprint,
        ledger.length,
        ledger.skipped,
    )


def test_a_damaged_state_is_refused() -> None:
    for damage in (
        lambda s: s["columns"].pop("count"),
        lambda s: s["columns"].update(count=s["columns"]["count"][:-1]),
        lambda s: s["columns"].update(margin=s["columns"]["margin"].astype(np.float64)),
        lambda s: s.update(length=7),
    ):
        state = filled().state()
        damage(state)
        with pytest.raises(DataError, match="ledger"):
            SampleLedger.from_state(state)


def test_exports_hold_a_row_a_sample_in_the_order_asked(tmp_path: Path) -> None:
    ids = np.array([199, 0, 215])
    table = export_samples(filled(), tmp_path / "tail.csv", ids, extra={"label": [8, 1, 3]})
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [row["sample_id"] for row in rows] == ["199", "0", "215"]
    assert float(rows[0]["mean_loss"]) == pytest.approx(2.0)
    assert rows[2]["mean_loss"] == ""
    assert [row["label"] for row in rows] == ["8", "1", "3"]
    found = json.loads(export_samples(filled(), tmp_path / "tail.json", ids).read_text(encoding="utf-8"))
    assert [row["sample_id"] for row in found] == [199, 0, 215]
    assert found[2]["margin"] is None
    assert found[0]["last_correct"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tail.csv", "tail.json"]


def test_an_export_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    ids = np.array([1])
    with pytest.raises(UsageError, match="csv, json or parquet"):
        export_samples(filled(), tmp_path / "x.feather", ids)
    export_samples(filled(), tmp_path / "x.csv", ids)
    with pytest.raises(UsageError, match="exists"):
        export_samples(filled(), tmp_path / "x.csv", ids)
    export_samples(filled(), tmp_path / "x.csv", ids, overwrite=True)
    with pytest.raises(UsageError, match="extra column"):
        export_samples(filled(), tmp_path / "y.csv", ids, extra={"label": [1, 2]})
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(NotExecutableError, match="pyarrow"):
            export_samples(filled(), tmp_path / "x.parquet", ids)
    else:
        assert export_samples(filled(), tmp_path / "x.parquet", ids).exists()
