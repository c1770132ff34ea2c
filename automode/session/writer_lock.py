"""One writer a session: a lock that the operating system frees when its holder dies, whatever kills it.

The lock is an exclusive transaction on a side SQLite file, which is portable and needs no clean-up. Who holds it
stands in a text file beside it, for the message that a second writer gets.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from pathlib import Path

from automode.errors import SessionBusyError

_LOCK_NAME = "writer.lock"
_HOLDER_NAME = "writer.json"


class WriterLock:
    """The right to write one session folder, held from construction until `release`.

    Raises:
        SessionBusyError: Another writer, in this process or in another, holds it.
    """

    def __init__(self, folder: Path) -> None:
        uri = (folder / _LOCK_NAME).absolute().as_uri() + "?mode=rwc"
        self._connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, timeout=0.0, check_same_thread=False
        )
        try:
            self._connection.execute("BEGIN EXCLUSIVE")
            (folder / _HOLDER_NAME).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except sqlite3.OperationalError as error:
            self._connection.close()
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            raise SessionBusyError(
                f"{folder} is being written by {_holder(folder)}; "
                "wait until it ends, stop it, or start a session of your own"
            ) from None
        except BaseException:
            self._connection.close()
            raise

    def release(self) -> None:
        """Give the right back; calling it twice does no harm."""
        self._connection.close()


def held(folder: Path) -> bool:
    """Tell whether a process, this one or another, holds the right to write a session now."""
    file = folder / _LOCK_NAME
    if not file.is_file():
        return False
    connection = sqlite3.connect(file.absolute().as_uri() + "?mode=ro", uri=True, timeout=0.0)
    try:
        # Reading takes a shared lock, which an exclusive transaction does not grant.
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise
        return True
    finally:
        connection.close()
    return False


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / _HOLDER_NAME).read_text())
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
