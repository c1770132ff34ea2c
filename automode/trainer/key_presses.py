"""Orders by single keys in the terminal that a run was started from, on the same way as every other order."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from typing import Final, Literal

from automode.planner.controls import ControlVerb, Order
from automode.trainer.control import Control
from automode.trainer.terminal import Terminal

Keys = Literal["auto"] | bool

HELP: Final = "keys: p pause or go on, s one step, c checkpoint, t test, h health checks, q stop, ? this line"

_VERBS: Final[dict[str, ControlVerb]] = {
    "s": "step",
    "c": "checkpoint",
    "t": "test",
    "h": "check",
    "q": "stop",
}


class KeyPresses:
    """Looks for keys whenever the run looks into its inbox, in the training thread.

    Args:
        control: Where the orders go.
        tell: Prints a line.
        terminal: Where keys come from.
    """

    def __init__(
        self, control: Control, tell: Callable[[str], None], terminal: Terminal | None = None
    ) -> None:
        self._control = control
        self._tell = tell
        self._terminal = Terminal() if terminal is None else terminal
        self._actor = f"{_name()} (key)"

    def open(self) -> bool:
        """Begin to listen; tells whether there is a terminal to listen to."""
        if not self._terminal.open():
            return False
        self._tell(HELP)
        return True

    def listen(self) -> None:
        """Order what the keys pressed since the last time stand for; others are passed over."""
        for key in self._terminal.read():
            if key == "?":
                self._tell(HELP)
            elif key in ("p", " "):
                self._order("resume" if self._control.waits == "paused" else "pause")
            elif key in _VERBS:
                self._order(_VERBS[key])

    def close(self) -> None:
        """Leave the terminal as it was; calling it twice does no harm."""
        self._terminal.close()

    def _order(self, verb: ControlVerb) -> None:
        if verb == "stop" and self._control.waits == "held":
            verb = "release"
        self._control.post(Order(control=verb, actor=self._actor, request=self._control.request_id()))


def _name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no login name, as in some containers
        return "somebody"
