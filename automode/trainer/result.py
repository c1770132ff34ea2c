"""What ``fit`` gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from automode.planner.displays import Panel
from automode.planner.events import Mode
from automode.session import CardRow, Session
from automode.session.session_view import card_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """A finished run.

    Attributes:
        model: The user's model, trained; in act mode with the accepted weights.
        session: The run's session, open for reading.
        history: Lists of one entry an epoch: ``epoch``, ``step``, ``train_loss``, ``val_loss``, ``val_metric`` (NaN
            without validation), ``learning_rate`` (first parameter group, at the epoch's end), ``slices`` (metric by name), and
            each of the user's metrics as ``train_NAME`` and ``val_NAME``.
        test: Metrics on the test set with ``do_test_after``, else None.
        reason: Why the run ended: ``max_epochs``, ``max_steps``, ``budget`` (automode had spent the rest), or in words.
        mode: The mode that the run ended in.
        steps: Steps trained.
        compute: Sample passes by account: ``trunk``, ``automode`` in all, and its parts. One is a forward pass of one
            sample; training a sample is three.
    """

    model: nn.Module
    session: Session
    history: dict[str, list[Any]]
    test: Mapping[str, float] | None
    reason: str
    mode: Mode
    steps: int
    compute: Mapping[str, int]

    @property
    def path(self) -> Path:
        """The session's folder."""
        return self.session.path

    @property
    def cards(self) -> list[CardRow]:
        """The latest row of every plan card, in the order in which the cards appeared."""
        return self.session.cards()

    def frame(self, name: str, stream: str = "trunk") -> NDArray[np.float64]:
        """Values of one column of the session; see :meth:`automode.session.Session.frame`."""
        return self.session.frame(name, stream)

    def __repr__(self) -> str:
        losses = self.history["train_loss"]
        last = f", last training loss {losses[-1]:.4g}" if losses else ""
        return f"FitResult({self.steps} steps, {self.reason}{last}, session {str(self.path)!r})"

    def __rich__(self) -> Any:
        return self._panel().rich()

    def _repr_html_(self) -> str:
        return self._panel().html()

    def _panel(self) -> Panel:
        rows = [("model", type(self.model).__name__), ("mode", self.mode)]
        for name, label in (
            ("train_loss", "training loss"),
            ("val_loss", "held-out loss"),
            ("val_metric", "held-out metric"),
        ):
            known = [float(value) for value in self.history[name] if isfinite(value)]
            if known:
                rows.append((label, f"{known[-1]:.4g}, from {known[0]:.4g}"))
        if self.test is not None:
            rows.append(("test", ", ".join(f"{name} {value:.4g}" for name, value in self.test.items())))
        rows.append(
            ("compute", ", ".join(f"{name.strip()} {amount:,}" for name, amount in self.compute.items()))
        )
        rows.append(("session", str(self.path)))
        if not self.session.closed:
            rows += card_rows(self.session)
        return Panel(title=f"{self.steps:,} steps, ended by {self.reason}", rows=rows)
