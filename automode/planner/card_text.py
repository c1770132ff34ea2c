"""Cards and policies as text: YAML both ways, errors that point at the line, JSON schema, and a card at a glance.

Pure: text comes in, text goes out. A card survives YAML and back unchanged, NaN and infinity included.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel

from automode.errors import CardError, PolicyError, UsageError
from automode.planner import card_view
from automode.planner.cards import PlanCard
from automode.planner.displays import Panel
from automode.planner.policy import Policy
from automode.planner.recipes import Cost, TrainingRecipe, Variant
from automode.planner.schema_problems import describe, schema_of, validate
from automode.planner.yaml_text import Problem, read
from automode.planner.yaml_writer import block

__all__ = [
    "card_html",
    "card_panel",
    "card_summary",
    "from_yaml",
    "json_schema",
    "load_model",
    "policy_from_yaml",
    "policy_to_yaml",
    "problems_in",
    "submission_from_yaml",
    "to_yaml",
]

M = TypeVar("M", bound=BaseModel)

_REMARKS: Final = {
    "budget_steps": "the first rung",
    "risk": "what the policy may approve by itself",
}
_FILLED_IN: Final = {
    "id": "00000000",
    "session": "this",
    "step": 0,
    "reason": "manual",
    "because": "submitted",
    "cost": {"sample_passes": 0, "share_of_remaining": 0},
    "cooldown_steps": 0,
    "base": {"step": 0, "policy": "sha256:" + "0" * 64},
}
"""What a submitted card may leave out, with values that pass; :mod:`automode.planner.requests` puts in the real ones."""

card_summary = card_view.card_summary


def to_yaml(card: PlanCard) -> str:
    """Return the card as YAML, in the order of its fields; parts that it does not have are left out.

    A variant shows only what it does differently from the trunk. ``from_yaml`` gives the same card back.
    """
    # The first line holds numbers and hex digits only, so that no text can break out of the comment.
    head = (
        f"# automode plan card {card.id}, revision {card.rev}: proposed at step {card.step}, "
        "takes effect at the next step after approval"
    )
    return "\n".join([head, *block(_spare(card), comments=_REMARKS, prose=("because",)), ""])


def from_yaml(text: str) -> PlanCard:
    """Read a plan card.

    Raises:
        CardError: The text is no plan card; the message lists every problem with its line, what came and what was expected.
    """
    return load_model(text, PlanCard, "plan card", error=CardError)


def submission_from_yaml(text: str) -> dict[str, Any]:
    """Read a card of a person's own, which may leave out what automode fills in when it takes it.

    Returns:
        Plain data of what the text gives, for the request; the rest is validated as if it were there.

    Raises:
        CardError: As :func:`from_yaml`.
    """
    root, problems = read(text)
    if root is not None:
        data = root.data()
        trains = not isinstance(data, dict) or data.get("action") not in ("merge", "adjust", "stop")
        made, problems = validate(PlanCard, root, given=_FILLED_IN | ({} if trains else {"budget_steps": 0}))
        if made is not None:
            return dict(data)
    raise CardError(_message("plan card", problems or [_nothing(PlanCard)]))


def policy_to_yaml(policy: Policy) -> str:
    """Return the policy as YAML with every value written out and explained."""
    lines = ["# automode policy: what automode may do, and when; every value and what it means"]
    for name, field in Policy.model_fields.items():
        key, value = field.alias or name, getattr(policy, name)
        if isinstance(value, BaseModel):
            remarks = {
                f.alias or n: f.description for n, f in type(value).model_fields.items() if f.description
            }
            lines += ["", f"{key}:", *block(value.model_dump(by_alias=True), indent=2, comments=remarks)]
        else:
            remarks = {key: field.description} if field.description else {}
            lines += block({key: value}, comments=remarks)
    return "\n".join([*lines, ""])


def policy_from_yaml(text: str) -> Policy:
    """Read a policy; what it does not say has its default.

    Raises:
        PolicyError: The text is no policy; the message lists every problem with its line, what came and what was expected.
    """
    return load_model(text, Policy, "policy", error=PolicyError)


def load_model(text: str, model: type[M], what: str, *, error: type[UsageError] = UsageError) -> M:
    """Read YAML text into a model, strictly and safely.

    Args:
        text: One YAML 1.2 document without tags, aliases and repeated keys.
        model: The model to make.
        what: What the text should be, for the message.
        error: Class of the error.

    Raises:
        UsageError: (or ``error``) The text is not valid; the message lists every problem.
    """
    made, problems = _load(text, model)
    if made is None:
        raise error(_message(what, problems))
    return made


def problems_in(text: str, model: type[BaseModel]) -> list[Problem]:
    """Return everything that is wrong with a text as a model, in the text's order; empty when it is valid."""
    return _load(text, model)[1]


def json_schema(of: Literal["card", "policy"]) -> dict[str, Any]:
    """Return the JSON schema of a plan card or a policy, for editors and other programs."""
    model: type[BaseModel] = PlanCard if of == "card" else Policy
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(model)}


def card_html(card: PlanCard) -> str:
    """Return the card as self-contained, escaped HTML."""
    return card_panel(card).html()


def card_panel(card: PlanCard) -> Panel:
    """Return the card as a panel, its full text on demand."""
    return card_view.card_panel(card, to_yaml(card))


def _load(text: str, model: type[M]) -> tuple[M | None, list[Problem]]:
    root, problems = read(text)
    if problems:
        return None, problems
    return (None, [_nothing(model)]) if root is None else validate(model, root)


def _nothing(model: type[BaseModel]) -> Problem:
    schema = schema_of(model)
    wanted = describe(schema, schema.get("$defs", {}))
    return Problem(line=0, column=0, path="", text=f"the text is empty; expected {wanted}")


def _message(what: str, problems: list[Problem]) -> str:
    if len(problems) == 1:
        return f"this {what} cannot be taken: {problems[0]}"
    return "\n".join(
        [f"this {what} cannot be taken, for {len(problems)} reasons:", *(f"  {p}" for p in problems)]
    )


def _spare(part: BaseModel) -> dict[str, Any]:
    """Plain data of a part without what is absent; of a variant, without every default."""
    spare: dict[str, Any] = {}
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        is_default = not field.is_required() and value == field.get_default(call_default_factory=True)
        absent = value is None or value == () or value == {}
        if is_default and (absent or _goes_without_saying(part, name)):
            continue
        spare[field.alias or name] = _spare_value(value)
    return spare


def _goes_without_saying(part: BaseModel, name: str) -> bool:
    if isinstance(part, PlanCard):  # nothing is trained or proven by an adjustment
        return part.adjustment is not None and name in ("selection", "acceptance")
    if isinstance(part, TrainingRecipe):
        return name == "retry"
    return isinstance(part, Variant) and not (name == "sam_rho" and part.optimizer == "sam")


def _spare_value(value: Any) -> Any:
    match value:
        case Cost():
            return {
                k: int(v) if v.is_integer() and v < 1e15 else v
                for k, v in value.model_dump(exclude_none=True).items()
            }
        case BaseModel():
            return _spare(value)
        case list() | tuple():
            return [_spare_value(v) for v in value]
        case dict():
            return {k: _spare_value(v) for k, v in value.items()}
        case _:
            return value
