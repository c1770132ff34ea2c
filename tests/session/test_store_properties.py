"""Whatever is written, in whatever order and with whatever accidents, reads back as a plain model in memory says."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from automode.errors import SessionError
from automode.session import Record, Session, SessionStore

SCHEMAS = (("loss",), ("loss", "lr"), ("lr", "loss"), ("acc", "loss", "lr"))
STREAMS = ("trunk", "trial-1", "rank/ü")
ROWS = st.integers(0, 300)


@dataclass(slots=True)
class _Row:
    number: int
    attempt: int
    values: dict[str, float]
    after_seq: int
    dead: bool = False


@dataclass(slots=True)
class _Model:
    """The session as lists."""

    rows: dict[str, list[_Row]] = field(default_factory=lambda: {stream: [] for stream in STREAMS})
    records: list[Record] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)

    def supersede(self, after: int) -> None:
        self.dead.update(r.seq for r in self.records if r.seq > after)
        cursor = self.records[after - 1].frame_cursor if after else 0
        for stream, rows in self.rows.items():
            for row in rows:
                late = row.number >= cursor if stream == "trunk" else row.after_seq >= after
                row.dead = row.dead or late

    def live(self, stream: str) -> list[_Row]:
        return [row for row in self.rows[stream] if not row.dead]


class StoreAgreesWithModel(RuleBasedStateMachine):
    """Writes, flushes, rewinds, failures and reopenings in any order."""

    @initialize()
    def create(self) -> None:
        # In memory where there is such a place: the disk's patience is not what is tested here.
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.path = Path(self.folder.name) / "run"
        self.store = SessionStore.create(self.path, header={"n": 1})
        self.model = _Model()
        self.chance = np.random.default_rng(0)
        self.cursor = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.check_everything()
            self.folder.cleanup()

    def _values(self, rows: int, columns: int) -> np.ndarray:
        table = self.chance.standard_normal((rows, columns))
        table[self.chance.random((rows, columns)) < 0.2] = np.nan
        table[self.chance.random((rows, columns)) < 0.1] = -np.inf
        return table

    def _remember(self, stream: str, attempt: int, names: tuple[str, ...], table: np.ndarray) -> None:
        known = self.model.rows[stream]
        for line in table:
            values = dict(zip(names, map(float, line), strict=True))
            known.append(_Row(len(known), attempt, values, len(self.model.records)))

    @rule(
        stream=st.sampled_from(STREAMS), attempt=st.integers(1, 2), names=st.sampled_from(SCHEMAS), rows=ROWS
    )
    def add_rows(self, stream: str, attempt: int, names: tuple[str, ...], rows: int) -> None:
        table = self._values(rows, len(names))
        assert self.store.add_rows(stream, attempt, names, table) == len(self.model.rows[stream])
        self._remember(stream, attempt, names, table)

    @rule(stream=st.sampled_from(STREAMS), names=st.sampled_from(SCHEMAS))
    def add_one_row(self, stream: str, names: tuple[str, ...]) -> None:
        table = self._values(1, len(names))
        assert self.store.add_row(stream, 1, names, tuple(table[0])) == len(self.model.rows[stream])
        self._remember(stream, 1, names, table)

    def _records(self, count: int, lag: int) -> list[Record]:
        rows = len(self.model.rows["trunk"])
        self.cursor = max(self.cursor, rows - lag)
        first = len(self.model.records) + 1
        return [
            Record(
                seq=seq,
                role=("input", "fact", "command")[seq % 3],
                kind=f"k{seq % 2}",
                v=seq,
                body={"x": float("nan"), "s": seq},
                t_wall=float(seq),
                t_mono=seq / 3,
                cause=seq - 1 or None,
                frame_cursor=self.cursor,
            )
            for seq in range(first, first + count)
        ]

    @rule(count=st.integers(0, 3), lag=st.integers(0, 500), durable=st.booleans())
    def write(self, count: int, lag: int, durable: bool) -> None:
        records = self._records(count, lag)
        self.store.write(records, durable=durable)
        self.model.records.extend(records)

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @rule(count=st.integers(0, 2), lag=st.integers(0, 100), operations=st.integers(1, 400))
    def write_fails_half_way_and_is_tried_again(self, count: int, lag: int, operations: int) -> None:
        records = self._records(count, lag)
        connection = self.store._connection
        assert connection is not None
        connection.set_progress_handler(lambda: 1, operations)
        try:
            self.store.write(records, durable=False)
        except SessionError:
            connection.set_progress_handler(None, 0)
            self.store.write(records, durable=False)
        finally:
            connection.set_progress_handler(None, 0)
        self.model.records.extend(records)

    @precondition(lambda self: len(self.model.records) > 0)
    @rule(data=st.data(), with_record=st.booleans())
    def rewind(self, data: st.DataObject, with_record: bool) -> None:
        live = [0, *(r.seq for r in self.model.records if r.seq not in self.model.dead)]
        after = data.draw(st.sampled_from(live))
        records = self._records(int(with_record), 0)
        self.store.write(records, durable=True, supersede_after=after)
        self.model.supersede(after)
        self.model.records.extend(records)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = SessionStore.open(self.path)
        assert self.store.next_seq == len(self.model.records) + 1

    @rule()
    def check_everything_while_it_is_written(self) -> None:
        self.store.flush()
        self.check_everything()

    @invariant()
    def rows_are_counted(self) -> None:
        if hasattr(self, "store"):
            for stream in STREAMS:
                assert self.store.rows(stream) == len(self.model.rows[stream])

    def check_everything(self) -> None:
        with Session.open(self.path) as session:
            live = [_plain(r) for r in self.model.records if r.seq not in self.model.dead]
            assert [_plain(r) for r in session.events()] == live
            every = [_plain(r) for r in self.model.records]
            assert [_plain(r) for r in session.events(include_superseded=True)] == every
            odd = [_plain(r) for r in session.events(kind="k1", role="fact", after=2)]
            assert odd == [r for r in live if r["kind"] == "k1" and r["role"] == "fact" and r["seq"] > 2]
            for stream in session.streams():
                _check_frames(session.frames(stream), self.model.live(stream))
                _check_frames(session.frames(stream, include_superseded=True), self.model.rows[stream])
                assert session.rows(stream) == len(self.model.live(stream))
            self._check_replay(session)

    def _check_replay(self, session: Session) -> None:
        expected: list[Any] = []
        rows = iter([*self.model.live("trunk"), None])
        row = next(rows)
        for record in [r for r in self.model.records if r.seq not in self.model.dead]:
            while row is not None and row.number < record.frame_cursor:
                expected.append(("row", row.number, row.values))
                row = next(rows)
            expected.append(("record", record.seq))
        while row is not None:
            expected.append(("row", row.number, row.values))
            row = next(rows)
        found: list[Any] = []
        for item in session.iter_replay():
            if item[0] == "record":
                found.append(("record", item[1].seq))
                continue
            _, first, names, table = item
            assert len(table) > 0
            for i, line in enumerate(table):
                found.append(("row", first + i, dict(zip(names, map(float, line), strict=True))))
        assert repr(found) == repr(
            [
                e if e[0] == "record" else (*e[:2], {n: e[2][n] for n in f[2]})
                for e, f in zip(expected, found, strict=True)
            ]
        )


def _plain(record: Record) -> dict[str, Any]:
    body = {key: repr(value) for key, value in record.body.items()}
    changed = replace(record, body=body)
    return {name: getattr(changed, name) for name in Record.__dataclass_fields__}


def _check_frames(frames: dict[str, np.ndarray], rows: list[_Row]) -> None:
    assert frames.pop("row").tolist() == [row.number for row in rows]
    assert frames.pop("attempt").tolist() == [row.attempt for row in rows]
    for name, values in frames.items():
        np.testing.assert_array_equal(values, [row.values.get(name, np.nan) for row in rows])
    assert set(frames) >= {name for row in rows for name in row.values}


StoreAgreesWithModel.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestStoreAgreesWithModel = StoreAgreesWithModel.TestCase
