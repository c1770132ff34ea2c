"""What the session store costs: nanoseconds a scalar, milliseconds a decision, rows a second back.

Run ``python benchmarks/store_cost.py``. Times are CPU seconds of the process where the work is ours and wall seconds
where it waits for the disk; each figure is the median of several rounds in fresh folders, with the extremes beside it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from automode.session import Record, Session, SessionStore
from automode.session.inbox import Inbox

ROUNDS = 7
NAMES = ("loss", "gradient_norm", "learning_rate", "non_finite", "accuracy", "step", "time", "clip")
STEPS = 200_000
BLOCK = 128


def record(seq: int, cursor: int) -> Record:
    return Record(
        seq=seq,
        role="fact",
        kind="rule_evaluated",
        v=1,
        body={
            "rule": "loss_plateau",
            "outcome": "silence",
            "reason": "too early",
            "reading": [0.1, 0.2, 0.3],
        },
        t_wall=0.0,
        t_mono=0.0,
        frame_cursor=cursor,
    )


def row_by_row(store: SessionStore) -> float:
    """Nanoseconds of CPU a scalar, a call a step, flushed as every half second would."""
    values = tuple(np.random.default_rng(0).standard_normal(len(NAMES)).tolist())
    start = time.process_time()
    for step in range(STEPS):
        store.add_row("trunk", 1, NAMES, values)
        if step % 5000 == 4999:
            store.flush()
    store.flush()
    return (time.process_time() - start) * 1e9 / (STEPS * len(NAMES))


def by_blocks(store: SessionStore) -> float:
    """The same, handed over in blocks of 128 steps."""
    block = np.random.default_rng(0).standard_normal((BLOCK, len(NAMES)))
    start = time.process_time()
    for number in range(STEPS // BLOCK):
        store.add_rows("trunk", 1, NAMES, block)
        if number % 40 == 39:
            store.flush()
    store.flush()
    return (time.process_time() - start) * 1e9 / (STEPS * len(NAMES))


def decision(durable: bool) -> Callable[[SessionStore], float]:
    """Milliseconds of wall time for one write of 40 rows and 3 records."""

    def measure(store: SessionStore) -> float:
        block = np.zeros((40, len(NAMES)))
        times = []
        for _ in range(100):
            store.add_rows("trunk", 1, NAMES, block)
            records = [record(store.next_seq + i, store.rows()) for i in range(3)]
            start = time.perf_counter()
            store.write(records, durable=durable)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3

    return measure


def filled(store: SessionStore, rows: int = 1_000_000) -> Path:
    block = np.random.default_rng(0).standard_normal((4000, len(NAMES)))
    for number in range(rows // 4000):
        for part in range(0, 4000, 250):
            store.add_rows("trunk", 1, NAMES, block[part : part + 250])
        store.write([record(number + 1, store.rows() - 7)], durable=False)
    store.close()
    return store.path


def reading(use: Callable[[Session], object]) -> Callable[[SessionStore], float]:
    """Millions of rows a second of wall time."""

    def measure(store: SessionStore) -> float:
        with Session.open(filled(store)) as session:
            start = time.perf_counter()
            use(session)
            return 1.0 / (time.perf_counter() - start)

    return measure


def replay(session: Session) -> int:
    return sum(len(item[3]) for item in session.iter_replay() if item[0] == "rows")


def empty_inbox(store: SessionStore) -> float:
    """Microseconds for a look into an empty inbox."""
    box = Inbox(store.path)
    start = time.perf_counter()
    for turn in range(5000):
        box.poll(float(turn))
    return (time.perf_counter() - start) * 1e6 / 5000


def bytes_a_scalar(store: SessionStore) -> float:
    return (filled(store) / "session.db").stat().st_size / (1_000_000 * len(NAMES))


def main() -> None:
    figures: list[tuple[str, str, Callable[[SessionStore], float]]] = [
        ("scalars, one add_row a step, with flushes", "ns/scalar (CPU)", row_by_row),
        ("scalars, add_rows of 128 steps, with flushes", "ns/scalar (CPU)", by_blocks),
        ("decision, durable", "ms", decision(True)),
        ("decision, not durable", "ms", decision(False)),
        ("frame(name) of 1e6 rows x 8", "1e6 rows/s", reading(lambda s: s.frame("loss"))),
        ("frames() of 1e6 rows x 8", "1e6 rows/s", reading(lambda s: s.frames())),
        ("iter_replay() of 1e6 rows x 8", "1e6 rows/s", reading(replay)),
        ("a look into an empty inbox", "us", empty_inbox),
        ("size on disk", "bytes/scalar", bytes_a_scalar),
    ]
    print(f"{'what':46} {'unit':16} {'median':>9} {'least':>9} {'most':>9}")
    for what, unit, measure in figures:
        found = []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                store = SessionStore.create(Path(folder) / "run", header={})
                found.append(measure(store))
                store.close()
        print(f"{what:46} {unit:16} {statistics.median(found):9.3f} {min(found):9.3f} {max(found):9.3f}")


if __name__ == "__main__":
    main()
