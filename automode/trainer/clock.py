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


class ShiftedClock:
    """A clock that goes on where another process's stood, so that timers fire on the time that the run was alive.

    Args:
        clock: This process's.
        now: What it shall show now, in seconds.
    """

    def __init__(self, clock: Clock, now: float) -> None:
        self._clock = clock
        self.shift = now - clock.mono()

    def wall(self) -> float:
        """Seconds since the epoch."""
        return self._clock.wall()

    def mono(self) -> float:
        """Seconds, going on."""
        return self._clock.mono() + self.shift
