"""Putting a run's driver together from its parts: what the fold is told about the run, and who carries out its commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from automode.engine import initial
from automode.engine.running import MAX_EXPERTS
from automode.errors import AutomodeError, MergeError
from automode.merges.batches import training_flags_kept
from automode.merges.gate import most_parameters
from automode.merges.moe import last_layer
from automode.merges.norm_statistics import norm_layers
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.events import Mode, Run, SessionStarted, Task
from automode.planner.policy import PLANNER_VERSION
from automode.planner.rules import chosen
from automode.plugins import plugins
from automode.session import SessionStore
from automode.session.artifacts import ArtifactStore
from automode.session.checkpoints import CheckpointStore
from automode.session.logs import SessionLog
from automode.trainer.backing import backend_of
from automode.trainer.combining import Combiner
from automode.trainer.diagnosing import diagnoser_of
from automode.trainer.driver import Driver
from automode.trainer.evidence import Evidence
from automode.trainer.heldout import HeldOut, Overlap, find_overlap
from automode.trainer.ids import root_of
from automode.trainer.narrator import Narrator
from automode.trainer.per_sample import PerSampleLoss, per_sample_twin
from automode.trainer.performer import Performer
from automode.trainer.random_state import forked_rng
from automode.trainer.reach import as_read
from automode.trainer.run_parts import RunParts
from automode.trainer.safeguarding import GoodStates
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.sample_source import FixedPass, Ids, SampleSource
from automode.trainer.scanning import Scanner
from automode.trainer.schedule import known_drops
from automode.trainer.selecting import Selector
from automode.trainer.session_header import header_of
from automode.trainer.specialists import Checkpoints, SpecialistRunner
from automode.trainer.states import States
from automode.trainer.trunk import Trunk, trainable
from automode.trainer.user_warning import warn_user
from automode.trainer.validation import SliceFn

REFRESH_BATCHES = 16
"""Training batches, at the most, that refresh norm statistics and feed Fisher information."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What is known of the held-out data and of the task before the first step."""

    overlap: Overlap
    task: Task
    per_sample: PerSampleLoss
    exact: bool
    why_inexact: str | None
    why_no_evidence: str | None


def open_driver(parts: RunParts) -> Driver:
    """Open the session and begin its log; nothing of the user's is touched but the averages that act mode keeps.

    Raises:
        SessionError: The session cannot be written.
    """
    with forked_rng():
        held = look_at(parts)
        mode, why = _mode(parts, held)
        trunk, policy, total = parts.trunk, parts.policy, parts.plan.total
        if mode in ("propose", "act") and policy.averages.enabled and total:
            trunk.averages = TrajectoryAverages(trainable(trunk.model), total)
        store = SessionStore.create(parts.session_path, header=header_of(parts, mode))
        log = SessionLog(parts.session_path, console=parts.console.event, level="warning")
        checkpoints = CheckpointStore(store.path / "checkpoints")
        performer, refresh = performer_of(parts, held, store.path, checkpoints)
        backend = backend_of(parts, mode, performer.runner, refresh, checkpoints)
        offered = plugins()
        state = initial(chosen(policy, [plugin.rule for plugin in offered]))
        driver = Driver(
            state=state,
            store=store,
            log=log,
            performer=performer,
            backend=backend,
            narrator=Narrator(parts.console, log.logger),
            total_steps=total if total is not None else sys.maxsize,
            guard=policy.safeguards.skip_nonfinite,
            within=policy.budget == "within",
        )
        driver.start(
            SessionStarted(
                session=parts.session_path.name,
                seed=parts.seed,
                mode=mode,
                asked_mode=parts.settings.mode,
                why_mode=why,
                policy=policy.dump(),
                policy_digest=policy.digest_with(plugin.distribution for plugin in offered),
                planner_version=PLANNER_VERSION,
                plugins=tuple(plugin.distribution for plugin in offered),
                run=_run(parts, held, slots=1 if backend is None else backend.slots),
            )
        )
        return driver


def look_at(parts: RunParts) -> Held:
    """Find out what the held-out data and the loss are good for; nothing is changed by it."""
    request, held = parts.request, parts.held_out
    if parts.mode == "off":
        return Held(
            overlap=Overlap(n=0, share=0.0, how="none"),
            task="unknown",
            per_sample=per_sample_twin(parts.trunk.loss_fn),
            exact=False,
            why_inexact="mode off only records",
            why_no_evidence="mode off only records",
        )
    why_no_evidence = "there is no validation loader" if held is None else held.reason
    overlap = Overlap(n=0, share=0.0, how="none")
    if held is not None and held.reason is None and hasattr(request.train_loader, "dataset"):
        overlap = find_overlap(as_read(request.train_loader), as_read(request.val_loader, draw=True))
    if overlap.n:
        warn_user(
            f"{overlap.n} of the validation samples ({overlap.share:.0%} of those looked at) are training samples too, by their "
            f"{overlap.how}: such a validation proves nothing. Hold data out (torch.utils.data.random_split) to let automode act"
        )
        why_no_evidence = why_no_evidence or f"{overlap.n} validation samples are training samples too"
    per_sample = per_sample_twin(parts.trunk.loss_fn)
    task, exact, why = _task_of(parts, held, per_sample)
    if parts.own_step is None and task in ("sequence", "unknown") and not exact:
        why_no_evidence = why_no_evidence or (
            f"samples cannot be judged one by one ({why}), and a batch's mean counts as one sample only"
        )
    return Held(
        overlap=overlap,
        task=task,
        per_sample=per_sample,
        exact=exact,
        why_inexact=why,
        why_no_evidence=why_no_evidence,
    )


