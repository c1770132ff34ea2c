"""TensorBoard's event files: read back by a small reader of the test's own, and by TensorBoard's where it is installed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from automode.session.event_log import EventLog, crc32c


def records(data: bytes) -> Iterator[bytes]:
    """Split a file into its records, checking lengths and checksums."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        for part, stored in ((data[:8], data[8:12]), (body, data[12 + length : 16 + length])):
            crc = crc32c(part)
            assert struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF) == stored
        yield body
        data = data[16 + length :]


def fields(message: bytes) -> list[tuple[int, Any]]:
    """Decode a protobuf message one level deep."""
    found: list[tuple[int, Any]] = []

    def varint() -> int:
        nonlocal message
        value = shift = 0
        while True:
            byte, message = message[0], message[1:]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while message:
        key = varint()
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            found.append((key >> 3, varint()))
            continue
        if size is None:
            size = varint()
        found.append((key >> 3, message[:size]))
        message = message[size:]
    return found


def test_the_checksum_is_that_of_the_standard() -> None:
    # RFC 3720, B.4, and the check value of the CRC catalogues.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF] * 32)) == 0x62A8AB43


def test_scalars_stand_in_the_file_as_events(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "tb", clock=lambda: 12.5)
    log.log_block(["loss", "train/lr"], [[0.25, 1e-3], [1e300, float("nan")]], [1, 70_000])
    log.log_metrics({"val_loss": 2.0}, step=3)
    log.close()
    assert log.path.name.startswith("events.out.tfevents.")
    first, *events = [fields(record) for record in records(log.path.read_bytes())]
    assert first[0] == (1, struct.pack("<d", 12.5))
    assert (3, b"brain.Event:2") in first
    told = []
    for event in events:
        entries = dict(event)
        for _, value in fields(entries[5]):
            (_, tag), (_, number) = fields(value)
            told.append((entries[2], tag.decode(), struct.unpack("<f", number)[0]))
    assert told[0] == (1, "loss", 0.25)
    assert told[1] == (1, "train/lr", pytest.approx(1e-3))
    assert told[2] == (70_000, "loss", float("inf"))
    assert told[3][:2] == (70_000, "train/lr")
    assert told[3][2] != told[3][2]
    assert told[4] == (3, "val_loss", 2.0)


def test_two_logs_of_one_second_are_two_files(tmp_path: Path) -> None:
    paths = set()
    for _ in range(2):
        log = EventLog(tmp_path, clock=lambda: 1.0)
        log.close()
        paths.add(log.path)
    assert len(paths) == 2


def test_tensorboard_reads_them_and_forgets_what_a_cut_attempt_had_said(tmp_path: Path) -> None:
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra automode[tensorboard]"
    )
    first = EventLog(tmp_path, clock=lambda: 1.0)
    first.log_block(["loss"], [[0.5], [0.25], [0.125]], [1, 2, 3])
    first.close()
    again = EventLog(tmp_path, after_step=2, clock=lambda: 2.0)
    again.log_block(["loss"], [[4.0]], [3])
    again.close()
    events = reading.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25), (3, 4.0)]
