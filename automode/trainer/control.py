"""The one line of orders to a run that trains: from any thread, from other processes, from a key.

Whoever orders something waits here for what became of it; the training thread takes the orders between two steps. While nobody
asks for anything, all that a step costs is one comparison with :attr:`Control.wake`.
"""

from __future__ import annotations

import itertools
import secrets
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from automode.errors import ConflictError, UsageError
from automode.planner.controls import ControlVerb, Order, order_of

NEVER: Final = sys.maxsize
_count = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What became of an order.

    Attributes:
        verb: What was ordered.
        step: The trunk's step at which it was carried out; None where it waits for the next step boundary, as what the training
            thread itself orders does.
        told: In words.
        result: The same for programs.
    """

    verb: ControlVerb
    step: int | None
    told: str
    result: Mapping[str, Any] = field(default_factory=dict)


class Ticket:
    """An order, and the place where its reply comes in.

    Args:
        order: What is asked for.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self._done = threading.Event()
        self._reply: Reply | None = None
        self._error: Exception | None = None

    def reply(self, reply: Reply) -> None:
        """Let the reply be known."""
        self._reply = reply
        self._done.set()

    def fail(self, error: Exception) -> None:
        """Let it be known why nothing was done."""
        self._error = error
        self._done.set()

    def wait(self, timeout: float | None) -> Reply:
        """Wait for the reply.

        Args:
            timeout: Seconds; None: as long as it takes.

        Raises:
            ConflictError: None came in time; the order stands.
            AutomodeError: Nothing was done.
        """
        if not self._done.wait(timeout):
            raise ConflictError(
                f"{self.order.control}: no answer within {timeout:g} s; it is carried out at the next step boundary"
            )
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply


def patience(timeout: float | None) -> float | None:
    """Give the seconds that a lock can be waited for; None: as long as it takes.

    Raises:
        UsageError: It is no number of seconds.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, int | float) or not timeout >= 0.0:
        raise UsageError(
            f"timeout must be a number of seconds, or None to wait as long as it takes, got {timeout!r}"
        )
    return min(timeout, threading.TIMEOUT_MAX)


class Control:
    """Takes orders while a run trains.

    Attributes:
        wake: Batches trained on, from which on the training thread has to look here.
    """

    def __init__(self) -> None:
        self.wake = NEVER
        self._line: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._thread: int | None = None
        self._waits: str | None = None
        self._ended = False

    @property
    def waits(self) -> str | None:
        """``paused`` or ``held``; None while the run trains, and where there is none."""
        return self._waits

    @property
    def running(self) -> bool:
        """Whether a run takes orders now."""
        return self._thread is not None

    def open(self) -> None:
        """Take orders from now on, for a run that trains in this thread.

        Raises:
            ConflictError: Another run does so.
        """
        with self._changed:
            if self._thread is not None:
                raise ConflictError(
                    "this Trainer is training already: wait for that fit, or make another Trainer"
                )
            self._thread, self._ended = threading.get_ident(), False
            self.wake = 0 if self._line else NEVER

    def close(self) -> None:
        """Take no more orders; those that wait are told so."""
        with self._changed:
            self._thread, self._waits, self._ended = None, None, True
            self.wake = NEVER
            self._changed.notify_all()
            left, self._line = list(self._line), deque()
        for ticket in left:
            ticket.fail(ConflictError(f"{ticket.order.control}: the run has ended"))

    def order(
        self, verb: ControlVerb, arguments: Mapping[str, Any], *, actor: str, note: str, timeout: float | None
    ) -> Reply:
        """Ask for something, and wait until it is done; the training thread itself does not wait.

        Raises:
            ConflictError: No run trains, or it did not answer in time.
            UsageError: The arguments make no sense.
            AutomodeError: The run refused.
        """
        order = order_of(verb, arguments, actor=actor, note=note, request=self.request_id())
        seconds = patience(timeout)
        ticket = self.post(order)
        if self._thread == threading.get_ident():
            return Reply(verb=verb, step=None, told="at the next step boundary")
        return ticket.wait(seconds)

    @staticmethod
    def request_id() -> str:
        """Name an order that came from within this process, as no other is named."""
        return f"call-{next(_count):08d}-{secrets.token_hex(4)}"

    def post(self, order: Order) -> Ticket:
        """Put an order into the line.

        Raises:
            ConflictError: No run trains.
        """
        ticket = Ticket(order)
        with self._changed:
            if self._thread is None:
                raise ConflictError(
                    f"{order.control}: this Trainer is not training now; call fit in another thread, or use start_paused=True"
                )
            self._line.append(ticket)
            self.wake = 0
            self._changed.notify_all()
        return ticket

    def wait_until_it_waits(self, timeout: float | None) -> bool:
        """Wait until the run, begun already or not, is paused or held; False where it has ended first, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waits is not None or self._ended, patience(timeout))
            return self._waits is not None

    # For the training thread.

    def stand(self, waits: str | None) -> None:
        """Say whether the run waits: ``paused``, ``held``, or None."""
        with self._changed:
            self._waits = waits
            self._changed.notify_all()

    def take(self) -> Ticket | None:
        """Give the next order; None where there is none."""
        with self._changed:
            return self._line.popleft() if self._line else None

    def put_back(self, ticket: Ticket) -> None:
        """Put an order to the front of the line again."""
        with self._changed:
            self._line.appendleft(ticket)
            self.wake = 0

    def look_again(self, batches: int) -> None:
        """Wake the training thread once it has trained on so many batches, or when an order comes."""
        with self._changed:
            self.wake = 0 if self._line else batches

    def wait(self, seconds: float) -> None:
        """Sleep until an order comes, or until the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._line), seconds)
