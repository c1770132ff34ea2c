"""What the process prints and logs while ``fit`` runs, kept in the session's log file as well."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from automode.trainer.run_parts import RunParts

_LONGEST = 4000
"""Characters of a line that are kept."""


@contextmanager
def captured(parts: RunParts) -> Iterator[None]:
    """Keep standard output, the standard library's log records and warnings in ``log.jsonl`` while a block runs.

    Everything goes where it went before, too. Lines of the log file are ``event: "output"`` (``text``), ``event: "logged"``
    (``logger``, ``at``: the record's level, ``text``) and ``event: "warned"`` (``category``, ``text``). Records count from the level
    that their loggers are set to. Nothing is done unless the Trainer was told to (``capture_logs=True``).

    Args:
        parts: The run; its session's log is written while it is open.
    """
    if not parts.settings.capture_logs:
        yield
        return
    handler, root = _Handler(parts), logging.getLogger()
    out, shown = sys.stdout, warnings.showwarning
    tee = _Tee(out, parts)

    def show(message: Any, category: Any, *given: Any, **named: Any) -> None:
        _note(parts, "warned", category=category.__name__, text=str(message))
        shown(message, category, *given, **named)

    parts.closing = tee.end
    root.addHandler(handler)
    sys.stdout, warnings.showwarning = tee, show
    try:
        yield
    finally:
        parts.closing = None
        root.removeHandler(handler)
        if sys.stdout is tee:  # somebody may have redirected it since
            sys.stdout = out
        if warnings.showwarning is show:
            warnings.showwarning = shown


class _Tee:
    """Standard output, which is noted line by line on its way."""

    def __init__(self, out: TextIO, parts: RunParts) -> None:
        self._out = out
        self._parts = parts
        self._rest = ""
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def write(self, text: str) -> int:
        """Write, and note the lines that are complete."""
        written = self._out.write(text)
        with self._lock:
            *lines, rest = (self._rest + text).split("\n")
            # Of a line that is written over and over, the last counts, and of one without end what will be kept of it.
            last = (
                rest.rpartition("\r")[2] if not rest.endswith("\r") else rest[rest.rfind("\r", 0, -1) + 1 :]
            )
            self._rest = last[:_LONGEST]
        for line in lines:
            self._told(line)
        return written

    def writelines(self, lines: Any) -> None:
        """Write lines."""
        for line in lines:
            self.write(line)

    def end(self) -> None:
        """Note what stands without an end of line: the log is about to be closed."""
        rest, self._rest = self._rest, ""
        self._told(rest)

    def _told(self, line: str) -> None:
        if text := line.rstrip().rpartition("\r")[2]:
            _note(self._parts, "output", text=text)


class _Handler(logging.Handler):
    def __init__(self, parts: RunParts) -> None:
        super().__init__()
        self._parts = parts

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # a record whose arguments do not fit its text, as logging itself treats it
            self.handleError(record)
            return
        _note(self._parts, "logged", logger=record.name, at=record.levelname, text=text)


def _note(parts: RunParts, what: str, *, text: str, **more: str) -> None:
    if parts.log is not None:
        # At the level that only the file gets: people have seen it already.
        parts.log.info(what, **more, text=text[:_LONGEST])
