"""The session's own logger: lines for people on the console, JSON lines in ``log.jsonl``.

It is wrapped by hand and shares nothing with structlog's global configuration or the standard library's loggers, which
belong to the user.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import structlog
from structlog.typing import FilteringBoundLogger

from automode.errors import UsageError
from automode.session.database import storage_errors
from automode.session.session import LOG_NAME

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class SessionLog:
    """The log file of a session and the logger that writes it; use as a context manager or `close` it.

    A log line never fails the run: if the file cannot be written, the console says so once, and the file says how many
    lines it missed when it can be written again.

    Args:
        session_path: The session folder.
        console: Takes one line for people; None prints to standard error. With a progress bar pass ``tqdm.write``.
        level: The least that reaches the console; the file gets everything.
        colors: Colours on the console; None: only where standard error is a terminal and ``console`` is None.

    Raises:
        UsageError: There is no such level.
        SessionError: The file cannot be opened.
    """

    def __init__(
        self,
        session_path: str | os.PathLike[str],
        *,
        console: Callable[[str], object] | None = None,
        level: str = "info",
        colors: bool | None = None,
    ) -> None:
        if level not in _LEVELS:
            raise UsageError(f"level must be one of {', '.join(_LEVELS)}, got {level!r}")
        self.path = Path(session_path) / LOG_NAME
        self._console = _print if console is None else console
        self._level = _LEVELS[level]
        self._missed = 0
        self._torn = False
        colored = console is None and sys.stderr.isatty() if colors is None else colors
        self._render = structlog.dev.ConsoleRenderer(
            colors=colored,
            pad_event_to=0,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
        with storage_errors(self.path.parent, "opening the log"):
            self._file: IO[bytes] | None = _open_whole_lines(self.path)
        self.logger: FilteringBoundLogger = structlog.wrap_logger(
            object(),  # never called: `_emit` ends the chain
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                self._emit,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
            context_class=dict,
            cache_logger_on_first_use=False,
        )

    def close(self) -> None:
        """Close the file; what is logged afterwards reaches the console only."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _emit(self, _: Any, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        """Last processor of the chain: write the line to both places, then stop."""
        self._to_file(event)
        if _LEVELS.get(str(event["level"]), logging.CRITICAL) >= self._level:
            line = self._render(None, method, {**event, "timestamp": str(event["timestamp"])[11:19]})
            with contextlib.suppress(
                OSError, ValueError
            ):  # a full disk, a broken pipe, letters that it has not
                self._console(line)
        raise structlog.DropEvent

    def _to_file(self, event: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        line = _json_line(structlog.processors.format_exc_info(None, "", dict(event)))
        if self._missed:
            notice = {"level": "error", "event": f"{self._missed} log lines are missing here"}
            line = b"\n" * self._torn + _json_line(notice) + line
        try:
            self._write_whole(self._file, line)
        except OSError as error:
            if not self._missed:
                with contextlib.suppress(OSError, ValueError):
                    self._console(
                        f"the log file {self.path} cannot be written ({error}); the run goes on without it"
                    )
            self._missed += 1
        else:
            self._missed, self._torn = 0, False

    def _write_whole(self, file: IO[bytes], line: bytes) -> None:
        written = file.write(line)
        if written != len(line):
            self._torn = self._torn or written > 0
            raise OSError(errno.ENOSPC, "only a part of the line was written")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the console


def _open_whole_lines(path: Path) -> IO[bytes]:
    """Open for appending; a line that a kill has torn is closed first, so that it spoils no other."""
    file = path.open("a+b", buffering=0)
    try:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
    except BaseException:
        file.close()
        raise
    return file


def _json_line(event: Mapping[str, Any]) -> bytes:
    return (json.dumps(_jsonable(event), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    return str(value)
