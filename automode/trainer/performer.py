"""Carrying commands out: snapshots, selections, adoption. What touches models and data, and decides nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never
from zlib import crc32

import numpy as np

from automode.engine import State
from automode.engine.lifecycle import KEEP_BEST
from automode.engine.probing import may_restart
from automode.errors import NotExecutableError, SessionError
from automode.merges.moe_files import save as save_mixture
from automode.merges.trajectory import DEFAULT_EVERY
from automode.planner.cards import PlanCard
from automode.planner.events import (
    Adopt,
    Adopted,
    AskApproval,
    Clustered,
    Command,
    Diagnose,
    Evaluate,
    FitGate,
    Input,
    Merge,
    Merged,
    Resolve,
    Resolved,
    Rewind,
    RollBack,
    RolledBack,
    Scan,
    Scanned,
    SetClip,
    SetLearningRate,
    Snapshot,
    Snapshotted,
    StartTrial,
    StopRun,
    StopTrial,
    Validated,
)
from automode.session.rng_state import pack_rng
from automode.trainer.adapting import rehearse
from automode.trainer.best_state import BestState
from automode.trainer.card_data import CardData
from automode.trainer.combining import Combiner
from automode.trainer.diagnosing import Diagnoser
from automode.trainer.evaluation import PerSampleScores
from automode.trainer.evidence import Evidence
from automode.trainer.finishing import Finisher
from automode.trainer.optimizers import restore_rates
from automode.trainer.safeguarding import GoodStates
from automode.trainer.sample_keeper import SampleKeeper
from automode.trainer.sample_source import Ids
from automode.trainer.scanning import Scanner
from automode.trainer.selecting import Selector
from automode.trainer.specialists import SpecialistRunner
from automode.trainer.states import States
from automode.trainer.stored_states import Checkpoints
from automode.trainer.taking_over import curation_of, rate_factor, take_over
from automode.trainer.trunk import EVERY_SINCE_FORK, Trunk, begin_averages, trainable


def _by_tail(card: PlanCard) -> bool:
    return card.training_recipe is not None and card.training_recipe.judged == "tail"


def entropy_of(seed: int, card: PlanCard) -> tuple[int, ...]:
    """Seed material of a card: the same for the same card of another run with the same seed."""
    return (seed, card.step, crc32(card.reason.encode()))


@dataclass(slots=True, kw_only=True)
class Performer:
    """Everything that commands are carried out with.

    Attributes:
        trunk: The run.
        checkpoints: Durable states.
        seed: The session's seed.
        evidence: Held-out scores; None where there is no held-out data.
        states: Loads candidates.
        exports: Folder for accepted mixtures, one folder a card.
        runner: Trains specialists; None where forks are refused.
        selector: Turns selections into ids; None without sample ids.
        scanner: Reads the sample ledger and clusters; None without exact per-sample losses.
        samples: Leaves the sample ledger in the session; None where there is none.
        combiner: Fits gates and merges; None without held-out data.
        finisher: Chooses what the run ends with; None likewise.
        best: The best validated state of the trunk, for its end.
        good: Good states of the trunk, and what puts one back.
        diagnoser: Takes diagnostics.
        is_val_a: Marks which of the validation samples' scores belong to val-A.
    """

    trunk: Trunk
    checkpoints: Checkpoints
    seed: int
    states: States
    exports: Path
    good: GoodStates
    best: BestState
    diagnoser: Diagnoser
    evidence: Evidence | None = None
    runner: SpecialistRunner | None = None
    selector: Selector | None = None
    scanner: Scanner | None = None
    samples: SampleKeeper | None = None
    combiner: Combiner | None = None
    finisher: Finisher | None = None
    is_val_a: Callable[[Ids], np.ndarray[Any, np.dtype[np.bool_]]] | None = None

    def carry_out(self, body: Command, state: State, step: int) -> Sequence[Input]:  # noqa: C901 - one case a command
        """Carry out a command that touches models or data; returns its answers.

        Raises:
            NotExecutableError: This run lacks what the command needs.
        """
        match body:
            case Scan():
                return self.scan(body, step)
            case Snapshot():
                return [self.snapshot(body, state.cards[body.card].card, step)]
            case Resolve():
                return [self.resolve(state.cards[body.card].card, step)]
            case FitGate():
                return [self._combiner().fit_gate(state.cards[body.card].card, body)]
            case Merge():
                return [self.merge(state.cards[body.card].card, body, step)]
            case Evaluate():
                return [self._combiner().evaluate(state.cards[body.card].card, body)]
            case Adopt():
                return [self.adopt(state.cards[body.card].card, body, step)]
            case RollBack():
                return [self.roll_back(body, step)]
            case Rewind():
                rewound = self.good.rewind(body, step)
                self.best.replaced()
                return [rewound]
            case SetLearningRate():
                return [self.good.set_rate(body, step)]
            case SetClip():
                return [self.good.set_clip(body, step)]
            case Diagnose():
                return [self.diagnoser.diagnose(body, step)]
            case AskApproval() | StopRun() | StopTrial() | StartTrial():
                raise NotExecutableError(f"{body.kind} touches neither model nor data")
            case _:
                assert_never(body)

    def forget(self, card: str) -> None:
        """Drop the training data of a card that has ended."""
        if self.runner is not None:
            self.runner.cards.pop(card, None)

    def slow_down(self, state: State) -> None:
        """Read the averages as seldom as ever again, where no running card is judged by its tail."""
        running = (state.cards[card].card for card in state.executions)
        if self.trunk.averages is not None and not any(_by_tail(card) for card in running):
            self.trunk.averages.every = DEFAULT_EVERY

    def delete(self, checkpoints: set[str]) -> None:
        """Delete checkpoints that nothing can go on from."""
        self.checkpoints.delete(checkpoints)

    # What the loop brings.

    def validated(self, step: int, scores: PerSampleScores) -> Validated | None:
        """Keep val-A of the user's own validation for the signals; val-B is not looked at."""
        if self.evidence is None or self.is_val_a is None:
            return None
        mine = scores.where(self.is_val_a(scores.ids))
        if not mine.n:
            return None
        self.best.note(step, mine)
        return self.evidence.validated(step, mine)

    # What the safeguards need.

    def keep(self, state: State, step: int) -> None:
        """Keep the trunk as a good state, where one is due, and its first weights no longer than a card may ask for them."""
        self.good.keep(state, step)
        if self.trunk.first is not None and not may_restart(state):
            self.trunk.forget_first()

    def mend(self) -> int:
        """Undo what a batch that was left out did to running norm statistics; returns the layers mended."""
        return self.good.mend()

    # Snapshots.

    def snapshot(self, command: Snapshot, card: PlanCard, step: int) -> Snapshotted:
        """Make the trunk durable; a control is also scored on val-A, by what of the trials is judged.

        Where a trial restarts, the run's first weights are stored with what the trials begin from.
        """
        choice, value, passes = None, None, 0.0
        recipe = card.training_recipe
        assert recipe is not None
        more = self.trunk.first_state() if command.purpose == "base" and recipe.restarts else {}
        if command.purpose == "control":
            evidence = self._evidence()
            if self.trunk.averages is not None:
                self.trunk.averages.update(trainable(self.trunk.model), self.trunk.step, now=True)
            shell, states = self.states.shell(), self.trunk.candidates(recipe.judged)
            choice, value, passes = evidence.choose(shell, states, card.acceptance.metric)
        digest = self._save(command.purpose, step, **self._conditions(), **more)
        if command.purpose == "base" and recipe.judged == "tail":
            begin_averages(self.trunk.averages, every=EVERY_SINCE_FORK)
        return Snapshotted(
            card=command.card,
            purpose=command.purpose,
            checkpoint=digest,
            step=step,
            value=value,
            metric=card.acceptance.metric,
            choice=choice,
            passes=passes,
        )

    def _conditions(self) -> dict[str, Any]:
        """What a card goes by beside the trunk itself, so that it can be run again from there."""
        judge = None if self.evidence is None else self.evidence.settled()
        return {"clip_norm": self.trunk.clip_norm, "part_rows": self.trunk.part_rows, "judge": judge}

    def save_final(self, step: int) -> str:
        """Store what the run leaves behind, and free what was kept for it to go on."""
        if self.samples is not None:
            self.samples.at_end(step)
        digest = self._save("final", step)
        self.best.clear()
        self.good.restart()
        self.trunk.forget_first()
        return digest

    def _save(self, kind: str, step: int, **more: Any) -> str:
        weights, rest = self.trunk.state()
        rest |= {"rng": pack_rng(), **more}
        return self.checkpoints.save(weights, rest, {"kind": kind, "step": step})

    # Data.

    def resolve(self, card: PlanCard, step: int) -> Resolved:
        """Turn a card's selection into sample ids, and its search space into variants."""
        if self.selector is None or self.runner is None:
            raise NotExecutableError("this run has no sample ids, so no specialist can be trained")
        assert card.training_recipe is not None
        chosen = self.selector.select(card)
        for spec in dict.fromkeys(variant.adapter for variant in chosen.variants):
            if spec is not None:
                rehearse(self.states.shell(), spec)
        self.runner.cards[card.id] = CardData(
            recipe=card.training_recipe,
            selected=chosen.selected,
            others=chosen.others,
            entropy=entropy_of(self.seed, card),
            step=step,
            left_out=chosen.left_out,
            trunk_labels=self.trunk.relabelled,
            new_labels=chosen.new_labels,
            chosen=chosen.chosen,
            metric=card.acceptance.metric,
            parts=tuple(ids for _, ids in chosen.parts),
        )
        return Resolved(
            card=card.id,
            n=int(chosen.selected.size),
            pool=int(chosen.selected.size + chosen.others.size),
            artifact=chosen.artifact,
            excluded=chosen.excluded,
            relabelled=chosen.relabelled,
            new_labels=chosen.new_labels.size,
            variants=chosen.variants,
            parts=self.selector.stored(chosen.parts),
            passes=chosen.passes,
        )

    def scan(self, command: Scan, step: int) -> list[Scanned | Clustered]:
        """Read the sample ledger, and cluster the probe samples where asked."""
        if self.scanner is None:
            raise NotExecutableError("this run has no exact per-sample losses to scan")
        found = self.scanner.scan(command, step)
        if self.samples is not None:
            self.samples.at_scan(step)
        return found

    # Candidates.

    def merge(self, card: PlanCard, command: Merge, step: int) -> Merged:
        """Make one state of several, or choose among those that the trunk went through."""
        if command.control is not None:
            return self._combiner().merge(card, command, step)
        finisher, stops = self.finisher, command.method == KEEP_BEST
        if finisher is None:
            raise NotExecutableError("this run has no held-out data to judge by")
        if self.trunk.averages is not None:
            self.trunk.averages.update(trainable(self.trunk.model), self.trunk.step, now=True)
        elif not stops:
            raise NotExecutableError(
                "the trunk keeps no averages, so there is nothing to merge along its trajectory"
            )
        digest, candidates = self._save("control", step, **self._conditions()), self.trunk.candidates()
        if stops:
            return finisher.keep_best(card, command, digest, candidates, step)
        best = self.best.store(self.checkpoints, before=step) if command.at_end else None
        return finisher.merge_trunk(card, digest, candidates, step, best, self.best.step)

    def _combiner(self) -> Combiner:
        if self.combiner is None:
            raise NotExecutableError("this run has no held-out data to judge by")
        return self.combiner

    def _evidence(self) -> Evidence:
        if self.evidence is None:
            raise NotExecutableError("this run has no held-out data to judge by")
        return self.evidence

    # Adoption.

    def adopt(self, card: PlanCard, command: Adopt, step: int) -> Adopted:
        """Put accepted weights into the trunk, with the optimizer state of the trial that made them; keep what was there.

        What the trunk takes over beside that: :func:`automode.trainer.taking_over.take_over`.
        """
        if command.into == "export":
            self._export(card, command)
            return Adopted(
                card=card.id, checkpoint=command.weights.checkpoint, before=None, step=step, into="export"
            )
        variant = command.variant
        factor = 1.0 if variant is None else rate_factor(variant)
        if _by_tail(card) and self.trunk.averages is not None:
            self.trunk.averages.every = DEFAULT_EVERY  # also of the trunk that a rollback puts back
        kept = {"clip_norm": self.trunk.clip_norm, "part_rows": self.trunk.part_rows}
        before = self._save("before", step, **kept, rate_factor=factor, best_step=self.best.step)
        try:
            state, rest = self.states.load(command.weights)
            self.states.put(self.trunk.model, state, averaged=command.weights.choice != "raw")
            if variant is not None:
                take_over(
                    self.trunk, variant, rest, factor, 0 if self.runner is None else self.runner.batch_size
                )
            if variant is None or _by_tail(card):
                begin_averages(self.trunk.averages)
            data = None if self.runner is None else self.runner.cards.get(card.id)
            self.trunk.curate(*curation_of(card, variant, data))
            after = self._save("adopted", step)
            self.good.restart()
            self.best.replaced()
        except BaseException:
            self._put_back(before, as_it_was=True)
            with contextlib.suppress(
                SessionError
            ):  # whatever went wrong is told; what is left over is only disk space
                self.delete({before})
            raise
        return Adopted(
            card=card.id,
            checkpoint=after,
            before=before,
            step=step,
            into="trunk",
            left_out=int(self.trunk.excluded.size),
            relabelled=self.trunk.relabelled.size,
        )

    def _export(self, card: PlanCard, command: Adopt) -> None:
        """Write an accepted mixture as files of its own, to be read by ``automode.merges.moe_files.load`` without this run."""
        mixture = self._combiner().mixture(command.weights.checkpoint)
        self.exports.mkdir(exist_ok=True)
        save_mixture(mixture, self.exports / card.id)

    def roll_back(self, command: RollBack, step: int) -> RolledBack:
        """Put the trunk back to what it was before an adoption; the schedule's clock goes on, at the rates of before."""
        rest = self._put_back(command.checkpoint, as_it_was=False)
        self.good.restart()
        self.best.rolled_back(rest.get("best_step"))
        return RolledBack(card=command.card, checkpoint=command.checkpoint, step=step)

    def _put_back(self, before: str, *, as_it_was: bool) -> dict[str, Any]:
        """Load the trunk of before an adoption; ``as_it_was`` with its clock, else at the rates that are due by now. Returns the rest."""
        trunk = self.trunk
        weights, rest, _ = self.checkpoints.load(before)
        now = [group["lr"] for group in trunk.optimizer.param_groups]
        trunk.load(weights, rest, schedule=as_it_was)
        trunk.clip_norm, trunk.part_rows = rest["clip_norm"], rest.get("part_rows")
        if trunk.scheduler is None or as_it_was:
            return rest
        restore_rates(trunk.scheduler, rest["scheduler"])
        for group, rate in zip(trunk.optimizer.param_groups, now, strict=True):
            group["lr"] = rate / rest["rate_factor"]
        return rest
