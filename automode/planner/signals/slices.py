"""Slices of the data that stay worse than the rest, validation after validation.

One validation in which a slice lags proves little, and as the same samples are measured every time, later ones are not
independent of it. So the confidence of one validation, corrected for the number of slices, is asked for again at each of several in
a row; they are never pooled into a smaller p-value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf, isfinite, nan
from statistics import NormalDist

from automode.errors import UsageError
from automode.planner.signals.mann_kendall import MannKendall
from automode.planner.signals.wire import SignalState, from_wire, to_wire

GAPS_KEPT = 12


class SliceStatus(StrEnum):
    """How a slice fares against the rest."""

    UNKNOWN = "UNKNOWN"
    EVEN = "EVEN"
    LAGGING = "LAGGING"


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceMeasure:
    """One slice at one validation.

    Attributes:
        mean: Mean utility of the slice; higher is better.
        rest: Mean utility of all other samples, the same unit.
        se: Standard error of `mean` - `rest`.
        n: Samples in the slice.
    """

    mean: float
    rest: float
    se: float
    n: int

    @property
    def z(self) -> float:
        """(mean - rest) / se: negative when the slice is worse; NaN where it cannot be judged."""
        gap = self.mean - self.rest
        if not (isfinite(gap) and self.se >= 0.0) or self.n < 2:
            return nan
        if self.se == 0.0:
            return 0.0 if gap == 0.0 else (inf if gap > 0.0 else -inf)
        return gap / self.se


class SliceTrack:
    """The history of one slice.

    Attributes:
        status: The state after the last validation.
        last: The last measure.
        run: Validations in a row at which the slice was significantly worse.
        seen: Validations that could be judged.
    """

    __slots__ = ("gaps", "last", "run", "seen", "status")

    def __init__(self) -> None:
        self.status = SliceStatus.UNKNOWN
        self.last = SliceMeasure(mean=nan, rest=nan, se=nan, n=0)
        self.run = 0
        self.seen = 0
        self.gaps = MannKendall(window=GAPS_KEPT)

    @property
    def gap_z(self) -> float:
        """Mann-Kendall's z of mean - rest over the last validations: positive when the slice is catching up."""
        return self.gaps.z


class SliceWatch:
    """Track every slice by name, from one validation to the next.

    LAGGING when z <= -`threshold` at `persistence` validations in a row, with `threshold` the normal quantile of
    alpha / slices (Bonferroni), and mean - rest <= -`min_gap`.

    Args:
        alpha: Chance that one validation calls any slice worse although none is.
        persistence: Validations in a row.
        min_gap: Smallest difference that matters, in units of utility.
        min_samples: Smaller slices are not judged.

    Attributes:
        tracks: By name of the slice.
        threshold: What -z was compared with at the last validation.
    """

    __slots__ = ("alpha", "min_gap", "min_samples", "persistence", "threshold", "tracks")

    def __init__(
        self, *, alpha: float = 0.05, persistence: int = 3, min_gap: float = 0.0, min_samples: int = 20
    ) -> None:
        if not 0.0 < alpha < 0.5:
            raise UsageError(f"the value of `alpha` is {alpha}, but it must lie strictly between 0 and 0.5")
        if persistence < 1 or min_samples < 2:
            raise UsageError(
                f"persistence is {persistence} and min_samples {min_samples}, but at least 1 and 2 are needed"
            )
        if not (isfinite(min_gap) and min_gap >= 0.0):
            raise UsageError(f"the value of `min_gap` is {min_gap}, but it must be finite and not negative")
        self.alpha = alpha
        self.persistence = persistence
        self.min_gap = min_gap
        self.min_samples = min_samples
        self.reset()

    def reset(self) -> None:
        """Forget every slice."""
        self.tracks: dict[str, SliceTrack] = {}
        self.threshold = inf

    @property
    def lagging(self) -> tuple[str, ...]:
        """Names of the slices that lag, the worst first (by their last mean - rest)."""
        found = [
            (t.last.mean - t.last.rest, name)
            for name, t in self.tracks.items()
            if t.status is SliceStatus.LAGGING
        ]
        return tuple(name for _, name in sorted(found))

    def update(self, measures: Mapping[str, SliceMeasure]) -> list[str]:
        """Take one validation; a slice that it does not name, or that cannot be judged, keeps its state.

        Returns:
            Names of the slices whose status changed, in order.
        """
        judged = {name: m for name, m in measures.items() if m.n >= self.min_samples and m.z == m.z}
        if not judged:
            return []
        self.threshold = -NormalDist().inv_cdf(self.alpha / len(judged))
        changed = []
        for name in sorted(judged):
            measure = judged[name]
            track = self.tracks.setdefault(name, SliceTrack())
            gap = measure.mean - measure.rest
            worse = measure.z <= -self.threshold and gap <= -self.min_gap
            track.last = measure
            track.seen += 1
            track.run = track.run + 1 if worse else 0
            track.gaps.update(gap)
            before = track.status
            if track.run >= self.persistence:
                track.status = SliceStatus.LAGGING
            elif track.seen >= self.persistence:
                track.status = SliceStatus.EVEN
            if track.status is not before:
                changed.append(name)
        return changed

    def state(self) -> SignalState:
        """Return everything that `from_state` needs to go on from here."""
        return {
            "alpha": self.alpha,
            "persistence": self.persistence,
            "min_gap": self.min_gap,
            "min_samples": self.min_samples,
            "threshold": to_wire(self.threshold),
            "tracks": {
                name: {
                    "status": str(track.status),
                    "mean": to_wire(track.last.mean),
                    "rest": to_wire(track.last.rest),
                    "se": to_wire(track.last.se),
                    "n": track.last.n,
                    "run": track.run,
                    "seen": track.seen,
                    "gaps": track.gaps.state(),
                }
                for name, track in self.tracks.items()
            },
        }

    @classmethod
    def from_state(cls, state: SignalState) -> SliceWatch:
        """Rebuild the signal from what `state` returned."""
        names = ("alpha", "persistence", "min_gap", "min_samples")
        signal = cls(**{name: state[name] for name in names})
        signal.threshold = from_wire(state["threshold"])
        for name, kept in state["tracks"].items():
            track = SliceTrack()
            track.status = SliceStatus(kept["status"])
            track.last = SliceMeasure(
                mean=from_wire(kept["mean"]),
                rest=from_wire(kept["rest"]),
                se=from_wire(kept["se"]),
                n=kept["n"],
            )
            track.run = kept["run"]
            track.seen = kept["seen"]
            track.gaps = MannKendall.from_state(kept["gaps"])
            signal.tracks[name] = track
        return signal
