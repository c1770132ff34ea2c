"""Specialists: one segment of one trial, trained from a snapshot of the trunk on copies of everything.

Nothing of the trunk's is touched: model, optimizer and scheduler are copied together, batches are drawn by a plan of
our own, and all of it happens inside a forked random state that is carried from slice to slice and from rung to rung.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from automode.backends.base import Fate, SegmentDone, SegmentJob
from automode.errors import NotExecutableError
from automode.merges.norm_statistics import mend
from automode.planner.policy import SafeguardPolicy
from automode.planner.variants import Adapter
from automode.session.rng_state import pack_rng, unpack_rng
from automode.trainer.adapting import ADAPTER, Adapted, unmerged
from automode.trainer.batch_parts import part_rows, parts_of
from automode.trainer.card_data import CardData
from automode.trainer.early_stopping import Patience
from automode.trainer.gradient_norms import TotalNorm
from automode.trainer.judge import Judge
from automode.trainer.leaps import TrialGuard
from automode.trainer.optimizers import apply_variant, drive, scale_schedule, sharpness_aware_gradients
from automode.trainer.per_sample import PerSampleLoss
from automode.trainer.random_state import RandomState, forked_rng, seed_everything
from automode.trainer.sample_source import BatchPlan, SampleSource
from automode.trainer.stored_states import Checkpoints
from automode.trainer.trunk import (
    EVERY_SINCE_FORK,
    Trunk,
    autocast,
    begin_averages,
    candidates_of,
    copy_of,
    first_of,
    judged_of,
    moving_average,
    trainable,
)

TRAIN_PASSES = 3.0
"""Forward-equivalents of one trained sample: a forward pass and a backward pass of twice its cost."""

SAM_PASSES = 6.0


@dataclass(slots=True, kw_only=True)
class SpecialistRunner:
    """Opens segments for a backend.

    Attributes:
        trunk: The run that specialists fork from.
        source: Training samples by id.
        judge: Scores candidates on val-A.
        checkpoints: Durable states.
        batch_size: Rows a batch, as the trunk trains.
        steps_per_epoch: For schedules that step once an epoch; None when the schedule steps every step.
        per_sample: Per-sample losses, for loss weighting; None where they are not exact.
        cards: Training data of the running cards.
        safeguards: Which steps a trial leaves out.
    """

    trunk: Trunk
    source: SampleSource
    judge: Judge
    checkpoints: Checkpoints
    batch_size: int
    steps_per_epoch: int | None
    per_sample: PerSampleLoss | None
    cards: dict[str, CardData]
    safeguards: SafeguardPolicy

    def open(self, job: SegmentJob) -> SpecialistSegment:
        """Load the job's checkpoint into fresh copies.

        Raises:
            NotExecutableError: The model cannot be copied, or the variant asks for what this run does not have.
        """
        return SpecialistSegment(self, job, self.cards[job.card])


class SpecialistSegment:
    """One segment in progress: from one rung to the next."""

    def __init__(self, runner: SpecialistRunner, job: SegmentJob, data: CardData) -> None:
        self._runner = runner
        self._job = job
        self._data = data
        self._started = time.perf_counter()
        if job.variant.loss_weight != 1.0 and runner.per_sample is None:
            raise NotExecutableError(
                f"variant `{job.variant.name}` weights losses, and this run has no exact per-sample losses"
            )
        selected, others = data.pools(job.variant, job.trial)
        self._labels = data.labels(job.variant.labels)
        self._rows = max(1, round(runner.batch_size * job.variant.batch_mul))
        self._part = part_rows(self._rows, runner.trunk.part_rows, job.variant.updates)
        self._plan = BatchPlan(
            selected,
            others,
            replay=data.recipe.replay,
            batch_size=self._rows,
            entropy=data.entropy,
            mixed=job.variant.batches == "all",
        )
        # Averages that begin at the fork and end with the card read the weights between two parts of a batch too.
        self._ticks = job.variant.updates if data.recipe.judged == "tail" else 1
        self._ema: dict[str, Tensor] | None = None
        self._guard = TrialGuard(runner.safeguards)
        self._steps = 0
        self._resource = float(job.from_resource)
        with forked_rng():
            weights, rest, _ = runner.checkpoints.load(job.checkpoint)
            self._model, optimizer, self._scheduler = copy_of(runner.trunk)
            self._restarts = job.variant.restart and job.from_resource == 0
            if self._restarts:
                weights = first_of(rest, job.variant.name, job.checkpoint)
            self._model.load_state_dict(weights if ADAPTER not in rest else unmerged(weights, rest[ADAPTER]))
            self._adapted = None if job.variant.adapter is None else self._adapt(job.variant.adapter)
            self._averages = copy.deepcopy(runner.trunk.averages)
            self._take_over(optimizer, rest)
            self._trained = trainable(self._model) if self._adapted is None else self._adapted.parameters
            if job.from_resource == 0:
                seed_everything(_mixed(data.entropy))
            else:
                unpack_rng(rest["rng"])
            self._rng = RandomState.capture()
        self._total_norm = TotalNorm(self._model.parameters())
        self._buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        self._credit = 0.0
        self._passes = 0.0
        self._followed = self._clock
        self._patience = Patience(
            data.patience(job.variant), int((job.to_resource - job.from_resource) / self.cost)
        )
        self._diverged = False

    def _adapt(self, spec: Adapter) -> Adapted:
        return Adapted(self._model, spec, self._data.entropy)

    def _applied(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """What the variant trains with."""
        applied = apply_variant(optimizer, self._job.variant)
        return applied if self._adapted is None else self._adapted.relink(applied)

    def _take_over(self, optimizer: torch.optim.Optimizer, rest: Mapping[str, Any]) -> None:
        """Load optimizer, schedule and averages: from the trunk's snapshot at the fork, later from the specialist's own."""
        job = self._job
        if self._averages is not None and "averages" in rest:
            last = rest["averages"]["last_step"] * self._ticks
            self._averages.load_state_dict({**rest["averages"], "last_step": last})
        if job.from_resource == 0:
            optimizer.load_state_dict(rest["optimizer"])
            if self._restarts:  # some kinds, as Adagrad, hold something before their first step
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": rest.get("first_moments", {}), "param_groups": groups})
            if self._data.recipe.judged == "tail":
                begin_averages(self._averages, every=EVERY_SINCE_FORK)
            elif self._restarts:
                begin_averages(self._averages)
            self._optimizer = self._applied(optimizer)
            if self._scheduler is not None and "scheduler" in rest:
                self._scheduler.load_state_dict(rest["scheduler"])
                scale_schedule(self._scheduler, job.variant.lr_mul)
                drive(self._scheduler, self._optimizer)
            self._base_rates = [float(g["lr"]) for g in self._optimizer.param_groups]
            return
        self._optimizer = self._applied(optimizer)
        if self._adapted is not None:
            self._adapted.load(rest[ADAPTER])
        self._optimizer.load_state_dict(rest["optimizer"])
        if self._scheduler is not None and "scheduler" in rest:
            drive(self._scheduler, self._optimizer)
            self._scheduler.load_state_dict(rest["scheduler"])
        self._base_rates = list(rest["base_rates"])
        self._steps = int(rest["steps"])
        self._ema = rest.get("ema")
        if "guard" in rest:  # trials of before have none
            self._guard.load(rest["guard"])
        if job.from_resource - rest["resource"] < self.cost:  # a rung that no whole number of steps filled
            self._resource = float(rest["resource"])

    @property
    def passes(self) -> float:
        """Sample passes spent so far."""
        return self._passes

    @property
    def cost(self) -> float:
        """Resource steps of one optimizer step, by its rows: sharpness-aware steps count double."""
        each = self._rows / self._runner.batch_size
        return 2.0 * each if self._job.variant.optimizer == "sam" else each

    @property
    def _clock(self) -> int:
        """The trunk's step by which as many rows were seen: for schedules that know batches of its size, and averages."""
        return self._data.step + int(self._steps * self._rows / self._runner.batch_size + 1e-9)

    def _tick(self, left: float = 0.0) -> int:
        """The averages' clock; ``left``: share of the running batch that is still to be trained on."""
        return self._clock * self._ticks - int(left * self._ticks)

    def advance(self, resource: float) -> bool:
        """Train for at most so many resource steps; True when the rung is reached or nothing is left to gain."""
        self._credit += resource
        if self._credit < self.cost:
            return self._done()
        with forked_rng():
            self._rng.restore()
            while self._credit >= self.cost and not self._done():
                self._credit -= self.cost
                self._step()
            self._rng = RandomState.capture()
        return self._done()

    def finish(self) -> SegmentDone:
        """Choose the best of raw weights and averages on val-A, save the specialist, report.

        The checkpoint holds the raw weights to go on from, and the averages that the choice may name.
        """
        job, runner = self._job, self._runner
        if self._averages is not None:
            self._averages.update(self._trained, self._tick(), now=True)
        beside: dict[str, Any] = {"kind": type(self._optimizer).__name__}
        if self._adapted is not None:  # from here on the network is a plain one again
            merged, kept = self._adapted.take_off(finite=not self._diverged)
            self._model.load_state_dict(merged)
            beside = {"kind": ADAPTER, ADAPTER: kept}
        candidates = candidates_of(self._model, self._averages)
        if self._ema is not None:
            candidates["ema"] = candidates["raw"] | self._ema
        choice, value = "raw", math.nan
        if not self._diverged:
            judged = judged_of(candidates, self._data.recipe.judged)
            choice, value, passes = runner.judge.choose(self._model, judged, self._data.metric)
            self._passes += passes
        digest = runner.checkpoints.save(
            candidates["raw"],
            self._rest() | beside,
            {
                "kind": "trial",
                "card": job.card,
                "trial": job.trial,
                "resource": job.to_resource,
                "choice": choice,
            },
        )
        return SegmentDone(
            job=job,
            value=value,
            choice=choice,
            checkpoint=digest,
            passes=self._passes,
            stopped_early=self._patience.over,
            seconds=time.perf_counter() - self._started,
        )

    def _rest(self) -> dict[str, Any]:
        rest: dict[str, Any] = {
            "optimizer": self._optimizer.state_dict(),
            "base_rates": self._base_rates,
            "steps": self._steps,
            "resource": self._resource,
            "rng": self._packed_rng(),
            "guard": self._guard.state(),
        }
        if self._scheduler is not None:
            rest["scheduler"] = self._scheduler.state_dict()
        if self._averages is not None:
            averages = self._averages.state_dict()
            rest["averages"] = averages | {"last_step": averages["last_step"] // self._ticks}
        if self._ema is not None:
            rest["ema"] = self._ema
        return rest

    def _packed_rng(self) -> dict[str, Any]:
        with forked_rng():
            self._rng.restore()
            return pack_rng()

    def _done(self) -> bool:
        return (
            self._diverged or self._patience.over or self._resource + self.cost > self._job.to_resource + 1e-9
        )

    def _step(self) -> None:
        """Train on one batch, in as many parts as the variant or the trunk divides it into; one that is left out ends it."""
        batch, rows = self._drawn()
        self._set_rate()
        parts, weighs = parts_of(batch, self._part), self._job.variant.loss_weight != 1.0
        chosen = self._plan.chosen(self._steps) if weighs else np.empty(0, dtype=np.bool_)
        self._steps += 1
        self._resource += self.cost
        self._passes += rows * (SAM_PASSES if self._job.variant.optimizer == "sam" else TRAIN_PASSES)
        losses: list[float] = []
        for part, which in zip(parts, np.array_split(chosen, len(parts)), strict=True):
            loss, fate = self._update(part, which)
            if fate != "moves":
                break
            losses.append(loss)
            if self._averages is not None and len(losses) < len(parts):
                self._averages.update(self._trained, self._tick(1.0 - len(losses) / len(parts)))
        if losses and not self._diverged:
            self._follow()
            self._patience.see(sum(losses) / len(losses))

    def _update(self, batch: Any, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[float, Fate]:
        """Take one optimizer step, or leave it out; returns the loss, and which of them it was."""
        if self._job.variant.optimizer == "sam":
            every: list[Tensor] = list(self._model.parameters())
            loss = sharpness_aware_gradients(
                every, lambda: self._loss(batch, chosen), self._job.variant.sam_rho
            )
        else:
            self._optimizer.zero_grad(set_to_none=True)
            tensor = self._loss(batch, chosen)
            tensor.backward()  # type: ignore[no-untyped-call]
            loss = float(tensor.detach())
        norm, limit = self._total_norm() if self._guard.on else math.nan, self.clip_norm
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit)
        fate = self._fate(loss, norm)
        if fate == "moves":
            self._optimizer.step()
        else:
            mend(self._model, self._buffers)
        return loss, fate

    @property
    def clip_norm(self) -> float | None:
        """Largest norm of the gradient over all parameters."""
        return self._job.variant.clip_norm or self._runner.trunk.clip_norm

    def _fate(self, loss: float, norm: float) -> Fate:
        fate = self._guard.fate(loss, norm, self._steps - 1, clipped=self.clip_norm is not None)
        self._diverged = fate == "ends"
        return fate

    def _drawn(self) -> tuple[Any, int]:
        """Return the next batch of the plan, with its labels, and its rows."""
        ids = self._plan.ids(self._steps)
        return self._labels.put(self._runner.source.batch(ids), ids), int(ids.size)

    def _loss(self, batch: Any, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Tensor:
        """The loss of a batch under the variant's precision; rows that are chosen weigh as the variant says."""
        trunk, variant = self._runner.trunk, self._job.variant
        with autocast(trunk.device, trunk.precision if variant.precision == "keep" else variant.precision):
            loss, outputs, targets = trunk.step_fn(self._model, batch)
            per_sample = self._runner.per_sample
            if variant.loss_weight == 1.0 or per_sample is None:
                return loss
            losses = per_sample.differentiable(outputs, targets)
            weight = torch.ones_like(losses)
            weight[torch.from_numpy(chosen).to(weight.device)] = variant.loss_weight
            weighted: Tensor = (losses * weight).sum() / weight.sum()
            return weighted

    def _set_rate(self) -> None:
        """Anneal linearly to zero by the top rung; otherwise the copied schedule, or nothing, sets the rate."""
        if self._job.variant.schedule == "anneal":
            left = max(0.0, 1.0 - self._resource / self._job.top_resource)
            for group, rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = rate * left

    def _follow(self) -> None:
        """Step the copied schedule and the averages after an applied step, as often as the trunk would by as many rows.

        A schedule that waits for the validation loss to stall holds its rate: a trial is not validated on the way.
        """
        step, before = self._clock, self._followed
        self._followed = step
        follows = self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau)
        if follows and self._job.variant.schedule == "keep":
            every = self._runner.steps_per_epoch or 1
            for _ in range(step // every - before // every):
                self._scheduler.step()
        if self._averages is not None:
            self._averages.update(self._trained, self._tick())
        decay = self._job.variant.ema
        if decay is not None:
            named = (
                dict(self._model.named_parameters()) if self._adapted is None else self._adapted.parameters
            )
            self._ema = moving_average(self._ema, named, decay)


def _mixed(entropy: Sequence[int]) -> int:
    return int(np.random.SeedSequence(list(entropy)).generate_state(1, np.uint64)[0] >> np.uint64(1))
