"""Where the driver's times come from; a test brings its own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where the driver's times come from; the fold sees them only on events."""

    def wall(self) -> float:
        """Seconds since the epoch."""
        ...

    def mono(self) -> float:
        """Seconds on the clock that the probe stamps rows with."""
        ...


class SystemClock:
    """The machine's clocks."""

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def mono(self) -> float:
        """Seconds of ``perf_counter``."""
        return time.perf_counter()
