"""What a person may ask of a run while it trains, and what the log says of it.

The same verbs come from the Trainer's methods, from ``automode ctl`` and from a key; each is one :class:`Order`, carried out between
two steps, and one :class:`Controlled` in the log, also where it was refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from automode.errors import UsageError
from automode.planner.plain_data import plain, problems_of
from automode.planner.recipes import Part

ControlVerb = Literal[
    "pause",
    "resume",
    "step",
    "stop",
    "set",
    "checkpoint",
    "load",
    "test",
    "check",
    "scan",
    "fork",
    "merge",
    "release",
]
Check = Literal["determinism", "gradients", "activations", "numerics", "throughput", "data_order"]
Verdict = Literal["good", "doubtful", "bad", "unknown"]
Count = Annotated[int, Field(ge=1, le=10**15)]

VERBS: Final[tuple[ControlVerb, ...]] = get_args(ControlVerb)
CHECKS: Final[tuple[Check, ...]] = get_args(Check)
ALL: Final = "all"

AGAIN: Final = frozenset({"set"})
"""Verbs that change what the rows to come will hold: a run taken up from before them carries them out again, at the same row."""


class _NoArguments(Part):
    """A verb that needs nothing to be said."""


class StepArguments(Part):
    """How far to train before pausing again."""

    n: Count = Field(default=1, description="training steps")


class SetArguments(Part):
    """What to change; at most one of the two lengths, and one of the two ways to say the rate."""

    max_epochs: Count | None = None
    max_steps: Count | None = None
    lr: float | None = Field(default=None, gt=0.0, allow_inf_nan=False, description="of the first group")
    lr_mul: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _something(self) -> SetArguments:
        if all(value is None for value in (self.max_epochs, self.max_steps, self.lr, self.lr_mul)):
            raise ValueError("give one of max_epochs, max_steps, lr and lr_mul")
        if None not in (self.max_epochs, self.max_steps) or None not in (self.lr, self.lr_mul):
            raise ValueError("give max_epochs or max_steps, and lr or lr_mul, not both of a pair")
        return self


class LoadArguments(Part):
    """Which of the session's checkpoints."""

    checkpoint: str = Field(
        default="last", min_length=1, description="last, best, or the beginning of a digest"
    )


class CheckArguments(Part):
    """Which health check."""

    what: Check | Literal["all"] = ALL
    steps: int = Field(default=3, ge=1, le=100, description="steps that a check trains or reads, at the most")


class CardArguments(Part):
    """A fork or a merge: a whole card as for ``automode submit``, or a few numbers of the one that is made."""

    card: dict[str, Any] | None = None
    lr_mul: float | None = Field(default=None, gt=0.0, allow_inf_nan=False, description="of the only variant")
    budget_steps: Count | None = Field(default=None, description="the first rung")
    max_steps: Count | None = Field(default=None, description="the last rung")

    @model_validator(mode="after")
    def _one_of_two(self) -> CardArguments:
        if self.card is not None and {self.lr_mul, self.budget_steps, self.max_steps} != {None}:
            raise ValueError("a whole card says everything: give no number beside it")
        return self


class MergeArguments(Part):
    """A merge of the trunk's own averages, or a whole card."""

    card: dict[str, Any] | None = None


_ARGUMENTS: Final[Mapping[str, type[Part]]] = {
    "step": StepArguments,
    "set": SetArguments,
    "load": LoadArguments,
    "check": CheckArguments,
    "fork": CardArguments,
    "merge": MergeArguments,
}
_TEXT: Final = frozenset({"checkpoint", "what"})
"""Arguments that stay text, even where they look like numbers, as some digests do."""

_POSITIONAL: Final = {"step": "n", "load": "checkpoint", "check": "what"}


class Order(Part):
    """One request to a run."""

    control: ControlVerb
    actor: str = Field(min_length=1)
    note: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)
    request: str = Field(
        default="", description="the inbox's id; empty where it came from within the process"
    )


