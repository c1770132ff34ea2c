"""Plain data to YAML that a person likes to read: small things on one line, long prose folded, odd characters escaped.

The layout is ours and stable, so that two revisions of a card differ only where the card differs. What is written reads back
to the same data under YAML 1.2 (:mod:`automode.planner.yaml_text`) and, for text, under 1.1 readers too: whatever one
of them would take for a number, a truth value or null is quoted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from automode.errors import UsageError

WIDTH: Final = 118
COMMENT_COLUMN: Final = 51

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+()-]*(?: [A-Za-z0-9_./+(][A-Za-z0-9_./+()-]*)*", re.ASCII)
_RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf"})
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def escaped(text: str) -> str:
    """Return text on one line with every control, format and surrogate character shown as a YAML escape."""
    return "".join(_escape(c) for c in text)


def _escape(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char == " " or char.isprintable():
        return char
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def scalar(value: object) -> str:
    """Write null, a truth value, a number or text on one line.

    Raises:
        UsageError: The value is of another type.
    """
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return int.__repr__(value)
        case float():
            return _number(value)
        case str():
            plain = _PLAIN.fullmatch(value) is not None and value.lower() not in _RESERVED
            return str.__str__(value) if plain else f'"{escaped(value)}"'
        case _:
            raise UsageError(f"a value of type {type(value).__name__} has no place in YAML: {value!r}")


def _number(value: float) -> str:
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    text = float.__repr__(value)
    # Readers of YAML 1.1 take 1e-05 for text; with the point both versions read a number.
    return text if "." in text else text.replace("e", ".0e")


def flow(value: object) -> str:
    """Write any plain value on one line."""
    match value:
        case Mapping():
            return "{" + ", ".join(f"{scalar(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(flow(v) for v in value) + "]"
        case _:
            return scalar(value)


def block(
    data: Mapping[str, Any],
    *,
    indent: int = 0,
    comments: Mapping[str, str] | None = None,
    prose: Sequence[str] = (),
) -> list[str]:
    """Write a mapping as lines, one entry after the other.

    Args:
        data: Plain data: mappings, lists, tuples, text, numbers, truth values and None.
        indent: Spaces before each line.
        comments: A remark by key, beside an entry of one line, or above it where that gets too wide.
        prose: Keys whose text is folded over several lines.

    Raises:
        UsageError: A value is of a type that YAML has no plain form for.
    """
    lines: list[str] = []
    for key, value in data.items():
        entry = _entry(f"{' ' * indent}{scalar(str(key))}:", value, indent, folded=key in prose)
        if comments and key in comments and len(entry) == 1:
            beside = f"{entry[0]:<{COMMENT_COLUMN}} # {comments[key]}"
            entry = [beside] if len(beside) <= WIDTH else [f"{' ' * indent}# {comments[key]}", *entry]
        lines += entry
    return lines


def _entry(head: str, value: object, indent: int, *, folded: bool = False) -> list[str]:
    if folded and isinstance(value, str):
        return _prose(head, value, indent + 2)
    one_line = f"{head} {flow(value)}"
    match value:
        case Mapping() if value and not (_small(value) and len(one_line) <= WIDTH):
            return [head, *block(value, indent=indent + 2)]
        case list() | tuple() if any(isinstance(v, Mapping) for v in value):
            return [head, *(line for item in value for line in _item(item, indent + 2))]
        case list() | tuple() if len(one_line) > WIDTH:
            return _wrapped(head, [flow(v) for v in value], indent + 2)
        case _:
            return [one_line]


def _item(value: object, indent: int) -> list[str]:
    one_line = f"{' ' * indent}- {flow(value)}"
    if not isinstance(value, Mapping) or not value or len(one_line) <= WIDTH:
        return [one_line]
    first, *rest = block(value, indent=indent + 2)
    return [f"{' ' * indent}- {first.lstrip(' ')}", *rest]


def _small(value: Mapping[str, Any]) -> bool:
    """Whether a mapping may stand on one line: two levels at the most, and no list of mappings."""
    for entry in value.values():
        parts = (
            entry.values() if isinstance(entry, Mapping) else entry if isinstance(entry, list | tuple) else ()
        )
        if any(isinstance(part, Mapping | list | tuple) for part in parts):
            return False
    return True


def _wrapped(head: str, parts: Sequence[str], indent: int) -> list[str]:
    lines = [f"{head} ["]
    current = " " * indent
    for i, part in enumerate(parts):
        piece = part if i == len(parts) - 1 else f"{part}, "
        if current.strip() and len(current) + len(piece.rstrip()) > WIDTH:
            lines.append(current.rstrip(" "))
            current = " " * indent
        current += piece
    return [*lines, current, f"{' ' * (indent - 2)}]"]


def _prose(head: str, text: str, indent: int) -> list[str]:
    """Fold one paragraph, keep several as they are, and quote what neither block style can hold exactly."""
    lines = text.split("\n")
    words = text.split(" ")
    if all(line.isprintable() for line in lines) and text:
        if len(lines) == 1 and all(words):
            return [f"{head} >-", *_filled(words, " " * indent)]
        if (
            len(lines) > 1
            and lines[0][:1] not in {"", " "}
            and lines[-1]
            and all(x.strip() or not x for x in lines)
        ):
            return [f"{head} |-", *(f"{' ' * indent}{line}" if line else "" for line in lines)]
    return [f"{head} {scalar(text)}"]


def _filled(words: Sequence[str], pad: str) -> list[str]:
    lines = [pad + words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(pad + word)
        else:
            lines[-1] += f" {word}"
    return lines
