"""People's requests between the inbox and the log: each is handed on once, and its file goes when the answer is on disk.

Requests about cards and the mode wait here for a boundary; orders to the run go to whoever carries them out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, TypeAdapter, ValidationError

from automode.errors import SessionError, UsageError
from automode.planner.controls import Order, order_of
from automode.planner.events import Controlled, Decided
from automode.planner.plain_data import plain, problems_of
from automode.session.inbox import Inbox, is_request_id

Request = Decided | Controlled
"""A request about cards or the mode, and an order to the run that was carried out."""

REQUEST: Final[TypeAdapter[Request]] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])


class RequestsDesk:
    """Takes requests in, in the order in which they were made.

    Args:
        session: The session's folder.
        log: The session's logger.
    """

    def __init__(self, session: Path, log: Any) -> None:
        self._inbox = Inbox(session)
        self._log = log
        self._waiting: deque[Decided] = deque()
        self._again: deque[tuple[int, Decided]] = deque()
        self._ordered: deque[tuple[int, Controlled]] = deque()
        self._orders: Callable[[Order], None] | None = None
        self._listen: Callable[[], None] | None = None
        self._posted: set[str] = set()
        self._known: set[str] = set()
        self._answered: list[str] = []
        self._deaf = False

    def orders_to(self, take: Callable[[Order], None]) -> None:
        """Hand orders to the run to somebody who carries them out; until then they are refused.

        Args:
            take: Called with each order that comes in, in the order in which they were made.
        """
        self._orders = take

    def listen_by(self, listen: Callable[[], None] | None) -> None:
        """Have somebody else looked at as often as the inbox is, a terminal say; None: nobody."""
        self._listen = listen

    def again(self, requests: Iterable[tuple[int, Request]]) -> None:
        """Take requests that an earlier attempt has followed; each is due after as many rows as it was then.

        Args:
            requests: Rows since the run was taken up, and the request, in order; of the same one twice the later counts.
        """
        due = {request.request: (rows, request) for rows, request in requests}
        ordered = sorted(due.values(), key=lambda item: item[0])
        self._again = deque((rows, body) for rows, body in ordered if isinstance(body, Decided))
        self._ordered = deque((rows, body) for rows, body in ordered if isinstance(body, Controlled))
        self._known = set(due)

    def to_come(self, rows: int) -> list[tuple[int, Request]]:
        """Give the requests of earlier attempts that are still to come: rows until then, and the request.

        Args:
            rows: Rows since the run was begun or taken up.
        """
        waiting: list[tuple[int, Request]] = [*self._again, *self._ordered]
        return [(due - rows, request) for due, request in waiting]

    @property
    def next_due(self) -> int | None:
        """Rows since the run was taken up, after which the next request of an earlier attempt is due."""
        return min((queue[0][0] for queue in (self._again, self._ordered) if queue), default=None)

    def orders_again(self, rows: int) -> list[Controlled]:
        """Give the orders of earlier attempts that are due.

        Args:
            rows: Rows since the run was begun or taken up.
        """
        due = []
        while self._ordered and self._ordered[0][0] <= rows:
            due.append(self._ordered.popleft()[1])
        return due

    def knows(self, request: str) -> bool:
        """Whether an order came from the inbox, where its file still lies."""
        return request in self._posted

    def answered(self, request: str) -> None:
        """Know that an order was carried out, or refused; its file goes when that is on disk."""
        self._posted.discard(request)
        self._answered.append(request)

    def forget(self, request: str) -> None:
        """Take an order's file away at once.

        Raises:
            SessionError: The disk refused.
        """
        self._posted.discard(request)
        self._inbox.done(request)

    def poll(self, now: float, rows: int) -> bool:
        """Look into the inbox, if it is time to; tell whether any request waits for a boundary.

        An inbox that cannot be read is told once, and training goes on.

        Args:
            now: Seconds on the driver's clock.
            rows: Rows since the run was begun or taken up.
        """
        if self._listen is not None:
            self._listen()
        try:
            found = self._inbox.poll(now)
            self._deaf = False
        except SessionError as error:
            found = []
            if not self._deaf:
                self._log.warning("inbox_not_read", why=str(error), then="training goes on; looking again")
            self._deaf = True
        for request, body in found:
            self._take(request, body)
        return bool(self._waiting) or bool(self._again and self._again[0][0] <= rows)

    def take(self, rows: int) -> list[Decided]:
        """Give every request that is due, those of earlier attempts first."""
        due: list[Decided] = []
        while self._again and self._again[0][0] <= rows:
            due.append(self._again.popleft()[1])
        due += self._waiting
        self._waiting.clear()
        # The card of an order from within the process, which an earlier attempt has followed, never had a file.
        self._answered += [decided.request for decided in due if is_request_id(decided.request)]
        return due

    def clear(self) -> None:
        """Take away the requests whose answers are on disk; one that stays is not answered again by this run."""
        for request in self._answered:
            try:
                self._inbox.done(request)
            except SessionError as error:
                self._log.warning("request_kept", request=request, why=str(error))
        self._answered.clear()

    def _take(self, request: str, body: dict[str, Any]) -> None:
        if request in self._known:  # its file was left behind by the attempt that followed it
            return
        try:
            body = {**plain(body, "the request"), "request": request}
            if "control" in body:
                self._order(Order.model_validate(body))
            else:
                self._waiting.append(Decided.model_validate(body))
        except (ValidationError, UsageError) as error:
            why = str(error) if isinstance(error, UsageError) else problems_of(error)
            self._log.warning("request_refused", request=request, why=why[:500])
            self._inbox.refuse(request, why)

    def _order(self, order: Order) -> None:
        asked = order_of(
            order.control, order.arguments, actor=order.actor, note=order.note, request=order.request
        )
        if self._orders is None:
            raise UsageError(
                f"{order.control}: only a Trainer's run takes orders, and a loop of your own that is watched is none"
            )
        self._posted.add(order.request)
        self._orders(asked)
