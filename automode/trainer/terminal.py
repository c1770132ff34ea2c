"""A terminal that hands over single keys, and is as it was before whatever happens.

Keys come without Enter and are not echoed; Ctrl-C and Ctrl-Z still send their signals. The settings of before are back when
the terminal is closed, when Ctrl-Z stops the process (until it goes on), and before a signal kills it. Only ``kill -9`` and a crash of
the interpreter itself (``os.abort``, ``os._exit``) cannot be caught. Nothing is read and nothing is set while the process is in the background.

On Windows there is nothing to set, and keys are asked for one by one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

if sys.platform == "win32":
    import msvcrt
else:
    import select
    import termios

_AT_ONCE = 64
_open: list[Terminal] = []


def as_before() -> None:
    """Give every open terminal its settings of before, for whoever is about to end the process."""
    for terminal in _open[:]:  # each takes itself off it
        terminal.close()


class Terminal:
    """Standard input, key by key; use it in the main thread, and close it.

    Args:
        descriptor: Of the terminal; standard input's unless given.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self._given: int = -1
        self._before: list[Any] | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()

    def open(self) -> bool:
        """Begin to take keys.

        Returns:
            Whether keys can be had: there is a terminal, it is this process's, nobody else takes keys from it, and this is the
            main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        try:
            self._given = sys.stdin.fileno() if self._descriptor is None else self._descriptor
            if not os.isatty(self._given):
                return False
        except (OSError, ValueError, AttributeError):  # no standard input, or one that is no file
            return False
        _open.append(self)
        if sys.platform != "win32":
            self._catch()  # first: a signal in between would leave the terminal changed
            if not self._apply():
                self.close()
                return False
        return True

    def close(self) -> None:
        """Give the terminal its settings of before, and the signals their handlers; calling it twice does no harm."""
        if self not in _open or os.getpid() != self._owner:
            return
        _open.remove(self)
        if sys.platform != "win32":
            self._restore()
        for number, handler in self._handlers.items():
            if signal.getsignal(number) in (self._stopped, self._continued, self._killed):
                signal.signal(number, handler)
        self._handlers.clear()

    def read(self) -> str:
        """Give the keys pressed since the last call; never waits."""
        if self not in _open or os.getpid() != self._owner:
            return ""
        if sys.platform == "win32":
            keys = ""
            while msvcrt.kbhit() and len(keys) < _AT_ONCE:
                keys += msvcrt.getwch()
            return keys
        if self._before is None or not self._ours() or not select.select([self._given], [], [], 0.0)[0]:
            return ""
        try:
            with _blocked(signal.SIGTTIN):
                return os.read(self._given, _AT_ONCE).decode("utf-8", "ignore")
        except OSError:  # hung up, or in the background since a moment ago
            return ""

    if sys.platform != "win32":

        def _ours(self) -> bool:
            try:
                return os.tcgetpgrp(self._given) == os.getpgrp()
            except OSError:
                return False

        def _apply(self) -> bool:
            """Take keys one by one, where the terminal is this process's now."""
            if self._before is not None:
                return True
            try:
                if not self._ours():
                    return False
                before = termios.tcgetattr(self._given)
                if (
                    not before[3] & termios.ICANON
                ):  # somebody else takes keys from it, and gives it back as it was
                    return False
                self._before = before
                wanted = termios.tcgetattr(self._given)
                wanted[3] &= ~(termios.ICANON | termios.ECHO)
                wanted[6][termios.VMIN], wanted[6][termios.VTIME] = 1, 0
                termios.tcsetattr(self._given, termios.TCSADRAIN, wanted)
            except (OSError, termios.error):
                self._before = None
                return False
            return True

        def _restore(self) -> None:
            before, self._before = self._before, None
            if before is None or not self._ours():  # in the background, a terminal is the shell's
                return
            with contextlib.suppress(OSError, termios.error), _blocked(signal.SIGTTOU):
                termios.tcsetattr(self._given, termios.TCSADRAIN, before)

        def _catch(self) -> None:
            """Install handlers where nobody has: the default of each would leave the terminal as it is."""
            for number, handler in (
                (signal.SIGTSTP, self._stopped),
                (signal.SIGCONT, self._continued),
                (signal.SIGHUP, self._killed),
                (signal.SIGQUIT, self._killed),
                (signal.SIGTERM, self._killed),
                (signal.SIGUSR1, self._killed),
                (signal.SIGUSR2, self._killed),
                (signal.SIGALRM, self._killed),
                (signal.SIGXCPU, self._killed),
            ):
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._handlers[number] = signal.SIG_DFL
                    signal.signal(number, handler)

    def _stopped(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the shell gets its terminal; when the process goes on, keys are taken again."""
        if sys.platform == "win32":
            return
        if os.getpid() == self._owner:
            self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._stopped)
        self._continued(number, frame)

    def _continued(self, number: int, frame: FrameType | None) -> None:
        if sys.platform != "win32" and os.getpid() == self._owner and self in _open:
            self._apply()

    def _killed(self, number: int, frame: FrameType | None) -> None:
        """What ends the process by default ends it now, the terminal first."""
        self.close()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back that the terminal sends to who uses it from the background; the call fails instead."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
