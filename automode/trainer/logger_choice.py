"""What ``Trainer(logger=...)`` takes."""

from __future__ import annotations

from typing import Any

from automode.errors import UsageError

NAMES = ("csv", "tensorboard")
"""Loggers by name: ``metrics.csv`` and ``tensorboard/`` in the session's folder."""

EVERY = 50
"""Steps from one that a logger of the user's gets to the next, unless the Trainer says otherwise; Lightning's own number."""


def check_loggers(given: Any) -> tuple[Any, ...]:
    """Refuse what is no logger; returns the loggers, in order.

    Raises:
        UsageError: It is none.
    """
    if given is None or given is False:
        return ()
    every = tuple(given) if isinstance(given, list | tuple) else (given,)
    for one in every:
        if isinstance(one, str):
            if one not in NAMES:
                raise UsageError(
                    f"logger={one!r} is unknown; there are {', '.join(map(repr, NAMES))}, and every logger of Lightning's"
                )
        elif isinstance(one, type) or not callable(getattr(one, "log_metrics", None)):
            what = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
            raise UsageError(
                f"logger must be 'csv', 'tensorboard', an object with log_metrics(metrics, step), or a list of such, got {what}"
            )
    names = [one for one in every if isinstance(one, str)]
    if len(set(names)) < len(names):
        raise UsageError(f"logger names {max(names, key=names.count)!r} twice")
    return every
