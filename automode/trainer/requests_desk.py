"""People's requests between the inbox and the log: each is handed on once, and its file goes when the answer is on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from automode.errors import SessionError
from automode.planner.events import Decided
from automode.session.inbox import Inbox


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
        self._known: set[str] = set()
        self._answered: list[str] = []
        self._deaf = False

    def again(self, requests: Iterable[tuple[int, Decided]]) -> None:
        """Take requests that an earlier attempt has followed; each is due after as many rows as it was then.

        Args:
            requests: Rows since the run was taken up, and the request, in order; of the same one twice the later counts.
        """
        due = {decided.request: (rows, decided) for rows, decided in requests}
        self._again = deque(sorted(due.values(), key=lambda item: item[0]))
        self._known = set(due)

    def to_come(self, rows: int) -> list[tuple[int, Decided]]:
        """Give the requests of earlier attempts that are still to come: rows until then, and the request.

        Args:
            rows: Rows since the run was begun or taken up.
        """
        return [(due - rows, decided) for due, decided in self._again]

    def poll(self, now: float, rows: int) -> bool:
        """Look into the inbox, if it is time to; tell whether any request waits for a boundary.

        An inbox that cannot be read is told once, and training goes on.

        Args:
            now: Seconds on the driver's clock.
            rows: Rows since the run was begun or taken up.
        """
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
        self._answered += [decided.request for decided in due]
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
            decided = Decided.model_validate({**body, "request": request})
        except ValueError as error:
            self._log.warning("request_refused", request=request, why=str(error)[:500])
            self._inbox.refuse(request, str(error))
            return
        self._waiting.append(decided)
