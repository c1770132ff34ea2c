"""What the scheduler decides, as values: each can say why, and each becomes a plain JSON record for the log."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from automode.scheduler.rung import Value

PromotionRule = Literal["rank", "drain", "rescue"]
"""``rank``: the paper's rule. ``drain``: the list is used up and the rung owes it. ``rescue``: nothing else can
bring a finite value to the top rung any more."""


class Job(NamedTuple):
    """One segment to train: continue ``trial`` from one rung's checkpoint to the next rung.

    Attributes:
        trial: The trial's number, counted from 0 in the order of starting.
        from_resource: Resource already trained; 0 means from the parent.
        to_resource: Resource at which the metric must be reported.
        attempt: 1 for the first try of this segment, higher after failures.
    """

    trial: int
    from_resource: int
    to_resource: int
    attempt: int


class Best(NamedTuple):
    """The best trial so far: the smallest loss among those that reached the highest rung."""

    trial: int
    resource: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A candidate got its first segment."""

    job: Job
    bracket: int

    @property
    def reason(self) -> str:
        """Why, for the log."""
        return f"trial {self.job.trial} starts: nothing is due for promotion"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """A paused trial goes on to the next rung.

    Attributes:
        job: The segment.
        bracket: The bracket it belongs to.
        level: Resource of the rung that it leaves.
        rank: Its rank in that rung, 0 the best.
        size: How many trials reported in that rung so far.
        due: How many of them the rule lets go on.
        rule: Which rule promoted it.
    """

    job: Job
    bracket: int
    level: int
    rank: int
    size: int
    due: int
    rule: PromotionRule

    @property
    def reason(self) -> str:
        """Why, for the log."""
        place = f"trial {self.job.trial} is number {self.rank + 1} of {self.size} at {self.level}"
        match self.rule:
            case "rank":
                return f"{place}, where the best {self.due} go on to {self.job.to_resource}"
            case "drain":
                return f"{place}; nobody else can arrive there, and it owes {self.due} promotions to {self.job.to_resource}"
            case "rescue":
                return (
                    f"{place}; every trial that went further was lost or diverged, so the next best goes on"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried:
    """A failed segment is tried again from the same checkpoint."""

    job: Job

    @property
    def reason(self) -> str:
        """Why, for the log."""
        job = self.job
        return f"trial {job.trial} repeats {job.from_resource} to {job.to_resource}, attempt {job.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused:
    """A trial reached a rung below the top and waits there.

    Attributes:
        trial: The trial.
        resource: The rung.
        value: What it reported.
        rank: Its rank on arrival, 0 the best.
        size: How many trials reported there, itself included.
        due: How many of them may go on at this moment.
    """

    trial: int
    resource: int
    value: float
    rank: int
    size: int
    due: int

    @property
    def promotable(self) -> bool:
        """Whether the paper's rule would let it go on right now."""
        return self.rank < self.due

    @property
    def reason(self) -> str:
        """Why, for the log."""
        place = f"trial {self.trial} is number {self.rank + 1} of {self.size} at {self.resource}"
        if self.due == 0:
            return f"{place}: too few have arrived for any to go on"
        return f"{place}: {'within' if self.promotable else 'not within'} the best {self.due}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A trial reached the top rung."""

    trial: int
    resource: int
    value: float
    rank: int
    size: int

    @property
    def reason(self) -> str:
        """Why, for the log."""
        return f"trial {self.trial} is fully trained ({self.resource}): number {self.rank + 1} of {self.size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diverged:
    """A trial reported NaN, an infinite value or none: it counts in its rung and never goes on."""

    trial: int
    resource: int
    value: Value

    @property
    def reason(self) -> str:
        """Why, for the log."""
        return f"trial {self.trial} reported {self.value} at {self.resource}: counted, never promoted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeued:
    """A segment failed and waits for another try."""

    trial: int
    resource: int
    attempt: int
    cause: str

    @property
    def reason(self) -> str:
        """Why, for the log."""
        return f"trial {self.trial} failed on its way to {self.resource} ({self.cause}); attempt {self.attempt} is next"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A trial failed for good and was withdrawn from every rung."""

    trial: int
    resource: int
    attempt: int
    cause: str

    @property
    def reason(self) -> str:
        """Why, for the log."""
        return f"trial {self.trial} is given up on its way to {self.resource} after attempt {self.attempt}: {self.cause}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """Somebody stopped a trial: it was withdrawn from every rung."""

    trial: int
    cause: str

    @property
    def reason(self) -> str:
        """Why, for the log."""
        return f"trial {self.trial} was stopped: {self.cause}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignored:
    """A message that changes nothing: a duplicate, a late one, an intermediate value."""

    trial: int
    resource: int | None
    attempt: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Deterministic mode keeps a report back until everything before it in virtual time has arrived."""

    trial: int
    resource: int
    attempt: int

    @property
    def reason(self) -> str:
        """Why, for the log."""
        return f"trial {self.trial} at {self.resource} waits for slower segments that end before it in virtual time"


Issue = Started | Promoted | Retried
"""What :meth:`ASHA.decide` hands out: each carries a ``job``."""

Outcome = Paused | Finished | Diverged | Ignored
"""What a report leads to."""

Failure = Requeued | Lost | Ignored
"""What a failure leads to."""

Decision = Issue | Outcome | Failure | Stopped | Held


def encode_value(value: Value) -> float | str | None:
    """Turn a metric into what strict JSON can hold: non-finite numbers become their names."""
    if value is None or math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def decode_value(value: float | str | None) -> Value:
    """Undo :func:`encode_value`."""
    return float(value) if value is not None else None


def decision_record(decision: Decision) -> dict[str, object]:
    """Turn a decision into a flat record that strict JSON can hold, ``kind`` and ``reason`` included."""
    record: dict[str, object] = {"kind": type(decision).__name__.lower()}
    for each in fields(decision):
        value = getattr(decision, each.name)
        if isinstance(value, Job):
            record.update(value._asdict())
        elif each.name == "value":
            record["value"] = encode_value(value)
        else:
            record[each.name] = value
    record["reason"] = decision.reason
    return record
