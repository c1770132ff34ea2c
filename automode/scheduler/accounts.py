"""Prices and names in the compute ledger: what a sample pass costs, who pays, and what an answer looks like.

The unit is a one-sample forward-equivalent of the trunk's model: a training step's sample costs 3 (forward, and
backward at twice its price), a SAM step's sample 6, an evaluated sample 1, each times the model's size relative to the
trunk. Amounts are whole units, rounded up, so that sums are exact and a replay gives the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from automode.errors import UsageError
from automode.scheduler.ladder import whole


class Work(IntEnum):
    """Kinds of sample pass, with their price in forward-equivalents."""

    TRAIN = 3
    SAM = 6
    EVALUATE = 1


def units(work: Work, samples: int, *, size: float = 1.0) -> int:
    """Price sample passes.

    Args:
        work: What is done with each sample.
        samples: How many samples pass, counted with repetition.
        size: The model's forward cost relative to the trunk's, > 0.

    Returns:
        Whole units, rounded up.

    Raises:
        UsageError: ``samples`` is no whole number >= 0, or ``size`` is not positive and finite.
    """
    passes = whole("samples", samples, least=0) * int(work)
    if not (math.isfinite(size) and size > 0):
        raise UsageError(
            f"size is {size!r}, but must be a positive finite number, 1.0 for the trunk's own model"
        )
    return passes if size == 1.0 else math.ceil(passes * size)


def optimizer_steps(resource_steps: int, work: Work) -> int:
    """Give how many optimizer steps a number of resource steps buys: SAM pays two ordinary steps for one of its own.

    Raises:
        UsageError: ``work`` does not train, or ``resource_steps`` is no whole number >= 0.
    """
    if work is Work.EVALUATE:
        raise UsageError("work is EVALUATE, but only TRAIN and SAM take optimizer steps")
    return whole("resource_steps", resource_steps, least=0) * int(Work.TRAIN) // int(work)


Purpose = Literal["trial", "scan", "gate", "merge", "evaluate", "average"]
PURPOSES: tuple[Purpose, ...] = ("trial", "scan", "gate", "merge", "evaluate", "average")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whom a charge belongs to.

    Attributes:
        card: The plan card's id; ``None`` for what automode spends outside any card.
        purpose: What it was spent on.
        trial: The trial's number; given exactly when the purpose is ``trial``.

    Raises:
        UsageError: The fields contradict each other.
    """

    card: str | None
    purpose: Purpose
    trial: int | None = None

    def __post_init__(self) -> None:
        """Validate."""
        if self.purpose not in PURPOSES:
            raise UsageError(f"purpose is {self.purpose!r}, but must be one of {', '.join(PURPOSES)}")
        if (self.trial is not None) != (self.purpose == "trial"):
            raise UsageError(
                f"purpose is {self.purpose!r} and trial is {self.trial!r}: trial accounts name their trial"
            )
        if self.purpose == "trial" and self.card is None:
            raise UsageError("a trial's account needs its card")
        if self.card == "":
            raise UsageError("card is an empty string: give the card's id, or None for work outside any card")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Units set aside for a card, for as long as it runs."""

    card: str
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """Units that were counted.

    Attributes:
        account: Who pays.
        amount: How much.
        left: What the card's reservation, or the policy's cap, still holds.
    """

    account: Account
    amount: int
    left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Nothing was reserved or charged, and why.

    Attributes:
        reason: The sentence for card and log.
        asked: Units asked for.
        available: Units that there were.
    """

    reason: str
    asked: int
    available: int
