"""TensorBoard's event files, written without TensorBoard: scalars only.

A file is a row of records: the length of the data (8 bytes, little end first), a masked CRC-32C of those, the data, and a masked
CRC-32C of it. The data is an ``Event`` in protobuf's encoding (tensorflow/core/util/event.proto).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

_DOUBLE, _VARINT, _BYTES, _FLOAT = 1, 0, 2, 5
_VERSION: Final = b"brain.Event:2"
_MASK: Final = 0xA282EAD8


def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # noqa: PLW2901
        entries.append(byte)
    return tuple(entries)


_CRC: Final = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), as in RFC 3720."""
    crc, table = 0xFFFFFFFF, _CRC
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


class EventLog:
    """Appends scalars to an event file of its own.

    Args:
        folder: Where event files live; each log makes one.
        after_step: The step at which a run goes on: what older files of the folder say of later ones is void. None: a fresh run.
        clock: Seconds since 1970.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        after_step: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        stamp = f"events.out.tfevents.{clock():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = next(p for n in range(1 << 16) if not (p := place / f"{stamp}.{n}").exists())
        self._file = self.path.open("xb")
        self._write([self._event(0, _field(3, _BYTES, _VERSION))])
        if after_step is not None:
            start = _field(7, _BYTES, _field(1, _VARINT, _varint(1)))
            self._write([self._event(after_step + 1, start)])

    def log_block(self, names: Sequence[str], rows: Sequence[Sequence[float]], steps: Sequence[int]) -> None:
        """Append scalars.

        Args:
            names: Tags.
            rows: One a step, as long as ``names``.
            steps: The step of each.

        Raises:
            OSError: The file cannot be written.
        """
        tags = [_field(1, _BYTES, name.encode()) for name in names]
        self._write(
            [
                self._event(
                    step,
                    _field(5, _BYTES, b"".join(_value(tag, x) for tag, x in zip(tags, row, strict=True))),
                )
                for step, row in zip(steps, rows, strict=True)
            ]
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append the scalars of one step.

        Raises:
            OSError: The file cannot be written.
        """
        self.log_block(list(metrics), [[float(value) for value in metrics.values()]], [step or 0])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _event(self, step: int, what: bytes) -> bytes:
        return _field(1, _DOUBLE, struct.pack("<d", self._clock())) + _field(2, _VARINT, _varint(step)) + what

    def _write(self, events: Sequence[bytes]) -> None:
        parts = []
        for event in events:
            length = struct.pack("<Q", len(event))
            parts += [length, _masked(length), event, _masked(event)]
        self._file.write(b"".join(parts))
        self._file.flush()


def _value(tag: bytes, number: float) -> bytes:
    try:
        packed = struct.pack("<f", number)
    except OverflowError:  # beyond what a float of 32 bits holds
        packed = struct.pack("<f", float("inf") if number > 0 else float("-inf"))
    return _field(1, _BYTES, tag + _field(2, _FLOAT, packed))


def _field(number: int, kind: int, content: bytes) -> bytes:
    head = bytes([number << 3 | kind])
    return head + _varint(len(content)) + content if kind == _BYTES else head + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)
