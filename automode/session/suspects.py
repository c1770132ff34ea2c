"""Samples that are probably mislabelled, as a scan of the run has listed them for a person to review."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from automode.errors import UsageError
from automode.planner.events import Scanned
from automode.session.artifacts import ArtifactStore

if TYPE_CHECKING:
    from automode.session.session import Session

COLUMNS: Final[Mapping[str, str]] = {
    "sample_id": "position in the dataset under every Subset",
    "margin": "mean of the label's score minus the best other score, over training (AUM); low is suspect",
    "mean_loss": "mean training loss",
    "visits": "times that it was trained on",
    "given_label": "class that the data say",
    "neighbour_agreement": "share of its ten nearest other samples that have the given label",
    "suggested_label": "class that the network says",
    "suggested_agreement": "share of the ten nearest that have the suggested label",
}
"""Columns of the list, in order; whole numbers are those of ids, visits and labels."""

_WHOLE: Final = ("sample_id", "visits", "given_label", "suggested_label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspects:
    """What one scan says of wrong labels.

    Attributes:
        step: The trunk's step at the scan.
        n: Samples that it looked at.
        noise: Estimated share of wrong labels; None: nobody can tell.
        why: The estimate, or the reason for there being none, in words.
        rule: What the rule ``label_noise`` last said by then, in words; empty where it has said nothing.
        columns: The list, most suspect first: columns by name (:data:`COLUMNS`), None where a value is not known.
    """

    step: int
    n: int
    noise: float | None
    why: str
    rule: str
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.columns["sample_id"])


def read_suspects(session: Session, step: int | None = None) -> Suspects:
    """Read the list of a scan.

    Args:
        session: The session.
        step: The trunk's step at the scan; None: the last scan.

    Raises:
        UsageError: There was no scan, or none at this step.
        SessionError: The list cannot be read.
    """
    scans = [Scanned.model_validate(record.body) for record in session.events(kind="scanned")]
    if not scans:
        raise UsageError(
            f"session {session.path.name} holds no scan, so nothing is known of wrong labels; what keeps a run from being scanned: "
            "automode log SESSION --kind rule_evaluated"
        )
    chosen = next((s for s in reversed(scans) if step is None or s.step == step), None)
    if chosen is None:
        known = ", ".join(str(s.step) for s in scans)
        raise UsageError(f"there was no scan at step {step}; there were scans at {known}")
    rows = np.empty((0, len(COLUMNS)))
    if chosen.review is not None:
        rows = np.asarray(
            ArtifactStore(session.path / "artifacts").get_array(chosen.review), dtype=np.float64
        )
    said = [
        r.body
        for r in session.events(kind="rule_evaluated")
        if r.body["rule"] == "label_noise" and r.body["step"] <= chosen.step
    ]
    return Suspects(
        step=chosen.step,
        n=chosen.n,
        noise=chosen.noise,
        why=chosen.why,
        rule=f"{said[-1]['outcome']} ({said[-1]['code']}): {said[-1]['why']}" if said else "",
        columns={name: _column(name, rows[:, i]) for i, name in enumerate(COLUMNS)},
    )


def _column(name: str, values: NDArray[np.float64]) -> list[Any]:
    whole = name in _WHOLE
    return [None if not isfinite(v) else int(v) if whole else float(v) for v in values.tolist()]
