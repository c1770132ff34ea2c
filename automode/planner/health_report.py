"""What health checks of a run have found, for people and programs; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from automode.planner.controls import HealthChecked, Verdict
from automode.planner.displays import Panel, Row
from automode.planner.recipes import Part

_ORDER: Final[tuple[Verdict, ...]] = ("good", "unknown", "doubtful", "bad")
_SHOWN: Final = 3


class HealthReport(Part):
    """Findings of one or several checks at one step."""

    findings: tuple[HealthChecked, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of them: ``good``, ``unknown`` (one could not be made), ``doubtful`` or ``bad``."""
        return max((finding.verdict for finding in self.findings), key=_ORDER.index, default="unknown")

    def __getitem__(self, check: str) -> HealthChecked:
        """Give the finding of one check, by its name."""
        return next(finding for finding in self.findings if finding.check == check)

    def __str__(self) -> str:
        return self._panel().text()

    def __rich__(self) -> Any:
        return self._panel().rich()

    def _repr_html_(self) -> str:
        return self._panel().html()

    def _panel(self) -> Panel:
        step = self.findings[0].step if self.findings else 0
        return Panel(title=f"health at step {step}: {self.verdict}", rows=list(rows_of(self.findings)))


def rows_of(findings: Iterable[HealthChecked]) -> Iterable[Row]:
    """Give a line for each finding, and one for each of its worst layers."""
    for finding in findings:
        yield f"{finding.check}: {finding.verdict}", finding.why
        for layer in finding.worst[:_SHOWN]:
            values = ", ".join(f"{name} {_number(value)}" for name, value in layer.items() if name != "layer")
            yield "", f"{layer['layer']}: {values}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