def _task_of(
    parts: RunParts, held: HeldOut | None, per_sample: PerSampleLoss
) -> tuple[Task, bool, str | None]:
    """Read one batch without a trace; a model that fails on it will say so itself when training begins."""
    trunk = parts.trunk
    if parts.own_step is not None:
        return "unknown", False, "the training step is the user's own, and shows outputs only as it goes"
    try:
        batch = _one_batch(parts, held)
        if batch is None:
            return "unknown", False, "no sample can be read before training begins"
        with training_flags_kept(trunk.model), torch.no_grad():
            trunk.model.eval()
            with trunk.autocast():
                loss, outputs, targets = trunk.step_fn(trunk.model, batch)
        exact = per_sample.check(outputs, targets, loss)
        kind = per_sample.task(outputs, targets)
    except Exception as error:  # whatever it is, training will meet it, and tell it as it is
        return "unknown", False, f"one batch could not be read beforehand ({type(error).__name__}: {error})"
    return kind if kind != "binary" else "unknown", exact, per_sample.reason


def _one_batch(parts: RunParts, held: HeldOut | None) -> Any:
    if held is not None and held.reason is None:
        return next(held.batches("A"))[0]
    source, ids = _source(parts)
    return source.batch(ids[: min(8, ids.size)]) if source is not None and ids.size else None


def _source(parts: RunParts) -> tuple[SampleSource | None, Ids]:
    """Training samples by id, and every id that training may visit."""
    none = np.empty(0, dtype=np.int64)
    loader = parts.request.train_loader
    if parts.loader.reason is not None or not hasattr(loader, "dataset"):
        return None, none
    try:
        dataset = as_read(loader)
        root, mapped = root_of(dataset)
        ids = np.arange(len(dataset), dtype=np.int64) if mapped is None else np.unique(mapped)
        collate: Callable[[list[Any]], Any] = getattr(loader, "collate_fn", None) or default_collate
        return SampleSource(root, collate, parts.trunk.device), np.asarray(ids, dtype=np.int64)
    except (AutomodeError, TypeError):
        return None, none


def _mode(parts: RunParts, held: Held) -> tuple[Mode, str | None]:
    if parts.mode == "act" and held.overlap.n:
        return (
            "propose",
            f"{held.overlap.n} validation samples are training samples too, so nothing could be proven",
        )
    return parts.mode, parts.why_mode


def _run(parts: RunParts, held: Held, *, slots: int) -> Run:
    trunk, plan, loader = parts.trunk, parts.plan, parts.loader
    _, ids = _source(parts)
    held_out = parts.held_out if held.why_no_evidence is None else None
    total = plan.total or 0
    why_no_forks = None
    if parts.own_step is not None:
        why_no_forks = "the training step is the user's own and steps the optimizer itself, so no specialist can be trained by it"
    elif trunk.precision == "fp16":
        why_no_forks = "specialists are not trained under gradient scaling (fp16); use bf16"
    elif not {id(p) for p in trunk.parameters} <= {id(p) for p in trunk.model.parameters()}:
        why_no_forks = "the optimizer also trains parameters that are not the model's, which no specialist would take along"
    return Run(
        total_steps=total,
        batch=_batch_size(parts),
        train_samples=int(ids.size) or None,
        val_a=held_out.n_a if held_out is not None else 0,
        val_b=held_out.n_b if held_out is not None else 0,
        task=held.task,
        has_ids=loader.reason is None and ids.size > 0,
        why_no_ids=loader.reason,
        exact_losses=held.exact,
        why_inexact=held.why_inexact,
        overlap=held.overlap.n,
        why_no_evidence=held.why_no_evidence,
        why_no_forks=why_no_forks,
        slices={name: int(ids_.size) for name, ids_ in parts.slices.items()},
        train_slices=tuple(_functions(parts)),
        scheduled=trunk.scheduler is not None,
        known_drops=known_drops(
            trunk.scheduler, parts.settings.scheduler_interval, plan.steps_per_epoch, total
        )
        if total
        else (),
        averages=trunk.averages is not None,
        own_step=parts.own_step is not None,
        refresh=min(int(ids.size), REFRESH_BATCHES * max(2, round(_batch_size(parts))))
        if norm_layers(trunk.model)
        else 0,
        router=_router_size(trunk.model),
        slots=slots,
        model_mib=_mebibytes(trunk),
        bf16=True,
    )


