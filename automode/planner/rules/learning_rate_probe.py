"""Is the learning rate about right? Asked early, when a wrong one is cheap to find."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, isnan

from automode.planner.capability import refusals
from automode.planner.cards import Reason
from automode.planner.metrics import Metric
from automode.planner.recipes import TrainingRecipe, Variant
from automode.planner.rule_policies import ProbePolicy
from automode.planner.rules.base import Probed, Proposal, Silence, View
from automode.planner.rules.execution import if_executable
from automode.planner.signals.trend import TrendState

FASTER = (Variant(name="x10", lr_mul=10.0),)
"""One trial, so that a sound script pays for one: what is worth finding is a rate that is wrong by an order of magnitude."""

SLOWER = tuple(
    Variant(name=f"restart x1/{factor}", lr_mul=1.0 / factor, restart=True) for factor in (10, 3, 30)
)
"""From the first weights, because a rate that is far too high ruins a network within few steps. It also keeps the comparison honest:
over a few steps a lower rate nearly always looks better on trained weights, because it quiets the loss, and then costs the whole run (Wu
et al. 2018, arXiv:1803.02021); one that starts anew has to catch up with everything that the trunk has learnt."""

EITHER = (*FASTER, *SLOWER)
"""Where the loss falls and has not come down: the rate may be far too low, or so high that a ruined network finds back a little."""

UPDATES, LEAST_ROWS = 4, 32
"""Steps on each batch that are tried in a run whose steps are few, and rows of the parts at the least. Sixteen win less often: a rate that was right
for smaller batches is soon too high, and over few batches the second moments that Adam brings along are those of large ones."""

LEVEL_Z, NOISE_Z, LOST = -1.0, -5.0, 0.2
"""Above the first, in standard errors, a trial is level with the trunk. A higher rate may be as far below as the second, and lose the third of what the
run has learnt so far, by its noise alone: one that is far too high loses most of it."""

LONGER = 2
"""Least length of a longer trial, in lengths of the first."""

FALLS = 0.05
"""Share of its loss that a run whose rate is about right loses while its steps double."""

STANDS, LEARNT = 0.95, 0.75
"""A loss above the first multiple of the run's first one has not come down, one below the second has. Between them are sound runs on
noisy targets (wrong labels, text) and networks that are half ruined, so that there as few trials have to do as can be."""


@dataclass(frozen=True, slots=True)
class LearningRateProbe:
    """Propose a short run at ten times the rate, and from the first weights at lower ones where the loss has not come down.

    The trunk itself is the arm with factor 1. All are judged by the tail average of their steps since the fork: raw weights at a high rate
    are noise, which a paired comparison of a few steps takes for a difference. A trial takes ``policy.probe.share`` of the run's compute at
    the most, and several that start anew ``restart_share`` together, since little is lost by a trunk that does not learn. A run too short for either, with
    large batches, is asked instead whether several steps on each batch are better (``steps_share``). Classes are judged by a log score: so early, how sure
    the answers are tells two rates apart sooner than how many are right. The probe comes between the shares
    ``policy.probe.from`` and ``until`` of the run, as soon as the trend can be told, and once. What it could not tell from the
    trunk is tried once more, and longer (``longer_share``): a rate that is far too low may look as good as the right one
    while the loss stands on a plateau, and a rate that is far too high is seen at once.
    """

    id: Reason = "learning_rate_probe"

    def propose(self, view: View) -> Proposal | Silence:
        """Propose the sweep in its window, or say why not now."""
        probe = view.policy.probe
        total = view.step + view.remaining
        first, last = ceil(probe.from_ * total), int(probe.until * total)
        if made := view.counts.get(self.id, 0):
            return _longer(view, total, made)
        if view.step < first:
            return Silence(
                code="too_early", why=f"step {view.step} of {total}: the probe comes from step {first}"
            )
        if view.step > last:
            return Silence(
                code="too_late", why=f"step {view.step} of {total}: the probe comes until step {last}"
            )
        trend = view.signals.trend
        if isnan(trend.best_advise):
            return Silence(code="no_trend", why=f"{trend.describe()} Whether the loss falls cannot be told.")
        falls = trend.status is TrendState.IMPROVING
        height = _height(view)
        if height < LEARNT and not falls:
            return Silence(
                code="not_falling",
                why=f"the loss has come down and does not fall for certain now, which says little about the rate. {trend.describe()}",
            )
        if falls and (view.signals.burst.active or view.signals.shift.active):
            return Silence(code="unstable", why="the run is unstable, which is another rule's business")
        variants = _factors(falls=falls, height=height)[: view.policy.pacing.variants]
        full, *cheaper = (
            _sweep(view, total, variants[:n], falls=falls, height=height) for n in range(len(variants), 0, -1)
        )
        # Between the bounds the loss is as ambiguous as can be, and one trial alone would be the wrong one half of the time.
        if LEARNT <= height < STANDS:
            cheaper = []
        if falls and (more := _more_steps(view, total)):
            cheaper.append(_sweep(view, total, more, falls=falls, height=height))
        return if_executable(replace(full, cheaper=tuple(cheaper)), view)


def _longer(view: View, total: int, made: int) -> Proposal | Silence:
    """Propose what the first probe could not tell from the trunk once more, for longer."""
    probed, probe = view.probed, view.policy.probe
    if made > 1 or probed is None or probe.longer_share == 0.0:
        return Silence(code="done", why="the rate was probed already, and once a run is enough")
    last = int(probe.longer_until * total)
    if view.step > last:
        why = f"step {view.step} of {total}: the longer trial comes until step {last}"
        return Silence(code="too_late", why=why)
    if view.step < 2 * probed.step:
        why = f"step {view.step}: whether the loss falls by itself can be told from step {2 * probed.step}"
        return Silence(code="too_early", why=why)
    if view.signals.burst.active or view.signals.shift.active:
        return Silence(code="unstable", why="the run is unstable, which is another rule's business")
    variant, height = probed.variant, _height(view)
    if variant.restart and height < LEARNT:
        why = f"the loss has come down to {height:.0%} of its beginning, so that nothing has to start anew"
        return Silence(code="come_down", why=why)
    if variant.updates > 1 or not (probed.z > LEVEL_Z or _noise_alone(probed)):
        return Silence(code="told_apart", why=f"the first probe told them apart (z {probed.z:+.1f})")
    fallen = 1.0 - view.signals.loss_z.median / probed.loss if probed.loss > 0.0 else 1.0
    if not fallen < FALLS:
        why = f"the loss has fallen by {fallen:.1%} since the first probe, so that the rate is hardly far too low or far too high"
        return Silence(code="falls", why=why)
    return if_executable(
        Proposal(
            reason="learning_rate_probe",
            action="fork",
            because=(
                f"Step {view.step} of {total} ({view.step / total:.0%}): a short trial at the rate times {_tried((variant,))} was about level with the trunk "
                f"(z {probed.z:+.1f}). A far better rate may take longer to show, and a far worse one shows at once. "
                "1 longer run is compared with the trunk."
            ),
            training_recipe=TrainingRecipe(variants=(variant,), judged="tail", retry=False),
            metric=_metric_of(view),
            share=probe.longer_share,
            least_steps=LONGER * probed.steps,
            diagnostics={"step": view.step, "total": total, "factors": (variant.lr_mul,)},
        ),
        view,
    )


def _noise_alone(probed: Probed) -> bool:
    return not probed.variant.restart and probed.z > NOISE_Z and probed.lost <= LOST


def _metric_of(view: View) -> Metric:
    return "log_score" if view.run.task == "classification" else "utility"


def _tried(variants: tuple[Variant, ...]) -> str:
    return ", ".join(f"{v.lr_mul:.3g}{' from the first weights' if v.restart else ''}" for v in variants)


def _height(view: View) -> float:
    """The loss as a multiple of the run's first one; 0 where that is not known."""
    now, first = view.signals.loss_z.median, view.first_loss
    return 0.0 if first is None or isnan(now) or first <= 0.0 else now / first


