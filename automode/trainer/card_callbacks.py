"""A user's own functions that hear of every card and may answer it, in the training thread, between two steps.

What they decide goes the way of every request: it is logged as an input with the actor ``callback``, judged by the machine, and
replayed. Nothing that a callback does wrong reaches the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from automode.engine import State
from automode.errors import CardError
from automode.planner.cards import CardState, PlanCard, difference
from automode.planner.events import Decided, Verb
from automode.planner.plain_data import plain
from automode.session.inbox import post
from automode.trainer.random_state import forked_rng
from automode.trainer.requests_desk import Request
from automode.trainer.user_warning import tell_user

ACTOR: Final = "callback"
"""Who decides, in the record."""

_OWN: Final = f"{0:020d}-{0:07d}-"
"""Beginning of the ids of requests that callbacks make: those of the inbox begin with the time of day."""


class CardHandle:
    """Answers one card, for the callback that was called with it.

    What is asked for while the callback runs is followed as soon as it returns. A handle that is kept can be used later too, from
    any thread: it then posts to the session's inbox, as the command line does.

    Attributes:
        card: The card as it was proposed, or as this handle has edited it.
        state: Where it stood when the callback was called: ``proposed`` where it waits for an answer.
    """

    def __init__(self, card: PlanCard, state: CardState, session: Path) -> None:
        self.card = card
        self.state = state
        self._session = session
        self._rev = card.rev
        self._asked: list[Decided] | None = []
        self._count = 0

    @property
    def waits(self) -> bool:
        """Whether the card waited for an answer when the callback was called."""
        return self.state is CardState.PROPOSED

    def approve(self, note: str = "") -> None:
        """Let the card run.

        Args:
            note: The reason, for the record.
        """
        self._ask("approve", note, rev=self._rev)

    def reject(self, why: str = "") -> None:
        """Refuse the card; one that runs already, as act mode lets it, is stopped.

        Args:
            why: The reason, for the record.
        """
        self._ask("refuse" if self.waits else "cancel", why, rev=self._rev if self.waits else None)

    def revise(self, note: str) -> None:
        """Send the card back.

        Args:
            note: What should be different.
        """
        self._ask("revise", note, rev=self._rev)

    def edit(self, card: PlanCard | None = None, *, note: str = "", **changes: Any) -> PlanCard:
        """Change the card; what is decided afterwards is about the changed one.

        Args:
            card: The card as it should be; None: as it is, with ``changes``.
            note: The reason, for the record.
            changes: Fields of the card by name.

        Returns:
            The changed card, whose price the run works out anew.

        Raises:
            CardError: The changes make no card.
        """
        wanted = self.card if card is None else card
        try:
            wanted = PlanCard.model_validate(wanted.dump() | changes | {"rev": self._rev})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "card"
            raise CardError(
                f"this edit of card {self.card.id} makes no card: {where}: {first['msg']}"
            ) from None
        if not difference(self.card, wanted):
            return self.card
        self._ask("edit", note, rev=self._rev, body=wanted.dump())
        self._rev += 1
        self.card = wanted.model_copy(update={"rev": self._rev})
        return self.card

    def _ask(self, verb: Verb, note: str, **more: Any) -> None:
        fields = {"verb": verb, "card": self.card.id, "actor": ACTOR, "rev": None, "body": None}
        fields |= plain({"mode": None, "note": note} | more, verb)
        if self._asked is None:
            post(self._session, fields)
            return
        self._count += 1
        # The same each time, so that a run that is taken up again knows its own; the inbox takes it for an id too.
        request = f"{_OWN}{self._count:08d}-{self.card.id}"
        self._asked.append(Decided.model_validate(fields | {"request": request}))

    def _mark(self) -> tuple[PlanCard, int, int]:
        return self.card, self._rev, len(self._asked or ())

    def _back_to(self, mark: tuple[PlanCard, int, int]) -> None:
        """Forget what was asked for since a mark."""
        self.card, self._rev, asked = mark
        del (self._asked or [])[asked:]

    def _taken(self) -> list[Decided]:
        """What was asked for so far; from now on the inbox is asked."""
        asked, self._asked = self._asked or [], None
        return asked

    def __repr__(self) -> str:
        return f"CardHandle({self.card.id}, {self.state})"


CardCallback = Callable[[PlanCard, CardHandle], Any]


class CardCallbacks:
    """Calls a user's functions with each card once.

    Args:
        functions: Called in order, with the card and its handle.
        state: The fold's state; cards that it knows already are not new.
        session: The session's folder.
        log: The session's logger.
    """

    def __init__(self, functions: Sequence[CardCallback], state: State, session: Path, log: Any) -> None:
        self._functions = tuple(functions)
        self._known = len(state.cards)
        self._session = session
        self._log = log
        self._earlier: dict[str, dict[str, Decided]] = {}

    def again(self, requests: Iterable[tuple[int, Request]]) -> list[tuple[int, Request]]:
        """Keep what callbacks decided in an earlier attempt of the run, to be followed when its card is made again.

        Args:
            requests: Rows since the run was taken up, and the request.

        Returns:
            Those that are not callbacks'.
        """
        others = []
        for rows, request in requests:
            if isinstance(request, Decided) and request.request.startswith(_OWN) and request.card is not None:
                self._earlier.setdefault(request.card, {})[request.request] = request
            else:
                others.append((rows, request))
        return others

    def decided(self, state: State) -> list[Decided]:
        """Call the functions with the cards that are new, and give what they decide, in order."""
        if len(state.cards) == self._known:
            return []
        new = list(state.cards.values())[self._known :]
        self._known = len(state.cards)
        found: list[Decided] = []
        for record in new:
            earlier = self._earlier.pop(record.card.id, None)
            if earlier is not None:  # decided once already
                found += earlier.values()
                continue
            handle = CardHandle(record.card, record.state, self._session)
            for function in self._functions:
                self._call(function, record.card, handle)
            found += handle._taken()  # noqa: SLF001  # its other half
        return found

    def _call(self, function: CardCallback, card: PlanCard, handle: CardHandle) -> None:
        before = handle._mark()  # noqa: SLF001  # its other half
        try:
            with forked_rng():
                function(card, handle)
        except Exception as error:
            handle._back_to(before)  # noqa: SLF001
            told = f"{type(error).__name__}: {error}"
            self._log.warning("callback_failed", card=card.id, error=told)
            tell_user(
                f"the callback on card {card.id} failed ({told}); nothing that it asked for is done, and the run goes on",
                RuntimeWarning,
            )
