"""How cards, policies, verdicts and sessions show themselves: plain text, HTML for notebooks, and rich where that is installed.

One panel of labelled lines serves all of them. Whatever it holds may have been typed by somebody, or come with a data set:
HTML is escaped, control characters are shown as escapes, and rich never reads a text as markup.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from automode.planner.metrics import NAMES, other_of
from automode.planner.yaml_text import shown
from automode.planner.yaml_writer import flow

if TYPE_CHECKING:
    from rich.console import RenderableType

    from automode.planner.facts import VerdictGiven
    from automode.planner.policy import Policy

Row = tuple[str, str]

_LIMIT = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """What is shown: a title, a sentence, labelled lines, and a longer text on demand.

    Attributes:
        title: In a few words.
        rows: Label and text, most important first.
        lead: A sentence under the title, or empty.
        more: A longer text with its label, shown on demand in a notebook and not in a terminal; or None.
    """

    title: str
    rows: Sequence[Row]
    lead: str = ""
    more: Row | None = None

    def text(self) -> str:
        """Return plain lines."""
        rows = [(_safe(label), _safe(text)) for label, text in self.rows]
        wide = max((len(label) for label, _ in rows), default=0)
        lines = [_safe(self.title), *([f"  {_safe(self.lead)}"] if self.lead else [])]
        return "\n".join([*lines, *(f"  {label:<{wide}}  {text}" for label, text in rows)])

    def html(self) -> str:
        """Return self-contained HTML: no script, no outside reference, everything escaped."""
        cell = "padding:2px 12px 2px 0;text-align:left;vertical-align:top"
        rows = "".join(
            f'<tr><th style="{cell};opacity:.7;font-weight:normal">{html.escape(_safe(label))}</th>'
            f'<td style="{cell}">{html.escape(_safe(text))}</td></tr>'
            for label, text in self.rows
        )
        lead = f'<p style="margin:6px 0">{html.escape(_safe(self.lead))}</p>' if self.lead else ""
        more = ""
        if self.more is not None:
            label, text = self.more
            more = (
                f'<details><summary>{html.escape(_safe(label))}</summary><pre style="white-space:pre-wrap">{html.escape(_lines(text))}</pre>'
                "</details>"
            )
        return (
            '<div style="border:1px solid currentColor;border-radius:6px;padding:8px 12px;max-width:60em;font-family:sans-serif">'
            f"<div><strong>{html.escape(_safe(self.title))}</strong></div>{lead}"
            f'<table style="border-collapse:collapse">{rows}</table>{more}</div>'
        )

    def rich(self) -> RenderableType:
        """Return a panel for rich, which only rich itself asks for."""
        from rich.console import Group
        from rich.panel import Panel as Box
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for label, text in self.rows:
            table.add_row(Text(_safe(label)), Text(_safe(text)))  # a Text is never read as markup
        parts = [Text(_safe(self.lead))] if self.lead else []
        return Box(
            Group(*parts, table),
            title=Text(_safe(self.title), style="bold"),
            title_align="left",
            expand=False,
        )


def _safe(text: str) -> str:
    return shown(text, limit=_LIMIT)


def _lines(text: str) -> str:
    return "\n".join(shown(line, limit=10 * len(line) + 1) for line in text.split("\n"))


def policy_panel(policy: Policy, text: str) -> Panel:
    """Show a policy by how it differs from the default.

    Args:
        policy: The policy.
        text: It as YAML, in full.
    """
    changed = [
        (name, f"{flow(before)} -> {flow(after)}")
        for name, before, after in differences(type(policy)(), policy)
    ]
    rows = [("digest", policy.digest[:19]), *(changed or [("differs", "in nothing from the default policy")])]
    return Panel(title=f"policy {policy.name}", rows=rows, more=("YAML", text))


def differences(a: Policy, b: Policy) -> list[tuple[str, Any, Any]]:
    """Return what differs between two policies: dotted name, value of the first, value of the second."""
    before, after = dict(_leaves(a.dump(), "")), dict(_leaves(b.dump(), ""))
    return [(name, before[name], after[name]) for name in before if before[name] != after[name]]


def _leaves(value: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _leaves(entry, f"{path}{key}.")
        else:
            yield f"{path}{key}", entry


def verdict_panel(verdict: VerdictGiven) -> Panel:
    """Show a verdict with the evidence that it rests on."""
    rows = []
    if verdict.candidate is not None:
        rows.append(("candidate", verdict.candidate))
    if verdict.n:
        bounds = f"from {verdict.lower:+.5f} to {verdict.upper:+.5f}"
        rows.append(("difference", f"{verdict.mean:+.5f} ({bounds}) on {verdict.n} held-out samples"))
        rows.append(("z", f"{verdict.z:.2f}, needed {verdict.threshold:.2f} (alpha {verdict.alpha:.3g})"))
    if verdict.metric == "log_score":
        rows.append(("compared", "log score, p(y) not below 0.001"))
    elif verdict.metric != "utility":
        rows.append(("compared", NAMES[verdict.metric]))
    if verdict.guard is not None:
        rows.append((other_of(verdict.metric), f"z {verdict.guard:.2f}"))
    rows += [(f"slice {name}", f"z {z:.2f}") for name, z in verdict.slices.items()]
    return Panel(title=f"card {verdict.card}: {verdict.verdict}", lead=verdict.why, rows=rows)
