"""Text that a person hands over, read with care."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from automode.errors import UsageError

MAX_BYTES: Final = 4_000_000
"""More than any text that is read after: a million characters of at most four bytes."""


def read_text(name: str, *, known: Sequence[str] = ()) -> str:
    """Read a UTF-8 file; ``-`` means standard input.

    Args:
        name: The file.
        known: Names that might have been meant where there is no such file.

    Raises:
        UsageError: There is no such file, it cannot be read, it is too large, or it is no UTF-8.
    """
    try:
        if name == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        close = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"there is no file {name}{guess}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{name!r} cannot be read: {error}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{name} has more than {MAX_BYTES:,} bytes, which no card or policy needs")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is no UTF-8 text: {error}") from None
