"""What automode has spent, and how far the trunk may train for that."""

from __future__ import annotations

from math import ceil

from automode.engine import State
from automode.engine.lifecycle import due_at_end


class Spending:
    """Reads the fold's ledger.

    Args:
        state: The fold's.
        total: Steps that the user asked for.
        within: Whether automode's spending shortens the trunk.
    """

    def __init__(self, state: State, total: int, *, within: bool) -> None:
        self._state = state
        self._total = total
        self._within = within

    def set_total(self, total: int) -> int:
        """Know that a person made the run longer or shorter; returns by how many steps."""
        longer, self._total = total - self._total, total
        return longer

    @property
    def shortens(self) -> bool:
        """Whether what is spent is taken off the trunk."""
        return self._within and self._state.mode in ("propose", "act")

    @property
    def steps(self) -> float:
        """Trunk steps' worth of compute that automode has spent, where that shortens the trunk."""
        return self._state.ledger.automode / self._state.passes_per_step if self.shortens else 0.0

    @property
    def limit(self) -> int:
        """Step that the trunk may train up to."""
        taken = self._state.ledger.automode + due_at_end(self._state)
        return max(0, self._total - ceil(taken / self._state.passes_per_step))

    @property
    def accounts(self) -> dict[str, int]:
        """Sample passes by account: the trunk's, automode's in all, and each part of that."""
        ledger = self._state.ledger
        found = {"trunk": ledger.trunk, "automode": ledger.automode}
        for account, amount in ledger.accounts().items():
            owner = "outside cards" if account.card is None else f"card {account.card}"
            name = f"  {owner}: {account.purpose}"
            if account.trial is not None:
                name += f" {account.trial}"
            found[name] = amount
        return found
