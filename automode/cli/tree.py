"""The family tree of weights as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from automode.planner.yaml_text import shown
from automode.session import LineageRow


def tree(nodes: Sequence[LineageRow], verdicts: Mapping[str, str]) -> list[str]:
    """Draw nodes under their first parent, one a line; further parents are named.

    Args:
        nodes: In order of birth. Nodes that hang in a ring, as only a damaged log has them, are left out.
        verdicts: What the evidence said, by node.
    """
    known = {node.node for node in nodes}
    children: dict[str | None, list[LineageRow]] = {}
    for node in nodes:
        children.setdefault(next((p for p in node.parents if p in known), None), []).append(node)
    lines: list[str] = []
    # A stack in place of recursion: a long run may adopt more generations than Python nests calls.
    waiting = [(root, "", "") for root in reversed(children.get(None, []))]
    while waiting:
        node, head, stem = waiting.pop()
        about = "; ".join(_about(node, known, verdicts))
        lines.append(f"{head}{shown(node.node)}  ({shown(about, limit=160)})")
        kids = children.get(node.node, [])
        for kid in reversed(kids):
            last = kid is kids[-1]
            waiting.append(
                (kid, f"{stem}{'`-- ' if last else '|-- '}", f"{stem}{'    ' if last else '|   '}")
            )
    return lines


def _about(node: LineageRow, known: set[str], verdicts: Mapping[str, str]) -> Iterator[str]:
    yield f"{node.kind} at step {node.step}"
    if node.card:
        yield f"card {node.card}"
    if also := [p for p in node.parents if p in known][1:]:
        yield f"with {', '.join(also)}"
    if node.node in verdicts:
        yield verdicts[node.node]
    if node.checkpoint:
        yield node.checkpoint[:15]