def _factors(*, falls: bool, height: float) -> tuple[Variant, ...]:
    """What to try, the likeliest first: where the compute does not allow for all, there are fewer."""
    if height < LEARNT:
        return FASTER
    if height >= STANDS:
        return EITHER if falls else SLOWER
    return EITHER[:2] if falls else SLOWER[:1]


def _share(probe: ProbePolicy, variants: tuple[Variant, ...], height: float) -> float:
    if variants[0].updates > 1:
        return probe.steps_share
    return probe.restart_share if height >= STANDS else len(variants) * probe.share


def _more_steps(view: View, total: int) -> tuple[Variant, ...]:
    """Several steps on each batch, where it is large enough and the run too short for a trial of its rate, with what little its evaluations take."""
    trial = 1.25 * view.policy.pacing.min_rung
    if trial <= view.policy.probe.share * total or view.run.batch < UPDATES * LEAST_ROWS:
        return ()
    variant = Variant(name=f"{UPDATES} steps a batch", updates=UPDATES)
    alone = Proposal(
        reason="learning_rate_probe",
        action="fork",
        because="",
        training_recipe=TrainingRecipe(variants=(variant,), judged="tail", retry=False),
    )
    return () if refusals(alone, view.run, min_held_out=view.policy.evidence.min_samples) else (variant,)


def _sweep(view: View, total: int, variants: tuple[Variant, ...], *, falls: bool, height: float) -> Proposal:
    divided = variants[0].updates > 1
    with_what = f"with {UPDATES} steps on each batch" if divided else f"at its rate times: {_tried(variants)}"
    runs = "1 short run is" if len(variants) == 1 else f"{len(variants)} short runs are"
    seen = "The loss falls" if falls else "The loss does not fall for certain"
    if height >= LEARNT:
        seen = f"{seen} and stands at {height:.0%} of its beginning, {view.first_loss:.3g}"
    seen = f"{seen}." if falls else f"{seen}. {view.signals.trend.describe()}"
    probe = view.policy.probe
    return Proposal(
        reason="learning_rate_probe",
        action="fork",
        because=(
            f"Step {view.step} of {total} ({view.step / total:.0%}): a badly chosen {'batch size' if divided else 'learning rate'} is cheap to find now. "
            f"{seen} {runs} compared with the trunk, {with_what}."
        ),
        training_recipe=TrainingRecipe(variants=variants, judged="tail", retry=False),
        metric=_metric_of(view),
        share=_share(probe, variants, height),
        diagnostics={"step": view.step, "total": total, "factors": tuple(v.lr_mul for v in variants)},
    )
