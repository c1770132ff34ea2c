"""Warnings that point at the user's own line."""

from __future__ import annotations

import contextlib
import sys
import warnings

_PACKAGE = __name__.partition(".")[0]


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn, naming the nearest line outside of automode that led here.

    Args:
        text: What to say.
        category: The kind of warning.
    """
    level, frame = 1, sys._getframe(0)  # noqa: SLF001  # warnings itself reads frames so
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != _PACKAGE:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level)


def tell_user(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn of what must end nothing: where warnings are errors, the text goes to standard error.

    Args:
        text: What to say.
        category: The kind of warning.
    """
    try:
        warn_user(text, category)
    except Warning:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no standard error
            sys.stderr.write(f"{category.__name__}: {text}\n")
