"""One kind of sample stays hard: a cluster of the features whose loss stands above the rest, scan after scan."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, inf, isfinite

from automode.planner.capability import ROUTED
from automode.planner.cards import Reason
from automode.planner.events import Clustered
from automode.planner.recipes import GateRecipe, MergeInterpolate, SelectKMeans, TrainingRecipe, Variant
from automode.planner.rules.base import Proposal, Silence, View
from automode.planner.rules.execution import if_executable

VARIANTS = (
    Variant(name="plain"),
    Variant(name="gentle", lr_mul=0.5),
    Variant(name="flat", lr_mul=0.5, optimizer="sam"),
    Variant(name="averaged", ema=0.99),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cluster:
    """One cluster against the clean others together."""

    number: int
    size: int
    loss: float
    rest: float
    ratio: float
    z: float
    noise: float | None
    holds: str


@dataclass(frozen=True, slots=True)
class ResidualCluster:
    """Propose specialists for a cluster that is stable, clearly worse than the rest, and not mostly label noise.

    Thresholds are ``policy.scan``: stable_scans, stable_ari, cluster_ratio, cluster_z, max_noise. Losses leave suspects out.
    """

    id: Reason = "residual_cluster"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose to specialise on the worst cluster that qualifies, with a router over the specialists."""
        scan = view.policy.scan
        unready = _unready(view)
        if unready is not None:
            return unready
        last = view.clustered[-1]
        clusters = _clusters(last, scan.max_noise)
        if not clusters:
            return Silence(
                code="no_rest", why=f"none of the {last.k} clusters has a clean rest to be compared with"
            )
        worse = [c for c in clusters if c.ratio >= scan.cluster_ratio and c.z >= scan.cluster_z]
        if not worse:
            top = max(clusters, key=lambda c: c.z)
            return Silence(
                code="no_gap",
                why=(
                    f"the worst of {last.k} clusters loses {top.loss:.3g} where the rest lose {top.rest:.3g}: ratio {top.ratio:.4g} "
                    f"(a card at {scan.cluster_ratio:g}), {top.z:.3g} standard errors (a card at {scan.cluster_z:g})"
                ),
            )
        clean = [c for c in worse if c.noise is not None and c.noise < scan.max_noise]
        if not clean:
            return _noisy(worse[0], scan.max_noise)
        return if_executable(self._proposal(view, last, max(clean, key=lambda c: c.z)), view)

    def _proposal(self, view: View, last: Clustered, found: _Cluster) -> Proposal:
        scans = len(view.clustered)
        routed = view.run.task in ROUTED
        ari = "" if last.ari is None else f"; stable over {scans} scans (ARI {last.ari:.2f})"
        holds = f", {found.holds}" if found.holds else ""
        return Proposal(
            reason=self.id,
            action="fork",
            because=(
                f"Cluster {found.number} of {last.k} ({found.size} probe samples{holds}) loses {found.loss:.3g} where the rest lose "
                f"{found.rest:.3g}, {found.z:.1f} standard errors apart{ari}; estimated label noise {found.noise or 0.0:.0%}."
            ),
            selection=SelectKMeans(
                feature=last.feature,
                k=last.k,
                clusters=(found.number,),
                window=max(16, sum(last.sizes)),
                artifact=last.artifact,
            ),
            training_recipe=TrainingRecipe(replay=0.1, variants=VARIANTS[: view.policy.pacing.variants]),
            gate_recipe=GateRecipe() if routed else None,
            merge_recipe=MergeInterpolate(),
            diagnostics={
                "cluster": found.number,
                "cluster_losses": last.losses,
                "cluster_sizes": last.sizes,
                "ratio": found.ratio,
                "z": found.z,
                "scans": scans,
                "ari": last.ari,
                "noise": found.noise,
            },
        )


def _unready(view: View) -> Silence | None:
    scan = view.policy.scan
    if not view.clustered:
        why = view.run.why_no_ids if not view.run.has_ids else None
        return Silence(code="no_scan", why=f"no clusters yet: {why or 'the first scan is still to come'}")
    last = view.clustered[-1]
    age = view.step - last.step
    if age > view.planning_budget:
        return Silence(
            code="old_scan",
            why=f"the last clusters are {age} steps old, and after {view.planning_budget} they count no more",
        )
    if len(view.clustered) < scan.stable_scans:
        return Silence(
            code="few_scans",
            why=f"{len(view.clustered)} scans so far, and {scan.stable_scans} that agree are needed",
        )
    # Each scan's ARI speaks of its agreement with the one before it.
    agreements = [c.ari for c in view.clustered[len(view.clustered) - scan.stable_scans + 1 :]]
    if any(ari is None or ari < scan.stable_ari for ari in agreements):
        said = ", ".join("none" if a is None else f"{a:.2f}" for a in agreements)
        return Silence(
            code="unstable",
            why=f"the clusters changed between scans: ARI {said} (at least {scan.stable_ari:g})",
        )
    if not all(isfinite(v) for v in (*last.losses, *last.errors)):
        return Silence(code="not_finite", why="a cluster's loss is not finite")
    if last.artifact is None:
        return Silence(
            code="no_artifact", why="the scan kept no centroids, so its clusters cannot be found again"
        )
    return None


def _clusters(last: Clustered, max_noise: float) -> list[_Cluster]:
    """Set each cluster against all others that are not mostly noise themselves."""
    noisy = {i for i, share in enumerate(last.noise) if share >= max_noise}
    found = []
    for number, (size, loss, error) in enumerate(zip(last.sizes, last.losses, last.errors, strict=True)):
        others = [i for i in range(last.k) if i != number and i not in noisy]
        n = sum(last.sizes[i] for i in others)
        if n == 0 or size == 0:
            continue
        rest = sum(last.sizes[i] * last.losses[i] for i in others) / n
        rest_error = hypot(*(last.sizes[i] * last.errors[i] for i in others)) / n
        apart = hypot(error, rest_error)
        gap = loss - rest
        found.append(
            _Cluster(
                number=number,
                size=size,
                loss=loss,
                rest=rest,
                # A ratio speaks of positive losses only; without one no cluster counts as worse.
                ratio=loss / rest if rest > 0.0 else 0.0,
                z=gap / apart if apart > 0.0 else (inf if gap > 0.0 else 0.0),
                noise=last.noise[number] if last.noise else None,
                holds=last.tops[number] if last.tops else "",
            )
        )
    return found


def _noisy(worst: _Cluster, most: float) -> Silence:
    if worst.noise is None:
        return Silence(
            code="noise_unknown",
            why=f"cluster {worst.number} stands out, but whether its labels are right cannot be told",
        )
    return Silence(
        code="noisy",
        why=(
            f"cluster {worst.number} stands out, but {worst.noise:.0%} of it are probably label noise (below {most:.0%} "
            "needed): hard samples that are probably label noise are not mined"
        ),
    )
