"""A tail of samples keeps a high loss after those that are probably mislabelled are taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from automode.planner.cards import Reason
from automode.planner.events import Scanned
from automode.planner.recipes import MergeInterpolate, SelectQuantile, TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable

NOT_MINED = "Hard samples that are probably label noise are not mined."
REPLAY = 0.5
"""Half of each batch comes from outside the tail: a specialist on the tail alone forgets the rest."""

VARIANTS = (
    Variant(name="plain"),
    Variant(name="gentle", lr_mul=0.5),
    Variant(name="weighted", loss_weight=2.0),
    Variant(name="flat", lr_mul=0.5, optimizer="sam"),
)


@dataclass(frozen=True, slots=True)
class HighLossTail:
    """Propose to train more on the tail of the loss, suspects left out.

    The raw tail of a run with wrong labels is mostly wrong labels, and mining it is ruinous; so without a noise
    estimate, or with a high one, the rule stays silent. Thresholds are ``policy.scan``: min_visits, tail_from, tail_ratio,
    max_noise.
    """

    id: Reason = "high_loss_tail"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose specialists for the tail when its clean part stands far enough above the mean."""
        scan = view.policy.scan
        if not view.scanned:
            why = view.run.why_no_ids if not view.run.has_ids else None
            return Silence(code="no_scan", why=f"no scan yet: {why or 'the first one is still to come'}")
        last = view.scanned[-1]
        quiet = _unready(last, view)
        if quiet is not None:
            return quiet
        overall = mean_of_quantiles(last.quantiles["ema_loss"])
        assert last.tail_mean is not None
        ratio = last.tail_mean / overall if overall > 0.0 else 0.0
        if ratio < scan.tail_ratio:
            return Silence(
                code="light_tail",
                why=(
                    f"the tail from quantile {scan.tail_from:g} loses {last.tail_mean:.4g}, {ratio:.4g} times the mean of "
                    f"{overall:.3g} (a card at {scan.tail_ratio:g})"
                ),
            )
        return if_executable(
            Proposal(
                reason=self.id,
                action="fork",
                because=(
                    f"The tail from quantile {scan.tail_from:g} ({last.tail_n} samples without {last.suspects} suspects) loses "
                    f"{last.tail_mean:.3g}, {ratio:.1f} times the mean of {overall:.3g}; estimated label noise {last.noise:.0%}. "
                    f"{NOT_MINED}"
                ),
                selection=SelectQuantile.model_validate({"from": scan.tail_from, "to": 1.0}),
                training_recipe=TrainingRecipe(
                    replay=REPLAY, variants=VARIANTS[: view.policy.pacing.variants]
                ),
                merge_recipe=MergeInterpolate(),
                risk="medium",
                diagnostics={
                    "tail_mean": last.tail_mean,
                    "tail_n": last.tail_n,
                    "mean": overall,
                    "ratio": ratio,
                    "suspects": last.suspects,
                    "noise": last.noise,
                    "visits": last.visits,
                    "scan_step": last.step,
                },
            ),
            view,
        )


def mean_of_quantiles(quantiles: Sequence[float]) -> float:
    """Mean of a distribution given by equally spaced quantiles, by the trapezoid rule."""
    inner = sum(quantiles) - 0.5 * (quantiles[0] + quantiles[-1])
    return inner / (len(quantiles) - 1)


def _unready(last: Scanned, view: View) -> Silence | None:
    scan = view.policy.scan
    age = view.step - last.step
    if age > view.planning_budget:
        return Silence(
            code="old_scan",
            why=f"the last scan is {age} steps old, and after {view.planning_budget} it counts no more",
        )
    if last.visits < scan.min_visits:
        return Silence(
            code="few_visits",
            why=f"{last.visits:.1f} visits a sample so far, and {scan.min_visits:g} are needed to believe the ledger",
        )
    if last.noise is None:
        return Silence(code="noise_unknown", why=f"the label noise cannot be told. {NOT_MINED}")
    if last.noise > scan.max_noise:
        return Silence(
            code="noise_high",
            why=f"the estimated label noise is {last.noise:.1%} (at most {scan.max_noise:.0%}). {NOT_MINED}",
        )
    if last.tail_mean is None or last.tail_n == 0 or len(last.quantiles.get("ema_loss", ())) < 2:
        return Silence(code="no_tail", why="the scan found no tail beside the suspects")
    return None
