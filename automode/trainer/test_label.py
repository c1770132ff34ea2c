"""The label of a test, for code of the user's that writes files in the middle of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from automode.session import Session

ENVIRONMENT: Final = "AUTOMODE_TEST_LABEL"
"""Holds ``test_1``, ``test_2`` and so on while a test runs, numbered through the session; at other times it is as it was."""


def next_number(session: Path) -> int:
    """Give the number of a session's next test; those of a story that was left count too.

    Args:
        session: Its folder.
    """
    with Session.open(session) as opened:
        return 1 + sum(1 for _ in opened.events("tested", include_superseded=True))


@contextmanager
def labelled(number: int) -> Iterator[str]:
    """Set the label for a block, and put back what was there, also on an exception.

    Args:
        number: Of the session's tests, from 1.
    """
    before = os.environ.get(ENVIRONMENT)
    label = f"test_{number}"
    os.environ[ENVIRONMENT] = label
    try:
        yield label
    finally:
        if before is None:
            os.environ.pop(ENVIRONMENT, None)
        else:
            os.environ[ENVIRONMENT] = before
