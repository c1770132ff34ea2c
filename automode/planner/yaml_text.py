"""YAML as people mean it: a small, safe reader that knows where everything stands.

YAML 1.2's scalars (``1e-3`` is a number, ``yes`` and ``012`` are text), and no surprises: a key given twice, an alias, a tag, a
second document, an odd depth or size is refused, with its line. Only the event stream of PyYAML's safe
loader is used; nothing is ever constructed by a tag.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import yaml

MAX_CHARS: Final = 1_000_000
MAX_DEPTH: Final = 32
MAX_NODES: Final = 20_000
MAX_DIGITS: Final = 1_000

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")
_WORDS: Final[dict[str, bool | float | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Problem:
    """One thing that is wrong with a text.

    Attributes:
        line: Line number, from 1; 0 when it concerns no place.
        column: Column number, from 1.
        path: Dotted path of the value, list positions in brackets; empty for the whole text.
        text: What came, what was expected, what to do.
    """

    line: int
    column: int
    path: str
    text: str

    def __str__(self) -> str:
        where = f"line {self.line}, column {self.column}: " if self.line else ""
        return f"{where}{self.path + ': ' if self.path else ''}{self.text}"


@dataclass(slots=True, kw_only=True)
class Node:
    """A value with its place. Mappings keep their keys' nodes, lists their items' nodes in ``items``."""

    kind: Literal["scalar", "list", "map"]
    line: int
    column: int
    text: str = ""
    plain: bool = False
    items: list[Node] = field(default_factory=list)
    keys: list[Node] = field(default_factory=list)

    def child(self, key: str) -> tuple[Node, Node] | None:
        """Return the key's node and the value's node of a mapping, or None."""
        for name, value in zip(self.keys, self.items, strict=True):
            if name.text == key:
                return name, value
        return None

    def data(self) -> Any:
        """Return the value as plain data: dict, list, str, float, int, bool or None."""
        match self.kind:
            case "map":
                return {k.text: v.data() for k, v in zip(self.keys, self.items, strict=True)}
            case "list":
                return [item.data() for item in self.items]
            case "scalar":
                return resolve(self.text) if self.plain else self.text


def resolve(text: str) -> str | float | int | bool | None:
    """Return what a plain scalar means in YAML 1.2; numbers too long or too large to hold stay text."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        return number if math.isfinite(number) else text
    return text


def read(text: str) -> tuple[Node | None, list[Problem]]:
    """Read one YAML document.

    Args:
        text: The text; at most a million characters, 20 000 values and 32 levels.

    Returns:
        The root, None when there is nothing to read or the text is broken, and every problem found, in the text's order.
    """
    if len(text) > MAX_CHARS:
        size = f"{len(text):,} characters; at most {MAX_CHARS:,} are read"
        return None, [Problem(line=0, column=0, path="", text=size)]
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
    except _TooMuchError as error:
        builder.problems.append(error.problem)
    except yaml.MarkedYAMLError as error:
        builder.problems.append(_syntax(error))
    except yaml.reader.ReaderError as error:
        builder.problems.append(_unreadable(text, error))
    except (ValueError, OverflowError):
        # PyYAML turns "\U00110000" into chr() without a look at the range.
        escape = "holds an escape such as \\U00110000 that is no character"
        builder.problems.append(Problem(line=builder.line, column=1, path="", text=escape))
    return (None if builder.problems else builder.root), sorted(builder.problems)


