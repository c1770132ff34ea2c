"""Data that people hand in, as the log, a card's text and a replay can hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from automode.errors import UsageError

MOST_LEVELS: Final = 64
"""Deepest nesting taken; a card has seven levels."""

_WIDEST: Final = 2**63


def plain(value: Any, what: str) -> Any:
    """Give a value in types that JSON knows; a tuple becomes a list.

    Args:
        value: What a person handed in.
        what: Its name, for the error.

    Raises:
        UsageError: It holds something else, is nested deeper than :data:`MOST_LEVELS`, or holds a whole number of more than 64
            bits or text that has no UTF-8 form.
    """
    return _plain(value, what, MOST_LEVELS)


def problems_of(error: ValidationError) -> str:
    """Say in one line what a model found wrong."""
    parts = []
    for one in error.errors(include_url=False, include_context=False):
        where = ".".join(str(part) for part in one["loc"])
        parts.append(f"{where}: {one['msg']}" if where else one["msg"])
    return "; ".join(parts)


def _plain(value: Any, where: str, levels: int) -> Any:
    match value:
        case None | bool():
            return value
        case str():
            return _text(value, where)
        case int():
            if not -_WIDEST <= value < _WIDEST:
                raise UsageError(f"{where} is a whole number of {value.bit_length()} bits; 64 are the most")
            return int(value)
        case float():
            return float(value)
        case Mapping() | list() | tuple() if not levels:
            raise UsageError(f"{where[:80]}... is nested deeper than {MOST_LEVELS} levels")
        case Mapping():
            found = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    raise UsageError(f"{where} has the key {key!r}, and keys must be text")
                found[_text(key, where)] = _plain(item, f"{where}.{key}", levels - 1)
            return found
        case list() | tuple():
            return [_plain(item, f"{where}[{i}]", levels - 1) for i, item in enumerate(value)]
    raise UsageError(
        f"{where} is of type {type(value).__name__}, which a session cannot hold; give None, bool, int, float, str, list or dict"
    )


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where!a} holds half of a surrogate pair: write the character itself") from None
    return str(value)
