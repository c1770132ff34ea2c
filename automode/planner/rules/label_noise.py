"""Some labels are wrong: train on without them, or with better ones; or abstain and leave the list to a person."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from automode.planner.capability import relabel_refusals
from automode.planner.cards import Reason
from automode.planner.events import Scanned
from automode.planner.recipes import RelabelPredicted, SelectIndices, TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable

VARIANTS = (
    Variant(name="constant", schedule="constant"),
    Variant(name="relabelled", schedule="constant", labels="relabel"),
    Variant(name="gentle", lr_mul=0.5),
    Variant(name="averaged", schedule="constant", ema=0.99),
)
"""The suspects left out, the suspects with new labels, and two more ways of leaving them out."""


@dataclass(frozen=True, slots=True)
class LabelNoise:
    """Propose to leave the suspects out or to give them new labels, where noise estimate and suspects agree.

    The scan's artifact lists the suspects; what their new labels are is found out when the card begins. Where their number does not
    fit the estimate the two detectors disagree, and then nobody can tell hard from wrong: the rule abstains, and the list is there
    for a person to review. Where the compute that is left does not allow for every variant, there are fewer. Thresholds are
    ``policy.noise`` and ``policy.scan.min_visits``.
    """

    id: Reason = "label_noise"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose pruned and relabelled training, or say why not."""
        if not view.scanned:
            why = view.run.why_no_ids if not view.run.has_ids else None
            return Silence(code="no_scan", why=f"no scan yet: {why or 'the first one is still to come'}")
        last = view.scanned[-1]
        quiet = _unready(last, view)
        if quiet is not None:
            return quiet
        able = [v for v in VARIANTS if v.labels == "keep" or not relabel_refusals(view.run)]
        variants = tuple(able[: view.policy.pacing.variants])
        full, *cheaper = (self._leaving_out(last, variants[:n], view) for n in range(len(variants), 0, -1))
        # Once suspects are left out, the ones that are found later are worth a full card or none.
        return if_executable(full if last.left_out else replace(full, cheaper=tuple(cheaper)), view)

    def _leaving_out(self, last: Scanned, variants: tuple[Variant, ...], view: View) -> Proposal:
        assert last.noise is not None
        assert last.artifact is not None
        relabel = any(v.labels == "relabel" for v in variants)
        how = "left out of the trials" + (", or given new labels" if relabel else "")
        return Proposal(
            reason=self.id,
            action="fork",
            because=(
                f"Estimated label noise {last.noise:.1%} (a card at {view.policy.noise.min_noise:.0%}); {last.suspects} of "
                f"{last.n} samples ({last.suspects / last.n:.1%}) are suspects and are {how}."
            ),
            training_recipe=TrainingRecipe(
                replay=0.0,
                variants=variants,
                exclude=SelectIndices(artifact=last.artifact),
                relabel=RelabelPredicted(confidence=view.policy.noise.confidence) if relabel else None,
            ),
            risk="medium",
            diagnostics={
                "noise": last.noise,
                "suspects": last.suspects,
                "n": last.n,
                "visits": last.visits,
                "scan_step": last.step,
            },
        )


def _too_old(last: Scanned, view: View) -> Silence | None:
    age = view.step - last.step
    why = None
    if age > view.planning_budget:
        why = f"the last scan is {age} steps old, and after {view.planning_budget} it counts no more"
    elif view.adopted.get("label_noise") and not last.left_out:
        why = f"the last scan, of step {last.step}, is older than the card that left suspects out: another is needed to find more"
    return None if why is None else Silence(code="old_scan", why=why)


def _unready(last: Scanned, view: View) -> Silence | None:
    policy = view.policy.noise
    old = _too_old(last, view)
    if old is not None:
        return old
    total = view.step + view.remaining
    first = ceil(policy.from_ * total)
    if last.step < first:
        return Silence(
            code="too_early",
            why=(
                f"the last scan is of step {last.step}, and margins are believed from step {first} of {total} on "
                f"({policy.from_:.0%})"
            ),
        )
    visits = view.policy.scan.min_visits
    if last.visits < visits:
        return Silence(
            code="few_visits",
            why=f"{last.visits:.1f} visits a sample so far, and {visits:g} are needed to believe the ledger",
        )
    if last.noise is None:
        told = f": {last.why}" if last.why else ""
        listed = f" ({last.suspects} suspects are left for a person to review)" if last.suspects else ""
        return Silence(code="noise_unknown", why=f"the label noise cannot be told{told}{listed}")
    if last.noise < policy.min_noise:
        return Silence(
            code="little_noise",
            why=f"the estimated label noise is {last.noise:.1%} (a card at {policy.min_noise:.0%})",
        )
    fresh = last.suspects - last.left_out
    if last.left_out and fresh < policy.min_noise * last.n:
        return Silence(
            code="left_out",
            why=(
                f"{last.left_out} of {last.suspects} suspects are left out of training or relabelled already (a card when "
                f"{policy.min_noise:.0%} of the samples are new suspects)"
            ),
        )
    found = last.suspects / (last.noise * last.n) if last.n else 0.0
    if not policy.least_found <= found <= policy.most_found:
        return Silence(
            code="abstain",
            why=(
                f"the estimate is {last.noise:.1%} of {last.n} samples, but {last.suspects} are suspects, {found:.2f} times as many "
                f"({policy.least_found:g} to {policy.most_found:g} needed): the detectors disagree, so the suspects are left for "
                "a person to review"
            ),
        )
    if last.artifact is None:
        return Silence(
            code="no_artifact", why="the scan kept no list of suspects, so they cannot be left out"
        )
    return None