def _mebibytes(trunk: Trunk) -> float:
    return float(sum(t.numel() * t.element_size() for t in trunk.model.state_dict().values())) / 2**20


def _router_size(model: torch.nn.Module) -> float:
    """Size of a router over as many experts as a card may bring, relative to the network."""
    try:
        layer = model.get_submodule(last_layer(model))
    except MergeError:
        return 1.0  # no layer to take features from, so that no router will be fitted
    features = layer.in_features if isinstance(layer, torch.nn.Linear) else None
    return most_parameters(features, MAX_EXPERTS + 1) / max(1, sum(p.numel() for p in model.parameters()))


def _functions(parts: RunParts) -> dict[str, SliceFn]:
    """Slices that are functions, and so know the training samples too."""
    return {name: part for name, part in (parts.request.slices or {}).items() if callable(part)}


def _batch_size(parts: RunParts) -> float:
    """Mean samples a step."""
    loader, steps = parts.request.train_loader, parts.plan.steps_per_epoch
    size = getattr(loader, "batch_size", None)
    if isinstance(size, int):
        n = len(loader.dataset) if steps and hasattr(loader.dataset, "__len__") else 0  # type: ignore[attr-defined]
        return n / steps if n and steps and not getattr(loader, "drop_last", False) else float(size)
    if isinstance(loader, list | tuple) and loader and isinstance(loader[0], list | tuple):
        return float(np.mean([len(batch[0]) for batch in loader]))
    return 1.0


def performer_of(
    parts: RunParts, held: Held, folder: Path, checkpoints: Checkpoints
) -> tuple[Performer, FixedPass]:
    """Make what carries commands out, and a pass over some training batches; ``folder`` is the session's."""
    trunk, seed = parts.trunk, parts.seed
    artifacts = ArtifactStore(folder / "artifacts")
    source, train_ids = _source(parts)
    training = FixedPass(
        source, train_ids, batch_size=max(2, round(_batch_size(parts))), batches=REFRESH_BATCHES, seed=seed
    )
    performer = Performer(
        trunk=trunk,
        checkpoints=checkpoints,
        seed=seed,
        states=States(trunk, checkpoints, training),
        exports=folder / "exports",
        good=GoodStates(trunk, parts.policy.safeguards),
        diagnoser=diagnoser_of(parts, source, train_ids, held.why_inexact),
    )
    held_out = parts.held_out if held.why_no_evidence is None else None
    if held_out is not None:
        _add_evidence(performer, parts, held, held_out, training)
    if source is None:
        return performer, training
    ledger = _ledger(parts) if held.exact else None
    if ledger is not None:
        performer.scanner = Scanner(
            trunk=trunk,
            ledger=ledger,
            source=source,
            train_ids=train_ids,
            val_a=None if held_out is None else lambda: (batch for batch, _ in held_out.batches("A")),
            artifacts=artifacts,
            task=held.task,
            seed=seed,
        )
    performer.selector = Selector(
        train_ids=train_ids,
        ledger=ledger,
        scanner=performer.scanner,
        artifacts=artifacts,
        slices=_functions(parts),
        source=source,
        seed=seed,
        gone=lambda: trunk.excluded,
    )
    if performer.evidence is None:
        return performer, training
    every = parts.plan.steps_per_epoch if parts.settings.scheduler_interval == "epoch" else None
    performer.runner = SpecialistRunner(
        trunk=trunk,
        source=source,
        judge=performer.evidence,
        checkpoints=checkpoints,
        batch_size=max(1, int(_batch_size(parts))),  # not above the mean that steps are priced by
        steps_per_epoch=every,
        per_sample=held.per_sample if held.exact else None,
        cards={},
    )
    return performer, training


def _ledger(parts: RunParts) -> Callable[[], SampleLedger] | None:
    if parts.probe.ledger is None:
        return None

    def current() -> SampleLedger:
        ledger = parts.probe.ledger
        assert ledger is not None
        return ledger

    return current


def _add_evidence(
    performer: Performer,
    parts: RunParts,
    held: Held,
    held_out: HeldOut,
    training: Callable[[], Iterator[Any]],
) -> None:
    assert parts.evaluator is not None
    performer.evidence = Evidence(parts.evaluator, performer.states, parts.slices)
    performer.is_val_a = held_out.is_a
    performer.combiner = Combiner(
        evidence=performer.evidence,
        states=performer.states,
        checkpoints=performer.checkpoints,
        val_a=lambda: (batch for batch, _ in held_out.batches("A")),
        training=training,
        task=held.task,
        seed=parts.seed,
    )
