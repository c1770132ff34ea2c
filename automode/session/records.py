"""What the log is made of: records, the rows beside them, and the JSON they are written in.

The encoding is strict JSON (no bare ``NaN``) and reads back exactly what was written, value for value and type
for type, with two documented exceptions: a tuple comes back as a list and a mapping as a ``dict``.

=============================  ===========================================================================
in memory                      on disk
=============================  ===========================================================================
``nan``, ``inf``, ``-inf``     ``{"$float": "NaN"}``, ``{"$float": "Infinity"}``, ``{"$float": "-Infinity"}``
the *string* ``"NaN"``         ``"NaN"`` (so what pydantic wrote with ``ser_json_inf_nan="strings"`` stays text)
``{"$float": x}``              ``{"$dict": {"$float": x}}``
``{"$dict": x}``               ``{"$dict": {"$dict": x}}``
=============================  ===========================================================================

Only a mapping with exactly one key is ever a tag, so every other mapping stands as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from automode.errors import SessionCorruptError, UsageError
from automode.planner.card_text import from_yaml
from automode.planner.cards import PlanCard, Reason

Role = Literal["input", "fact", "command"]

ROLES: tuple[Role, ...] = ("input", "fact", "command")
TRUNK = "trunk"

_FLOAT_TAG = "$float"
_DICT_TAG = "$dict"
_TAGS = (_FLOAT_TAG, _DICT_TAG)
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One event or command of a session's log.

    Attributes:
        seq: Position in the log: 1, 2, 3, ... without a gap.
        role: ``input`` came from the world, ``fact`` was decided, ``command`` asks the shell to act.
        kind: Stable tag of the body's type (never a class name).
        v: Version of the body's shape.
        body: The payload, plain JSON types; floats may be NaN or infinite.
        t_wall: Seconds since the epoch (display only; may jump).
        t_mono: Seconds on the writer's monotonic clock (timers fire on it).
        cause: ``seq`` of the record that this one follows from.
        command_id: Id shared by a command and its answer.
        effective_at: The trunk's frame row at which it takes effect.
        stream: ``trunk``, a trial's id, or a rank.
        attempt: 1 for the first run of this stream, one more after every resume or rewind.
        frame_cursor: How many trunk rows had been written before it (superseded ones count).
    """

    seq: int
    role: Role
    kind: str
    v: int
    body: dict[str, Any]
    t_wall: float
    t_mono: float
    cause: int | None = None
    command_id: str | None = None
    effective_at: int | None = None
    stream: str = TRUNK
    attempt: int = 1
    frame_cursor: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CardRow:
    """One revision or state of a plan card, as of record ``seq``; ``body`` is the card's own text."""

    card_id: str
    rev: int
    state: str
    body: str
    seq: int

    @property
    def card(self) -> PlanCard:
        """The card, read from its text.

        Raises:
            CardError: It was written by another version, with fields that this one does not know.
        """
        return from_yaml(self.body)

    @property
    def reason(self) -> Reason:
        """Why the card was made."""
        return self.card.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class LineageRow:
    """A node of the family tree of weights; written again under the same ``node``, the last one counts."""

    node: str
    parents: tuple[str, ...]
    kind: str
    card: str | None
    step: int
    checkpoint: str | None
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    """A checkpoint known to be durable: its digest, the trunk's step and what it was made for."""

    digest: str
    step: int
    kind: str
    seq: int


def dump_json(value: Any) -> str:
    """Write ``value`` as strict JSON that `load_json` reads back unchanged.

    Raises:
        UsageError: A type that JSON does not know, a key that is no string, or nesting without end.
    """
    try:
        return json.dumps(_tagged(value, "$"), allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise UsageError(
            "value nested too deeply (or containing itself) to be written as JSON; flatten it"
        ) from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"value cannot be written as JSON: {error}") from error


def load_json(text: str) -> Any:
    """Read what `dump_json` wrote.

    Raises:
        SessionCorruptError: The text is no JSON, not strict JSON, or uses a tag that does not exist.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if _FLOAT_TAG in text or _DICT_TAG in text:
            return _untagged(value)
    except (ValueError, RecursionError) as error:
        raise SessionCorruptError(f"stored JSON cannot be read: {error}; it starts {text[:80]!r}") from error
    return value


def is_encodable(text: str) -> bool:
    """Whether ``text`` has a UTF-8 form (lone surrogates have none), as names in the database must."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tagged(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT_TAG: _special_name(value)}
    if isinstance(value, (list, tuple)):
        return [_tagged(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise UsageError(f"{path}: keys must be strings to survive JSON, got {key!r}; use str(key)")
            plain[key] = _tagged(item, f"{path}.{key}")
        return {_DICT_TAG: plain} if _looks_tagged(plain) else plain
    raise UsageError(
        f"{path}: a value of type {type(value).__name__} cannot be stored as JSON; "
        "pass None, bool, int, float, str, list or dict (numpy: .tolist(), tensors: .item())"
    )


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _looks_tagged(value):
        ((tag, inner),) = value.items()
        if tag == _FLOAT_TAG:
            if not isinstance(inner, str) or inner not in _SPECIAL:
                raise ValueError(f"unknown special float {inner!r}")
            return _SPECIAL[inner]
        if not isinstance(inner, dict):
            raise ValueError(f"{_DICT_TAG} must hold a mapping")
        return {key: _untagged(item) for key, item in inner.items()}
    return {key: _untagged(item) for key, item in value.items()}


def _looks_tagged(value: dict[str, Any]) -> bool:
    return len(value) == 1 and next(iter(value)) in _TAGS


def _special_name(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"bare {name} is no JSON")
