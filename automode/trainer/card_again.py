"""One card run a second time from its stored snapshot, and each result compared with the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from torch import Tensor

from automode.backends.base import SegmentJob
from automode.engine.lifecycle import KEEP_BEST
from automode.errors import SessionError, UsageError
from automode.planner.events import Resolved, Snapshotted, StartTrial, Weights
from automode.session.artifacts import ArtifactStore
from automode.session.checkpoints import CheckpointStore
from automode.trainer.card_data import CardData
from automode.trainer.execution_report import Compared, Execution
from automode.trainer.finishing import Finisher
from automode.trainer.new_labels import NewLabels
from automode.trainer.performer import Performer, entropy_of
from automode.trainer.recorded_card import RecordedCard
from automode.trainer.relabelling import unpacked
from automode.trainer.sample_source import Ids
from automode.trainer.trunk import judged_of

TOLERANCE: Final = 1e-3
"""Least tolerance where bits cannot be promised; one held-out sample judged otherwise is tolerated too."""


class Beside:
    """Checkpoints of the session to read, and a place of our own to write to."""

    def __init__(self, own: CheckpointStore, session: CheckpointStore) -> None:
        self._own, self._session = own, session
        self._saved: set[str] = set()

    def save(
        self, weights: Mapping[str, Tensor], rest: Mapping[str, Any], manifest: Mapping[str, Any]
    ) -> str:
        """Store a state outside of the session."""
        digest = self._own.save(weights, rest, manifest)
        self._saved.add(digest)
        return digest

    def load(self, digest: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Load one of ours, else one of the session's."""
        return (self._own if digest in self._saved else self._session).load(digest)

    def delete(self, digests: Iterable[str]) -> list[str]:
        """Delete ours; the session's stay."""
        return self._own.delete([digest for digest in digests if digest in self._saved])