class Controlled(Part):
    """A person's order, and what became of it."""

    kind: Literal["controlled"] = "controlled"
    request: str
    verb: ControlVerb | Literal["hold"] = Field(description="hold: the run has ended and is kept")
    actor: str
    step: int = Field(description="the trunk's, at which it was carried out")
    note: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)
    refused: str | None = Field(default=None, description="why nothing was done")
    told: str = Field(default="", description="what became of it, in words")
    result: dict[str, Any] = Field(default_factory=dict, description="the same for programs")


class LengthSet(Part):
    """A person made the run longer or shorter; one of the two lengths is null."""

    kind: Literal["length_set"] = "length_set"
    step: int
    max_epochs: int | None
    max_steps: int | None
    total_steps: int = Field(ge=0, description="steps of the whole run; 0: not known beforehand")


class Tested(Part):
    """The test set was evaluated in the middle of a run; nothing is decided on it."""

    kind: Literal["tested"] = "tested"
    step: int
    label: str = Field(description="what AUTOMODE_TEST_LABEL held meanwhile")
    n: int = Field(ge=0, description="samples")
    metrics: dict[str, float]


class HealthChecked(Part):
    """One health check of the run as it stands; the run was put back bit for bit."""

    kind: Literal["health_checked"] = "health_checked"
    step: int
    check: Check
    verdict: Verdict
    why: str
    seconds: float = Field(ge=0.0)
    numbers: dict[str, float] = Field(default_factory=dict)
    worst: list[dict[str, Any]] = Field(default_factory=list, description="layers, the worst first")


Control = Annotated[Controlled | LengthSet | Tested | HealthChecked, Field(discriminator="kind")]
CONTROL: Final[TypeAdapter[Control]] = TypeAdapter(Control)


def arguments_of(verb: ControlVerb, arguments: Mapping[str, Any]) -> Any:
    """Check a verb's arguments, and give them as a model.

    Raises:
        UsageError: There is no such argument, or it cannot have that value.
    """
    model = _ARGUMENTS.get(verb, _NoArguments)
    try:
        return model.model_validate(dict(arguments))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        known = list(model.model_fields)
        if first["type"] == "extra_forbidden":
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            near = difflib.get_close_matches(where, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{verb} has no argument {where!r}: {takes}{hint}") from None
        what = f"{verb}: {where}" if where else verb
        came = f", got {first['input']!r}" if where else ""
        raise UsageError(f"{what}: {first['msg'].removeprefix('Value error, ')}{came}") from None


def order_of(
    verb: ControlVerb, arguments: Mapping[str, Any], *, actor: str, note: str = "", request: str = ""
) -> Order:
    """Make an order of what somebody asks for, in a form that the log can hold.

    Raises:
        UsageError: There is no such argument, it cannot have that value, or the actor or the note is no text.
    """
    asked = arguments_of(verb, arguments).model_dump(exclude_unset=True)
    given = {"control": verb, "actor": actor, "note": note, "request": request}
    try:
        return Order.model_validate(plain({**given, "arguments": asked}, verb))
    except ValidationError as error:
        raise UsageError(f"{verb}: {problems_of(error)}") from None


def arguments_from(verb: ControlVerb, words: Sequence[str]) -> dict[str, Any]:
    """Read arguments as they stand on a command line: ``name=value``, and the one that needs no name.

    Numbers become numbers; everything else stays text.

    Raises:
        UsageError: A word fits nowhere.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            name, value = _POSITIONAL.get(verb, ""), word
        if not name:
            raise UsageError(f"{verb} cannot take {word!r}: write name=value")
        if name in found:
            raise UsageError(f"{verb}: {name} was given twice")
        found[name] = value if name in _TEXT else _number(value)
    arguments_of(verb, found)
    return found


def verb_of(text: str) -> ControlVerb:
    """Give the verb of that name.

    Raises:
        UsageError: There is none.
    """
    for verb in VERBS:
        if verb == text:
            return verb
    near = difflib.get_close_matches(text, VERBS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"there is no verb {text!r}; {hint}the verbs: {', '.join(VERBS)}")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
