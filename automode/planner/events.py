"""What the log holds: inputs come from the world, facts are decided, commands ask the world to act.

Inputs are past participles told by the driver; facts are past participles told by the machine; commands are
imperatives whose answer is an input with the same ``command_id``. Bodies are frozen pydantic models tagged by a stable
``kind`` (not a class name). Everything about when, where and why stands on the :class:`Envelope`.

Per-step observations are no pydantic objects: they come as :class:`Rows`, a block of the trunk's frame.

To add an event, add the class to its union: ``match`` with ``assert_never`` in the machine then fails the type check
until it is handled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from pydantic import TypeAdapter

from automode.planner.attempts import Checkpointed, Resumed
from automode.planner.commands import (
    Adopt,
    AskApproval,
    Command,
    Diagnose,
    Evaluate,
    FitGate,
    Merge,
    Resolve,
    Rewind,
    RollBack,
    Scan,
    SetClip,
    SetLearningRate,
    Snapshot,
    StartTrial,
    StopRun,
    StopTrial,
)
from automode.planner.controls import Controlled, HealthChecked, LengthSet, Tested
from automode.planner.facts import (
    BudgetReleased,
    BudgetReserved,
    CardMoved,
    CardProposed,
    CardStarted,
    CooldownSet,
    Fact,
    LineageGrew,
    ModeChanged,
    ReadingChanged,
    RequestRefused,
    RuleEvaluated,
    TrialDecided,
    VerdictGiven,
)
from automode.planner.inputs import (
    Acknowledged,
    Adopted,
    CommandFailed,
    Decided,
    Evaluated,
    GateFitted,
    Group,
    Input,
    Merged,
    Mode,
    Resolved,
    RolledBack,
    Run,
    RunEnded,
    Safeguarded,
    SessionStarted,
    Snapshotted,
    Task,
    TrunkEnded,
    Validated,
    Verb,
    Weights,
)
from automode.planner.interventions import ClipSet, Diagnosed, RateSet, Rewound, UpdateSize
from automode.planner.scans import Clustered, Scanned
from automode.planner.trial_inputs import TrialFailed, TrialReported, TrialsNoted

__all__ = [
    "COMMAND",
    "EVENT_VERSION",
    "FACT",
    "INPUT",
    "Acknowledged",
    "Adopt",
    "Adopted",
    "AskApproval",
    "BudgetReleased",
    "BudgetReserved",
    "CardMoved",
    "CardProposed",
    "CardStarted",
    "Checkpointed",
    "ClipSet",
    "Clustered",
    "Command",
    "CommandFailed",
    "Controlled",
    "CooldownSet",
    "Decided",
    "Diagnose",
    "Diagnosed",
    "Envelope",
    "Evaluate",
    "Evaluated",
    "Fact",
    "FitGate",
    "GateFitted",
    "Group",
    "HealthChecked",
    "Input",
    "LengthSet",
    "LineageGrew",
    "Merge",
    "Merged",
    "Mode",
    "ModeChanged",
    "RateSet",
    "ReadingChanged",
    "RequestRefused",
    "Resolve",
    "Resolved",
    "Resumed",
    "Rewind",
    "Rewound",
    "RollBack",
    "RolledBack",
    "Rows",
    "RuleEvaluated",
    "Run",
    "RunEnded",
    "Safeguarded",
    "Scan",
    "Scanned",
    "SessionStarted",
    "SetClip",
    "SetLearningRate",
    "Snapshot",
    "Snapshotted",
    "StartTrial",
    "StopRun",
    "StopTrial",
    "Task",
    "Tested",
    "TrialDecided",
    "TrialFailed",
    "TrialReported",
    "TrialsNoted",
    "TrunkEnded",
    "UpdateSize",
    "Validated",
    "Verb",
    "VerdictGiven",
    "Weights",
]

INPUT: Final[TypeAdapter[Input]] = TypeAdapter(Input)
FACT: Final[TypeAdapter[Fact]] = TypeAdapter(Fact)
COMMAND: Final[TypeAdapter[Command]] = TypeAdapter(Command)

EVENT_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """One row of the log: who said what, when, and because of which row.

    Attributes:
        seq: Position in the log, from 1, without gaps.
        role: ``input``, ``fact`` or ``command``.
        body: The event.
        cause: ``seq`` of the event that led here; None when it was the trunk row before ``frame_cursor``.
        command_id: Of a command: its own id. Of an input: the id of the command that it answers, else None.
        frame_cursor: Trunk rows that precede this event.
        effective_at: Trunk step at which a command took effect, where that is known.
        t_wall: Seconds since the epoch, by the driver's clock (facts and commands inherit the cause's).
        t_mono: Seconds on a monotonic clock.
    """

    seq: int
    role: Literal["input", "fact", "command"]
    body: Any
    cause: int | None = None
    command_id: str | None = None
    frame_cursor: int = 0
    effective_at: int | None = None
    t_wall: float = 0.0
    t_mono: float = 0.0
    stream: str = "trunk"
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A block of the trunk's frame: one row per attempted step.

    Attributes:
        first: Number of the first row, from 0.
        names: Column names; ``step``, ``time``, ``loss``, ``grad_norm``, ``lr_0``, ``applied`` and ``samples`` are read.
        values: float64, shape ``[rows, len(names)]``. ``time`` in seconds (monotonic), ``applied`` 0 or 1, ``samples`` in samples.
    """

    first: int
    names: Sequence[str]
    values: np.ndarray[Any, np.dtype[np.float64]] = field(repr=False)
