"""SIGINT and SIGTERM while a run trains: the first asks for a stop at the next step boundary, a second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from automode.trainer.terminal import as_before

EXIT_TERMINATED = 128 + 15
"""Exit status of a run that SIGTERM stopped, as a shell reports it."""


_ASKED = b"\n%s: stopping after this step, with the run's state stored; once more to stop at once\n"


class StopSignals:
    """Catches both signals inside a ``with`` block in the main thread; elsewhere it does nothing.

    The handlers of before are back when the block is left, whatever happens, and as soon as a second signal comes. A signal
    that is ignored (``nohup``) stays ignored, and child processes do not inherit the handlers' effect.

    Args:
        asked: What is printed when a signal comes; ``%s`` stands for its name.

    Attributes:
        received: The signal that asked for a stop, or None.
    """

    def __init__(self, asked: bytes = _ASKED) -> None:
        self.received: signal.Signals | None = None
        self._asked = asked
        self._before: dict[signal.Signals, Any] = {}
        self._handlers: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            # None: installed by other than Python code, which could not be put back.
            if before is not None and before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def leave(self, text: str) -> NoReturn:
        """End the run as the signal asks, now that everything is durable.

        Args:
            text: What to tell.

        Raises:
            KeyboardInterrupt: For SIGINT.
            SystemExit: For SIGTERM, with status 143, after a handler that the user had installed.
        """
        received = self.received
        assert received is not None
        before = self._before.get(received, self._handlers.get(received))
        self._restore()
        if received is signal.SIGINT:
            raise KeyboardInterrupt(text)
        if callable(before) and before is not signal.default_int_handler:
            before(received, None)
        raise SystemExit(EXIT_TERMINATED)

    def _restore(self) -> None:
        if os.getpid() != self._owner:
            return
        before, self._before = self._before, {}
        self._handlers |= before
        for number, handler in before.items():
            if signal.getsignal(number) == self._received:
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked child (a loader's worker): Ctrl-C reaches the whole group, and the run still needs the child for its step.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.received is None:
            self.received = signal.Signals(number)
            with contextlib.suppress(OSError):
                # Not through sys.stderr, which may be in the middle of a line of its own.
                os.write(2, self._asked % self.received.name.encode())
            return
        self._restore()
        if number == signal.SIGINT:
            raise KeyboardInterrupt("stopped at once by a second signal; what was not yet stored is lost")
        as_before()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