class CardAgain:
    """One card on its second way, results beside the first ones as they come.

    Args:
        recorded: The first way.
        performer: Made of the script's model and data.
        checkpoints: The session's, and a place of our own.
        artifacts: The session's.

    Attributes:
        done: What came of it.
    """

    def __init__(
        self, recorded: RecordedCard, performer: Performer, checkpoints: Beside, artifacts: ArtifactStore
    ) -> None:
        self.done = Execution(card=recorded.card.id)
        self._recorded = recorded
        self._performer = performer
        self._checkpoints = checkpoints
        self._artifacts = artifacts
        self._ours: dict[str, str] = {}

    def run(self) -> None:
        """Run everything that the record has, in order."""
        recorded = self._recorded
        if recorded.failed:
            self.done.left_out.append(f"{recorded.failed} segments that had failed")
        if recorded.base is not None and recorded.resolved is not None:
            self._begin(recorded.base, *recorded.resolved)
            for asked, report in recorded.segments:
                self._segment(asked, report)
        if recorded.control is not None:
            self._control(recorded.control)
        self._combined()
        if recorded.look is not None:
            command, seen = recorded.look
            ours = {"weights": self._mapped(command.weights), "control": self._mapped(command.control)}
            now = self._combiner.evaluate(recorded.card, command.model_copy(update=ours))
            size = 1.0 / max(1, recorded.started.run.val_b)
            for name in ("mean", "variance"):
                self._compare(f"val-B, {name}", getattr(seen.overall, name), getattr(now.overall, name), size)
            self._compare("val-B, samples", seen.overall.n, now.overall.n)
            for slice_, group in seen.slices.items():
                mean = now.slices[slice_].mean if slice_ in now.slices else None
                self._compare(f"val-B, slice {slice_}", group.mean, mean, size)

    def _begin(self, base: Snapshotted, resolved: Resolved, step: int) -> None:
        """Put the data in place, and judge as the run did."""
        card, performer = self._recorded.card, self._performer
        _, rest, _ = self._load(base.checkpoint, "its trials began from")
        assert card.training_recipe is not None
        if performer.runner is None:
            raise UsageError(
                "this script gives no sample ids or no held-out data, so no specialist can be trained"
            )
        performer.trunk.clip_norm, performer.trunk.part_rows = rest.get("clip_norm"), rest.get("part_rows")
        if "excluded" in rest:
            labels = (
                NewLabels.unpacked(rest["relabelled"].numpy()) if "relabelled" in rest else NewLabels.none()
            )
            performer.trunk.curate(rest["excluded"].numpy(), labels)
        self._judge_as(rest)
        selected, others, excluded = self._data(resolved)
        labels, chosen = NewLabels.none(), np.empty(0, dtype=np.int64)
        if resolved.relabelled is not None:
            labels, chosen = unpacked(self._artifacts.get_array(resolved.relabelled))
        performer.runner.cards[card.id] = CardData(
            recipe=card.training_recipe,
            selected=selected,
            others=others,
            entropy=entropy_of(performer.seed, card),
            step=step,
            left_out=excluded,
            trunk_labels=performer.trunk.relabelled,
            new_labels=labels,
            chosen=chosen,
            metric=card.acceptance.metric,
            parts=tuple(self._artifacts.get_ids(part.artifact) for part in resolved.parts),
        )

    def _judge_as(self, rest: Mapping[str, Any]) -> None:
        if rest.get("judge") is not None and self._performer.evidence is not None:
            self._performer.evidence.settle_as(rest["judge"])

    def _data(self, resolved: Resolved) -> tuple[Ids, Ids, Ids]:
        """The samples that the trials were for, the rest, and what was left out, as they were chosen then."""
        card, selector = self._recorded.card, self._performer.selector
        assert selector is not None
        assert card.training_recipe is not None
        allowed = np.setdiff1d(selector.train_ids, selector.gone())
        excluded: Ids = np.empty(0, dtype=np.int64)
        if resolved.excluded is not None:
            excluded = self._artifacts.get_ids(resolved.excluded)
        elif card.training_recipe.exclude is not None:
            excluded = np.intersect1d(selector.train_ids, selector.ids_of(card.training_recipe.exclude))
        allowed = np.setdiff1d(allowed, excluded)
        chosen = (
            self._artifacts.get_ids(resolved.artifact)
            if resolved.artifact is not None
            else selector.ids_of(card.selection)
        )
        selected = np.intersect1d(chosen, allowed)
        found = (int(selected.size), int(allowed.size))
        if found != (resolved.n, resolved.pool):
            raise UsageError(
                f"the card trained on {resolved.n} of {resolved.pool} samples, and this script's data give {found[0]} of {found[1]}: "
                "a card is run again on its own data only"
            )
        return selected, np.setdiff1d(allowed, selected), np.setdiff1d(excluded, selector.gone())

    def _segment(self, asked: StartTrial, report: Any) -> None:
        job = SegmentJob(
            card=asked.card,
            trial=asked.trial,
            attempt=asked.rung_attempt,
            variant=asked.variant,
            base=asked.base,
            checkpoint=self._ours.get(asked.checkpoint, asked.checkpoint),
            from_resource=asked.from_resource,
            to_resource=asked.to_resource,
            top_resource=asked.top_resource,
            per_trunk_step=asked.per_trunk_step,
        )
        assert self._performer.runner is not None
        segment = self._performer.runner.open(job)
        while not segment.advance(float(job.to_resource - job.from_resource + 1)):
            pass
        done = segment.finish()
        name = f"trial {job.trial} ({job.variant.name}) at {job.to_resource}"
        size = 1.0 / max(1, self._recorded.started.run.val_a)
        self._compare(name, report.value, done.value, size)
        if report.checkpoint is not None:
            self._ours[report.checkpoint] = done.checkpoint
        if not self.done.doubts:
            self._compare(f"{name}, weights chosen", report.choice, done.choice)
            self._compare(f"{name}, sample passes", report.passes, done.passes)
            self._compare(f"{name}, checkpoint", report.checkpoint, done.checkpoint)

    def _control(self, control: Snapshotted) -> None:
        """Judge the control again; it was the trunk itself, which is not trained again."""
        weights, rest, _ = self._load(control.checkpoint, "it was judged against")
        evidence = self._performer.evidence
        assert evidence is not None
        recipe = self._recorded.card.training_recipe
        assert recipe is not None
        candidates = judged_of(self._candidates(weights, rest), recipe.judged)
        choice, value, _ = evidence.choose(
            self._performer.states.shell(), candidates, self._recorded.card.acceptance.metric
        )
        self._compare("control", control.value, value, 1.0 / max(1, self._recorded.started.run.val_a))
        if not self.done.doubts:
            self._compare("control, weights chosen", control.choice, choice)

    def _candidates(self, raw: dict[str, Tensor], rest: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        averages = self._performer.trunk.averages
        if averages is None or "averages" not in rest:
            return {"raw": raw}
        averages.load_state_dict(rest["averages"])
        return {"raw": raw} | (averages.candidates(raw) if averages.updates > 0 else {})

    def _combined(self) -> None:
        recorded = self._recorded
        size = 1.0 / max(1, recorded.started.run.val_a)
        if recorded.gate is not None:
            asked, seen = recorded.gate
            experts = tuple(self._mapped(w) for w in asked.experts)
            now = self._combiner.fit_gate(
                recorded.card,
                asked.model_copy(update={"control": self._mapped(asked.control), "experts": experts}),
            )
            self._compare("router", seen.value, now.value, size)
            self._compare("router, loads", seen.loads, now.loads, 0.05)
            if seen.checkpoint is not None and now.checkpoint is not None:
                self._ours[seen.checkpoint] = now.checkpoint
        if recorded.merge is None:
            return
        command, merged = recorded.merge
        if command.control is not None:
            members = tuple(self._mapped(w) for w in command.members)
            ours = {"control": self._mapped(command.control), "members": members}
            if command.gate is not None:
                ours["gate"] = self._ours.get(command.gate, command.gate)
            mapped = command.model_copy(update=ours)
            again = self._combiner.merge(recorded.card, mapped, merged.step)
        else:
            assert merged.control is not None
            own = merged.control.checkpoint
            weights, rest, _ = self._load(own, "it merged")
            self._judge_as(rest)
            candidates = self._candidates(weights, rest)
            if command.method == KEEP_BEST:
                again = self._finisher.keep_best(recorded.card, command, own, candidates, merged.step)
            else:
                again = self._finisher.merge_trunk(
                    recorded.card, own, candidates, merged.step, merged.best, merged.best_step
                )
            self._compare("raw weights", merged.control_value, again.control_value, size)
        self._compare(f"merge by {merged.method}", merged.value, again.value, size)
        if not self.done.doubts:
            self._compare(
                f"merge by {merged.method}, weights chosen", merged.weights.choice, again.weights.choice
            )
        self._ours[merged.weights.checkpoint] = again.weights.checkpoint

    @property
    def _combiner(self) -> Any:
        if self._performer.combiner is None:
            raise UsageError("this script gives no held-out data to judge by")
        return self._performer.combiner

    @property
    def _finisher(self) -> Finisher:
        if self._performer.finisher is None:
            raise UsageError("this script gives no held-out data to judge by")
        return self._performer.finisher

    def _mapped(self, weights: Weights) -> Weights:
        ours = self._ours.get(weights.checkpoint)
        return weights if ours is None else weights.model_copy(update={"checkpoint": ours})

    def _load(self, digest: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        try:
            weights, rest, manifest = self._checkpoints.load(digest)
        except SessionError as error:
            raise SessionError(
                f"card {self._recorded.card.id} cannot be run again: the checkpoint that {what} ({digest[:19]}) cannot be loaded "
                f"({error}); checkpoints of finished cards may be deleted to save space, and what is gone cannot be begun from"
            ) from error
        try:
            self._performer.states.shell().load_state_dict(weights)
        except RuntimeError as error:
            raise UsageError(
                f"model: the stored weights do not fit this script's model ({' '.join(str(error).split())[:300]})"
            ) from error
        return weights, rest, manifest

    def _compare(self, what: str, recorded: Any, again: Any, one_sample: float = 0.0) -> None:
        tolerance = (
            max(TOLERANCE, one_sample) if self.done.doubts and isinstance(recorded, float | tuple) else 0.0
        )
        self.done.rows.append(Compared(what=what, recorded=recorded, again=again, tolerance=tolerance))