class _TooMuchError(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _Builder:
    """Builds nodes from events, without recursion, and notes what is not wanted."""

    def __init__(self) -> None:
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self.line = 1
        self._open: list[Node] = []
        self._pending: list[Node | None] = []
        self._count = 0
        self._documents = 0

    def take(self, event: Any) -> None:
        mark = event.start_mark
        line, column = mark.line + 1, mark.column + 1
        self.line = line
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents == 2:
                    raise _TooMuchError(
                        self._problem(line, column, "a second document starts here: give one only")
                    )
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self._close()
            case yaml.AliasEvent():
                self._note(
                    line, column, f"the alias *{shown(str(event.anchor))} is not taken: write the value out"
                )
                self._add(Node(kind="scalar", line=line, column=column, plain=True))
            case yaml.ScalarEvent() | yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self._value(event, line, column)

    def _value(self, event: Any, line: int, column: int) -> None:
        if event.anchor is not None:
            self._note(
                line,
                column,
                f"the anchor &{shown(event.anchor)} is not taken: write values out where they stand",
            )
        if event.tag is not None:
            self._note(line, column, f"the tag {shown(event.tag)} is not taken: only plain values are")
        match event:
            case yaml.ScalarEvent():
                # JSON writes an emoji as two escapes; YAML includes JSON, and PyYAML leaves the halves apart.
                text = _PAIR.sub(_joined, event.value)
                if _HALF.search(text):
                    self._note(line, column, "holds half of a surrogate pair: write the character itself")
                self._add(Node(kind="scalar", line=line, column=column, text=text, plain=event.style is None))
            case yaml.SequenceStartEvent():
                self._start(Node(kind="list", line=line, column=column))
            case _:
                self._start(Node(kind="map", line=line, column=column))

    def _start(self, node: Node) -> None:
        self._add(node)
        self._open.append(node)
        self._pending.append(None)
        if len(self._open) > MAX_DEPTH:
            raise _TooMuchError(
                Problem(line=node.line, column=node.column, path="", text=f"deeper than {MAX_DEPTH} levels")
            )

    def _close(self) -> None:
        node = self._open[-1]
        seen: dict[str, Node] = {}
        for key in node.keys:
            if key.kind != "scalar":
                self._note(key.line, key.column, "a key must be a word, and this is a list or a mapping")
            elif key.text in seen:
                first = seen[key.text].line
                self._note(
                    key.line,
                    key.column,
                    f"`{shown(key.text)}` is given twice (first on line {first}): keep one",
                )
            else:
                seen[key.text] = key
        self._open.pop()
        self._pending.pop()

    def _add(self, node: Node) -> None:
        self._count += 1
        if self._count > MAX_NODES:
            raise _TooMuchError(self._problem(node.line, node.column, f"more than {MAX_NODES:,} values"))
        if not self._open:
            if self.root is None:
                self.root = node
            return
        parent = self._open[-1]
        if parent.kind == "list":
            parent.items.append(node)
        elif (key := self._pending[-1]) is None:
            self._pending[-1] = node
        else:
            parent.keys.append(key)
            parent.items.append(node)
            self._pending[-1] = None

    def _path(self) -> list[str | int]:
        """Keys and positions that lead to the value being read."""
        path: list[str | int] = []
        last = len(self._open) - 1
        for depth, (node, key) in enumerate(zip(self._open, self._pending, strict=True)):
            if node.kind == "list":
                # The value being read is not in the list yet; a list further out holds the one that leads to it.
                path.append(len(node.items) - (depth < last))
            elif depth < last and key is None:
                path.append(node.keys[-1].text)
            elif depth == last and key is not None:
                path.append(key.text)
        return path

    def _problem(self, line: int, column: int, text: str) -> Problem:
        return Problem(line=line, column=column, path=dotted(self._path()), text=text)

    def _note(self, line: int, column: int, text: str) -> None:
        self.problems.append(self._problem(line, column, text))


def _joined(pair: re.Match[str]) -> str:
    return pair.group().encode("utf-16", "surrogatepass").decode("utf-16")


def dotted(steps: Iterable[str | int]) -> str:
    """Join keys and positions to ``recipe.variants[1].lr_mul``."""
    path = ""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{shown(step)}" if path else shown(step)
    return path


def shown(text: str, limit: int = 60) -> str:
    """Return text as a message may show it: on one line, printable, at most ``limit`` characters."""
    safe = "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


def _syntax(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
    parts = [part for part in (error.context, error.problem) if part]
    return Problem(line=line, column=column, path="", text=f"no valid YAML: {', '.join(parts)}")


def _unreadable(text: str, error: yaml.reader.ReaderError) -> Problem:
    before = text[: error.position]
    line = before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    code = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
    return Problem(
        line=line, column=column, path="", text=f"the character U+{code:04X} may not stand in YAML text"
    )
