"""What people ask of a running session: one JSON file a request, from any process, picked up between two steps.

A file appears whole or not at all, so no lock is needed. Requests are handed out in the order in which they were
made; each stays in the folder until `Inbox.done`, so that a run that dies before it has acted finds it again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from automode.errors import SessionCorruptError, SessionError, UsageError
from automode.session.database import DATABASE_NAME, storage_errors
from automode.session.durable_files import TEMPORARY, replace_synced
from automode.session.records import dump_json, load_json

MAX_BYTES = 1_000_000
POLL_SECONDS = 0.2

_FOLDER = "inbox"
_REFUSED = "refused"
_REASON = ".reason.txt"
# Nanoseconds since the epoch, process, counter, chance: sorted by name they are in order of creation.
_REQUEST_ID = re.compile(r"[0-9]{20}-[0-9]{7}-[0-9]{8}-[0-9a-f]{8}")
_counter = itertools.count()
_last_time = 0
_clock_lock = threading.Lock()


def post(session_path: str | os.PathLike[str], request: Mapping[str, Any]) -> str:
    """Ask something of a session, from any process.

    Args:
        session_path: The session folder.
        request: JSON types, at most `MAX_BYTES` as JSON.

    Returns:
        The request's id.

    Raises:
        UsageError: The request is no JSON, or too large.
        SessionError: There is no session there, or the disk refused.
    """
    folder = Path(session_path)
    if not (folder / DATABASE_NAME).is_file():
        raise SessionError(f"{folder} is no session: it has no {DATABASE_NAME}")
    data = dump_json(dict(request)).encode()
    if len(data) > MAX_BYTES:
        raise UsageError(
            f"a request may have {MAX_BYTES} bytes, this one has {len(data)}; store long lists as artifacts"
        )
    request_id = _new_id()
    with storage_errors(folder, "posting a request"):
        (folder / _FOLDER).mkdir(exist_ok=True)
        replace_synced(folder / _FOLDER / f"{request_id}.json", data)
    return request_id


def withdraw(session_path: str | os.PathLike[str], request_id: str) -> bool:
    """Take a request back that one has posted.

    Returns:
        False where it is gone: the run has answered it, or refused it. A run that was reading it just now may still answer.

    Raises:
        UsageError: It is no request id.
        SessionError: The disk refused.
    """
    if not _REQUEST_ID.fullmatch(request_id):
        raise UsageError(f"{request_id!r} is no request id")
    folder = Path(session_path)
    with storage_errors(folder, "taking a request back"):
        try:
            (folder / _FOLDER / f"{request_id}.json").unlink()
        except FileNotFoundError:
            return False
    return True


def is_request_id(text: str) -> bool:
    """Whether this names a file of an inbox; what a process asks of itself has names of another kind."""
    return _REQUEST_ID.fullmatch(text) is not None


def refusal_of(session_path: str | os.PathLike[str], request_id: str) -> str | None:
    """Say why a run has set a request aside that it could not even read; None where it has not.

    Args:
        session_path: The session folder.
        request_id: As :func:`post` gave it.
    """
    reason = Path(session_path) / _FOLDER / _REFUSED / f"{request_id}.json{_REASON}"
    with contextlib.suppress(OSError):
        return reason.read_text(encoding="utf-8", errors="replace").strip() or None
    return None


class Inbox:
    """The reading end, held by the run.

    Args:
        session_path: The session folder.
    """

    def __init__(self, session_path: str | os.PathLike[str]) -> None:
        self.folder = Path(session_path) / _FOLDER
        with storage_errors(self.folder, "making the inbox"):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._scan = str(self.folder)
        self._polled_at: float | None = None
        self._handed_out: set[str] = set()
        self._stuck: set[str] = set()

    def poll(self, now: float) -> list[tuple[str, dict[str, Any]]]:
        """Requests that have come since the last call, in order; looks at most every `POLL_SECONDS`.

        Files that are no request are moved to ``inbox/refused/`` with a text file that says why.

        Args:
            now: Seconds on a monotonic clock.

        Raises:
            SessionError: The folder cannot be read.
        """
        if self._polled_at is not None and now - self._polled_at < POLL_SECONDS:
            return []
        self._polled_at = now
        try:
            names = os.listdir(self._scan)  # noqa: PTH208 - half the time of Path.iterdir, and this runs in the training loop
        except OSError:
            with storage_errors(self.folder, "reading the inbox"):
                raise
        if not names:
            return []
        return self._take(sorted(names))

    def _take(self, names: list[str]) -> list[tuple[str, dict[str, Any]]]:
        taken: list[tuple[str, dict[str, Any]]] = []
        with storage_errors(self.folder, "reading the inbox"):
            for name in names:
                request_id = name.removesuffix(".json")
                if name == _REFUSED or TEMPORARY.fullmatch(name):
                    continue
                if request_id in self._handed_out or name in self._stuck:
                    continue
                try:
                    request = _read(self.folder / name, request_id)
                except FileNotFoundError:  # whoever posted it has taken it back
                    continue
                except (_NotARequestError, SessionCorruptError, OSError) as error:
                    self._refuse(name, str(error))
                    continue
                self._handed_out.add(request_id)
                taken.append((request_id, request))
        return taken

    def done(self, request_id: str) -> None:
        """Forget a request that has been acted upon (its answer stands in the log); unknown ones do no harm.

        Raises:
            UsageError: It is no request id.
            SessionError: The disk refused.
        """
        if not _REQUEST_ID.fullmatch(request_id):
            raise UsageError(f"{request_id!r} is no request id")
        with storage_errors(self.folder, "clearing the inbox"):
            (self.folder / f"{request_id}.json").unlink(missing_ok=True)
        self._handed_out.discard(request_id)

    def refuse(self, request_id: str, reason: str) -> None:
        """Set a request aside that cannot be followed, with a text file that says why.

        Args:
            request_id: As `poll` gave it.
            reason: For the person who posted it.
        """
        self._refuse(f"{request_id}.json", reason)
        self._handed_out.discard(request_id)

    def _refuse(self, name: str, reason: str) -> None:
        """Set a file aside; one that cannot be moved is left and not looked at again: it must not fail a run."""
        refused = self.folder / _REFUSED
        target = refused / name
        try:
            refused.mkdir(exist_ok=True)
            while os.path.lexists(target):
                target = refused / f"{name}.{secrets.token_hex(4)}"
            (self.folder / name).rename(target)
            target.with_name(f"{target.name}{_REASON}").write_text(
                reason + "\n", encoding="utf-8", errors="backslashreplace"
            )
        except FileNotFoundError:
            return
        except OSError:
            self._stuck.add(name)


class _NotARequestError(Exception):
    """A file in the inbox that cannot be a request."""


def _read(path: Path, request_id: str) -> dict[str, Any]:
    if path.suffix != ".json" or not _REQUEST_ID.fullmatch(request_id):
        raise _NotARequestError(f"{path.name} is not named like a request; use automode.session.inbox.post")
    if path.is_symlink() or not path.is_file():
        if not os.path.lexists(path):
            raise FileNotFoundError(path)
        raise _NotARequestError(f"{path.name} is no plain file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _NotARequestError(f"{path.name} has more than {MAX_BYTES} bytes")
    try:
        request = load_json(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _NotARequestError(f"{path.name} is no UTF-8 text: {error}") from error
    if not isinstance(request, dict):
        raise _NotARequestError(f"{path.name} holds a {type(request).__name__} where a mapping was needed")
    return request


def _new_id() -> str:
    global _last_time  # noqa: PLW0603 - ids of one process keep their order even if the wall clock stands or jumps back
    with _clock_lock:
        _last_time = max(time.time_ns(), _last_time + 1)
        stamp, number = _last_time, next(_counter)
    return f"{stamp:020d}-{os.getpid() % 10**7:07d}-{number % 10**8:08d}-{secrets.token_hex(4)}"
