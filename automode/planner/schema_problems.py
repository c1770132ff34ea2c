"""What is wrong with a text that should be a model: pydantic's findings, told by line, path, expectation and a guess.

Pydantic tells where a problem is by a tuple that mixes keys with the tags of unions; walking the model's JSON schema and
the text's nodes along it gives the place in the text and what the schema wants there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from automode.planner.yaml_text import Node, Problem, dotted, shown

M = TypeVar("M", bound=BaseModel)
Schema = Mapping[str, Any]


@lru_cache(maxsize=16)
def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the model's JSON schema by the names that a text uses. It is shared: do not change it."""
    return model.model_json_schema(by_alias=True, mode="validation")


def validate(
    model: type[M], root: Node, *, given: Mapping[str, Any] | None = None
) -> tuple[M | None, list[Problem]]:
    """Make a model of a text's nodes, strictly: no number in quotes, no ``yes`` for true.

    Args:
        model: The model to make.
        root: The text.
        given: Plain data for keys that the text may leave out.

    Returns:
        The model, or None, and every problem, in the text's order.
    """
    data = root.data()
    text = json.dumps({**(given or {}), **data} if isinstance(data, dict) else data)
    try:
        return model.model_validate_json(text, strict=True, by_alias=True, by_name=False), []
    except ValidationError as error:
        found = [_Place.find(model, root, details) for details in error.errors(include_url=False)]
    # A value that fits no member of a union is told once, and not at all where a part of it is to blame.
    blamed = {place.path[:n] for place in found for n in range(len(place.path))}
    kept = [p for p in found if not (p.is_union and p.path in blamed)]
    return None, sorted({place.problem() for place in kept})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One finding and where it is.

    Attributes:
        path: Keys and positions that lead to the value.
        schema: What the model wants there.
        parent: The schema of the mapping that should hold the last key.
        key: Node of the last key, where the text has it.
        node: The value; the innermost one that exists, where it is missing.
        defs: Named schemas.
        details: Pydantic's finding.
    """

    path: tuple[str | int, ...]
    schema: Schema
    parent: Schema
    key: Node | None
    node: Node
    defs: Schema
    details: ErrorDetails

    @classmethod
    def find(cls, model: type[BaseModel], root: Node, details: ErrorDetails) -> _Place:
        """Follow pydantic's location through the schema and the text."""
        whole = schema_of(model)
        defs: Schema = whole.get("$defs", {})
        schema: Schema = whole
        parent: Schema = whole
        node, key = root, None
        path: list[str | int] = []
        for part in details["loc"]:
            schema = _plain(schema, defs)
            if isinstance(part, int):
                schema = _items(schema, defs)
                if node.kind == "list" and part < len(node.items):
                    node, key = node.items[part], None
                path.append(part)
            elif part in (tags := schema.get("discriminator", {}).get("mapping", {})):
                schema = _deref({"$ref": tags[part]}, defs)
            elif node.kind == "map" and len(_members(schema)) == 1:
                parent, schema = schema, schema.get("properties", {}).get(part) or _values(schema)
                if (child := node.child(part)) is not None:
                    key, node = child
                path.append(part)
            # Whatever is left is the label of a union's member, which no text holds.
        return cls(
            path=tuple(path), schema=schema, parent=parent, key=key, node=node, defs=defs, details=details
        )

    @property
    def is_union(self) -> bool:
        return len(_members(_plain(self.schema, self.defs))) > 1

    def problem(self) -> Problem:
        at = self.key if self.key is not None and self.details["type"] == "extra_forbidden" else self.node
        return Problem(line=at.line, column=at.column, path=dotted(self.path), text=self._text())

    def _text(self) -> str:
        wanted = describe(self.schema, self.defs)
        match self.details["type"]:
            case "missing":
                about = self.schema.get("description")
                return f"is missing; expected {wanted}{f' ({about})' if about else ''}"
            case "extra_forbidden":
                known = list(self.parent.get("properties", {}))
                guess = _guess(str(self.path[-1]), known)
                return f"unknown key{guess}" if guess else f"unknown key; known here: {', '.join(known)}"
            case "union_tag_not_found":
                return f"`kind` is missing; expected {wanted}"
            case "union_tag_invalid":
                tags = list(_plain(self.schema, self.defs)["discriminator"]["mapping"])
                tag = str(self.details.get("ctx", {}).get("tag", ""))
                return (
                    f"there is no kind '{shown(tag)}'{_guess(tag, tags)}; expected one of {', '.join(tags)}"
                )
            case "value_error" | "assertion_error":
                return self.details["msg"].partition(", ")[2]
            case _:
                return self._mismatch(wanted)

    def _mismatch(self, wanted: str) -> str:
        came = came_text(self.node)
        if not self.schema:
            return f"{self.details['msg']}; came {came}"
        if self.details["type"] == "finite_number":
            wanted = f"{wanted}, finite"
        schema = _plain(self.schema, self.defs)
        hint = _guess(self.node.text, [str(v) for v in schema.get("enum", ())]) if self.node.text else ""
        scalar = self.node.data() if self.node.kind == "scalar" else None
        if schema.get("type") == "string" and isinstance(scalar, bool | int | float):
            hint = f'; if you mean the text, write "{shown(self.node.text)}" in quotes'
        return f"expected {wanted}, came {came}{hint}"


