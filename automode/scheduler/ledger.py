"""The compute ledger: every sample pass of a run, by account, under caps that bind before anything is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, Strict, ValidationError

from automode.errors import SchedulerError, UsageError
from automode.scheduler.accounts import Account, Charge, Purpose, Refusal, Reservation
from automode.scheduler.ladder import whole


@dataclass(slots=True, kw_only=True)
class _Card:
    reserved: int
    is_open: bool = True
    spent: dict[tuple[Purpose, int | None], int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.spent.values())


class Ledger:
    """Counts the trunk's and automode's sample passes and keeps automode within its caps.

    A card reserves its worst case when it is admitted, or is refused; later charges draw on the reservation and are
    refused once it is used up, so a card can never take more than was set aside. Closing a card returns the rest.

    Args:
        total: The run's whole budget in units (epochs x batches x batch size x 3), as the user gave it.
        share: The part of what remains that running cards and other automode work may hold at any admission, 0..1.
        cap: The most that automode may spend in the whole run, in units; ``None`` leaves it to ``share``.
        within: Whether automode's spending comes out of ``total`` (the default policy) or on top of it.

    Raises:
        UsageError: An argument cannot be taken.
    """

    __slots__ = ("_automode", "_cards", "_general", "_held", "_trunk", "cap", "share", "total", "within")

    def __init__(
        self, *, total: int, share: float = 0.15, cap: int | None = None, within: bool = True
    ) -> None:
        self.total = whole("total", total, least=1)
        if isinstance(share, bool) or not (0.0 <= share <= 1.0):
            raise UsageError(f"share is {share!r}, but must be a number from 0 to 1")
        self.share = float(share)
        self.cap = None if cap is None else whole("cap", cap, least=0)
        self.within = within
        self._trunk = 0
        self._automode = 0
        self._held = 0
        self._general: dict[Purpose, int] = {}
        self._cards: dict[str, _Card] = {}

    # Totals.

    @property
    def trunk(self) -> int:
        """Units that the trunk spent."""
        return self._trunk

    @property
    def automode(self) -> int:
        """Units that automode spent, cards and all else together."""
        return self._automode

    @property
    def held(self) -> int:
        """Units reserved by open cards and not spent yet."""
        return self._held

    @property
    def remaining(self) -> int:
        """Units left of the run's budget, never below 0; reservations are not deducted."""
        return max(0, self.total - self._trunk - (self.automode if self.within else 0))

    @property
    def available(self) -> int:
        """Units that can be reserved or charged outside cards right now."""
        return self._available(self.share)

    def _available(self, share: float) -> int:
        room = math.floor(share * self.remaining) - self.held
        if self.cap is not None:
            room = min(room, self.cap - self.automode - self.held)
        return max(0, room)

    def spent(self, card: str) -> int:
        """Give the units that a card spent; 0 for a card that was never admitted."""
        return self._cards[card].total if card in self._cards else 0

    def left(self, card: str) -> int:
        """Give the units that an open card may still spend; 0 for any other card."""
        entry = self._cards.get(card)
        return entry.reserved - entry.total if entry is not None and entry.is_open else 0

    def accounts(self) -> dict[Account, int]:
        """List every account with its units."""
        listed = {Account(card=None, purpose=purpose): amount for purpose, amount in self._general.items()}
        for card, entry in self._cards.items():
            for (purpose, trial), amount in entry.spent.items():
                listed[Account(card=card, purpose=purpose, trial=trial)] = amount
        return listed

    # Admission.

    def reserve(
        self, card: str, amount: int, *, limit: int | None = None, share: float | None = None
    ) -> Reservation | Refusal:
        """Set a card's worst case aside, or refuse the card.

        Args:
            card: The card's id.
            amount: Its worst case in units: all rungs, drain, one retry, scans, gate, merge, evaluations.
            limit: The card's own cap, if it states one.
            share: The part of what remains that may be held once this card is admitted, in place of the ledger's own.

        Returns:
            The reservation, or why there is none.

        Raises:
            SchedulerError: The card was admitted before.
            UsageError: An argument cannot be taken.
        """
        asked = whole("amount", amount, least=0)
        if not card:
            raise UsageError("card is empty, but a reservation needs the card's id")
        if card in self._cards:
            raise SchedulerError(
                f"card {card} was admitted before: a new revision needs a new id or a release"
            )
        if limit is not None and asked > whole("limit", limit, least=0):
            reason = (
                f"the worst case takes {asked} units and the card's own cap is {limit}: shrink the ladder"
            )
            return Refusal(reason=reason, asked=asked, available=limit)
        of_rest = self.share if share is None else share
        available = self._available(of_rest)
        if asked > available:
            return Refusal(reason=self._shortage(asked, available, of_rest), asked=asked, available=available)
        self._cards[card] = _Card(reserved=asked)
        self._held += asked
        return Reservation(card=card, amount=asked)

    def release(self, card: str) -> int:
        """Close a card and return what it did not spend; a closed card can spend nothing more.

        Returns:
            The units returned; 0 when the card is closed already.

        Raises:
            SchedulerError: The card was never admitted.
        """
        entry = self._admitted(card)
        left = self.left(card)
        entry.is_open = False
        self._held -= left
        return left

    # Spending.

    def charge_trunk(self, amount: int) -> int:
        """Count the user's own training; it is never refused. Returns what remains of the run's budget.

        Raises:
            UsageError: ``amount`` is no whole number >= 0.
        """
        self._trunk += whole("amount", amount, least=0)
        return self.remaining

    def charge(self, account: Account, amount: int) -> Charge | Refusal:
        """Count units before they are spent, or refuse: then nothing is counted and the work must not be done.

        Raises:
            SchedulerError: The account's card was never admitted.
            UsageError: ``amount`` is no whole number >= 0.
        """
        asked = whole("amount", amount, least=0)
        if account.card is None:
            available = self.available
            if asked > available:
                return Refusal(
                    reason=self._shortage(asked, self.available, self.share), asked=asked, available=available
                )
            self._general[account.purpose] = self._general.get(account.purpose, 0) + asked
            self._automode += asked
            return Charge(account=account, amount=asked, left=self.available)
        entry = self._admitted(account.card)
        left = self.left(account.card)
        if asked > left:
            state = f"has {left} units left of {entry.reserved}" if entry.is_open else "is closed"
            reason = f"card {account.card} {state} and the {account.purpose} needs {asked}"
            return Refusal(reason=reason, asked=asked, available=left)
        key = (account.purpose, account.trial)
        entry.spent[key] = entry.spent.get(key, 0) + asked
        self._automode += asked
        self._held -= asked
        return Charge(account=account, amount=asked, left=left - asked)

    def count(self, account: Account, amount: int) -> None:
        """Count units that were spent already, whatever the caps say: what happened stands in the books.

        A card's own reservation shrinks by it as far as it reaches; a closed card's late costs count for the run alone.

        Raises:
            SchedulerError: The account's card was never admitted.
            UsageError: ``amount`` is no whole number >= 0.
        """
        spent = whole("amount", amount, least=0)
        if account.card is None:
            self._general[account.purpose] = self._general.get(account.purpose, 0) + spent
        else:
            entry = self._admitted(account.card)
            before = self.left(account.card)
            key = (account.purpose, account.trial)
            entry.spent[key] = entry.spent.get(key, 0) + spent
            entry.reserved = max(entry.reserved, entry.total)
            self._held += self.left(account.card) - before
        self._automode += spent

    def refund(self, account: Account, amount: int) -> None:
        """Take back units that were charged and then not spent, as when a segment broke off.

        Raises:
            SchedulerError: The account does not hold that much.
            UsageError: ``amount`` is no whole number >= 0.
        """
        back = whole("amount", amount, least=0)
        held = self.accounts().get(account, 0)
        if back > held:
            raise SchedulerError(
                f"{back} units cannot be refunded to an account that was charged {held}: {account}"
            )
        if back == 0:
            return
        self._automode -= back
        if account.card is None:
            self._general[account.purpose] -= back
            return
        entry = self._cards[account.card]
        entry.spent[account.purpose, account.trial] -= back
        if entry.is_open:
            self._held += back

    # Its state as a value.

    def to_state(self) -> dict[str, Any]:
        """Give the whole ledger as plain data that strict JSON can hold."""
        return {
            "version": 1,
            "total": self.total,
            "share": self.share,
            "cap": self.cap,
            "within": self.within,
            "trunk": self._trunk,
            "general": dict(self._general),
            "cards": {
                card: {
                    "reserved": entry.reserved,
                    "open": entry.is_open,
                    "spent": [[purpose, trial, amount] for (purpose, trial), amount in entry.spent.items()],
                }
                for card, entry in self._cards.items()
            },
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Ledger:
        """Rebuild a ledger from :meth:`to_state`.

        Raises:
            SchedulerError: The state is no such value, or a card spent more than it reserved.
        """
        try:
            read = _LedgerState.model_validate(state)
            ledger = cls(total=read.total, share=read.share, cap=read.cap, within=read.within)
            for card, entry in read.cards.items():
                spent = {(purpose, trial): amount for purpose, trial, amount in entry.spent}
                for purpose, trial in spent:
                    Account(card=card, purpose=purpose, trial=trial)
                if len(spent) != len(entry.spent) or sum(spent.values()) > entry.reserved:
                    raise SchedulerError(
                        f"the ledger state contradicts itself: card {card} spent {entry.spent}"
                    )
                ledger._cards[card] = _Card(reserved=entry.reserved, is_open=entry.open, spent=spent)
        except (ValidationError, UsageError) as error:
            raise SchedulerError(f"this is no ledger state that this version can read: {error}") from error
        ledger._trunk = read.trunk
        ledger._general = dict(read.general)
        ledger._automode = sum(read.general.values()) + sum(card.total for card in ledger._cards.values())
        ledger._held = sum(ledger.left(card) for card in ledger._cards)
        return ledger

    def _admitted(self, card: str) -> _Card:
        if card not in self._cards:
            raise SchedulerError(f"card {card} was never admitted: reserve its worst case first")
        return self._cards[card]

    def _shortage(self, asked: int, available: int, share: float) -> str:
        reason = (
            f"{asked} units are needed and {available} are free: automode may hold"
            f" {share:.0%} of the {self.remaining} that remain, and {self.held} are reserved"
        )
        return (
            reason
            if self.cap is None
            else f"{reason}; {self.automode} of its total cap of {self.cap} are spent"
        )


class _CardState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    reserved: NonNegativeInt
    open: bool
    spent: list[Annotated[tuple[Purpose, int | None, NonNegativeInt], Strict(False)]]  # JSON has lists only


class _LedgerState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1]
    total: PositiveInt
    share: float
    cap: NonNegativeInt | None
    within: bool
    trunk: NonNegativeInt
    general: dict[Purpose, NonNegativeInt]
    cards: dict[str, _CardState]
