"""The fold's state: one mutable value, singly owned by whoever calls the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

from automode.engine.guards import Guards
from automode.planner.acceptance import AlphaSpending
from automode.planner.approval import CardRecord
from automode.planner.cards import Action
from automode.planner.events import (
    Clustered,
    Command,
    Diagnosed,
    Evaluated,
    GateFitted,
    Merged,
    Mode,
    Run,
    Scanned,
    Snapshotted,
    TrialReported,
    Validated,
    Weights,
)
from automode.planner.pacing import PacingState
from automode.planner.policy import Policy
from automode.planner.recipes import Variant
from automode.planner.rules.base import Probed, Rule
from automode.planner.signals.suite import SignalSuite
from automode.scheduler import ASHA, Ledger

KEEP_READINGS = 64
"""Latest validations, scans and clusterings that rules may look back on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something that could replace the control, with its utility on val-A."""

    name: str
    weights: Weights
    value: float
    into: Literal["trunk", "export"] = "trunk"
    variant: Variant | None = None


@dataclass(slots=True, kw_only=True)
class Execution:
    """A running card: what was asked of the world, and what has come back."""

    card: str
    action: Action
    started_at: int
    base: Snapshotted | None = None
    control: Snapshotted | None = None
    variants: tuple[Variant, ...] = ()
    asha: ASHA | None = None
    steps: tuple[int, ...] = ()
    """Steps of each trial, where each is the specialist of a part; empty: they climb a ladder."""
    control_at: int = 0
    per_trunk_step: float = 1.0
    control_trial: int | None = None
    """Number of the trial that anneals as the card's specialists do, and nothing else; None: they do not anneal."""
    control_attempt: int = 0
    annealed: TrialReported | None = None
    """What that trial came to."""
    reports: dict[tuple[int, int], TrialReported] = field(default_factory=dict)
    """Reports by (trial, rung)."""
    dropped: set[str] = field(default_factory=set)
    """Checkpoints of trials that nothing can go on from any more; the files may be deleted."""
    waiting_for: set[str] = field(default_factory=set)
    """Ids of the gate, merge or adjusting commands whose answers are still out."""
    combining: bool = False
    gate: GateFitted | None = None
    merged: Merged | None = None
    chosen: Candidate | None = None
    look: int | None = None
    evaluated: Evaluated | None = None

    @property
    def control_value(self) -> float | None:
        """Utility of the control on val-A, once it is known."""
        if self.annealed is not None and self.control is not None and self.control.value is not None:
            # Better than an anneal alone, and better than the trunk which adoption would replace.
            annealed = self.annealed.value
            return max(annealed, self.control.value) if isfinite(annealed) else annealed
        if self.control is not None:
            return self.control.value
        return None if self.merged is None else self.merged.control_value


@dataclass(slots=True, kw_only=True)
class State:
    """Everything that the machine knows. Serialisable parts keep their own ``state()``; nothing here is a tensor."""

    next_seq: int = 1
    attempt: int = 1
    rows: int = 0
    superseded: int = 0
    """Rows of attempts that a later one has put out of the story; ``rows`` counts them."""
    step: int = 0
    t_mono: float = 0.0
    first_time: float | None = None
    row_time: float = 0.0
    t_wall: float = 0.0
    session: str = ""
    seed: int = 0
    mode: Mode = "observe"
    policy: Policy = field(default_factory=Policy)
    policy_digest: str = ""
    run: Run | None = None
    planning_budget: int = 0
    look_every: int = 1
    next_look: int = 0
    next_scan: int = 0
    scanned_at: int = 0
    scan_paid_at: int = 0
    """Step at which the last scan is no more than its share of the compute so far."""
    suite: SignalSuite = field(default_factory=SignalSuite)
    rules: Sequence[Rule] = ()
    outcomes: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    validated: list[Validated] = field(default_factory=list)
    scanned: list[Scanned] = field(default_factory=list)
    clustered: list[Clustered] = field(default_factory=list)
    diagnosed: list[Diagnosed] = field(default_factory=list)
    next_diagnosis: int = 0
    diagnosis_passes: int = 0
    guards: Guards = field(default_factory=Guards)
    pacing: PacingState = field(default_factory=PacingState)
    ledger: Ledger = field(default_factory=lambda: Ledger(total=1))
    admitted: set[str] = field(default_factory=set)
    """Cards that hold or held a reservation."""
    cards: dict[str, CardRecord] = field(default_factory=dict)
    executions: dict[str, Execution] = field(default_factory=dict)
    spending: AlphaSpending = field(default_factory=AlphaSpending)
    looked: tuple[str, ...] = ()
    """What attempts that were cut off have looked at on val-B, by the number of the look."""
    requests: set[str] = field(default_factory=set)
    pending: dict[str, Command] = field(default_factory=dict)
    ordinal: int = 0
    lineage: str = "trunk:0"
    adoptions: int = 0
    undo: dict[str, str] = field(default_factory=dict)
    """Adopted card to the digest of the trunk before it."""
    best: str | None = None
    """Digest of the complete state at the best validation so far, where one is stored."""
    best_of: dict[str, str | None] = field(default_factory=dict)
    """Card to what :attr:`best` was when it was adopted; a rollback goes back to it."""
    probed: Probed | None = None
    """The best of the first probe of the rate, where it was not adopted."""
    trunk_ended: bool = False
    ended: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def started(self) -> bool:
        """Whether the session's first event has been handled."""
        return self.run is not None

    @property
    def trained(self) -> int:
        """Rows of the story: attempted steps that led to where the trunk stands."""
        return self.rows - self.superseded

    @property
    def passes_per_step(self) -> float:
        """Forward-equivalents of one trunk step."""
        return 3.0 * (self.run.batch if self.run is not None else 1.0)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean seconds of a trunk step so far, by the rows' clock; None before there are two rows."""
        if self.first_time is None or self.trained < 2:
            return None
        return max(0.0, self.row_time - self.first_time) / (self.trained - 1)

    @property
    def fork(self) -> Execution | None:
        """The running fork card; there is at most one."""
        return next((e for e in self.executions.values() if e.action == "fork"), None)


def remember(history: list[Any], item: Any) -> None:
    """Append, and forget what is older than the rules may look back on."""
    history.append(item)
    if len(history) > KEEP_READINGS:
        del history[: len(history) - KEEP_READINGS]