def came_text(node: Node) -> str:
    """Say what a node holds, in a few words."""
    if node.kind != "scalar":
        return f"a {'list' if node.kind == 'list' else 'mapping'} of {len(node.items)}"
    match node.data():
        case None:
            return "nothing (null)"
        case str() as text:
            return f"the text '{shown(text)}'"
        case bool() as value:
            return "true" if value else "false"
        case _:
            return f"the number {shown(node.text)}"


def _guess(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word[:100].lower(), known, n=1, cutoff=0.6)
    return f", did you mean `{close[0]}`?" if close else ""


def _deref(schema: Schema, defs: Schema) -> Schema:
    while "$ref" in schema:
        schema = defs[schema["$ref"].rpartition("/")[2]]
    return schema


def _members(schema: Schema) -> list[Schema]:
    """The members of a union, null left out; the schema itself where it is none."""
    return [m for m in schema.get("anyOf", (schema,)) if m.get("type") != "null"]


def _plain(schema: Schema, defs: Schema) -> Schema:
    """Follow references, and the one member of an optional."""
    schema = _deref(schema, defs)
    members = _members(schema)
    return _plain(members[0], defs) if "anyOf" in schema and len(members) == 1 else schema


def _items(schema: Schema, defs: Schema) -> Schema:
    for member in _members(schema):
        plain = _plain(member, defs)
        if plain.get("type") == "array":
            items: Schema = plain.get("items", {})
            return items
    return {}


def _values(schema: Schema) -> Schema:
    values = schema.get("additionalProperties")
    return values if isinstance(values, Mapping) else {}


def describe(schema: Schema, defs: Schema) -> str:
    """Say in words what a schema wants."""
    schema = _deref(schema, defs)
    members = _members(schema)
    if "anyOf" in schema:
        words = [describe(m, defs) for m in members]
        if "a number" in words and "a whole number" in words:
            words.remove("a whole number")
        if len(members) < len(schema["anyOf"]):
            words.append("null")
        return " or ".join(dict.fromkeys(words))
    if "discriminator" in schema:
        return f"a mapping with `kind`: one of {', '.join(schema['discriminator']['mapping'])}"
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return f"`{schema['const']}`"
    return _describe_type(schema, defs)


def _describe_type(schema: Schema, defs: Schema) -> str:
    match schema.get("type"):
        case "integer":
            return f"a whole number{_bounds(schema)}"
        case "number":
            return f"a number{_bounds(schema)}"
        case "boolean":
            return "true or false"
        case "string":
            limit = f" of at most {schema['maxLength']} characters" if "maxLength" in schema else ""
            some = "some text" if schema.get("minLength") else "text"
            like = f" like {schema['pattern']}" if "pattern" in schema else ""
            return f"{some}{limit}{like}"
        case "array":
            least = f"at least {schema['minItems']} of " if schema.get("minItems") else ""
            most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
            items = _plain(schema.get("items", {}), defs)
            kind = "such values" if len(_members(items)) > 1 else describe(items, defs)
            return f"a list of {least}{kind}{most}"
        case "object" if "properties" in schema:
            needed = schema.get("required")
            return f"a mapping with {', '.join(needed or schema['properties'])}"
        case "object":
            most = f" of at most {schema['maxProperties']}" if "maxProperties" in schema else ""
            return f"a mapping{most}"
        case _:
            return "a value"


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    words = [
        f"{word} {value:g}"
        for word, value in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if value is not None
    ]
    return f" {' and '.join(words)}" if words else ""
