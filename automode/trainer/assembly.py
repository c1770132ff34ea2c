"""Putting a run's driver together from its parts: what the fold is told about the run, and who carries out its commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from automode.backends.base import Backend
from automode.engine import State, initial
from automode.errors import MergeError
from automode.merges.gate import most_parameters
from automode.merges.moe import last_layer
from automode.merges.norm_statistics import norm_layers
from automode.merges.trajectory import TrajectoryAverages
from automode.planner.events import Mode, Resumed, Run, SessionStarted
from automode.planner.policy import PLANNER_VERSION
from automode.planner.rules import chosen
from automode.planner.sharing import MAX_EXPERTS
from automode.plugins import plugins
from automode.session import Session, SessionStore
from automode.session.artifacts import ArtifactStore
from automode.session.checkpoints import CheckpointStore
from automode.session.ledger_file import forget_later
from automode.session.logs import SessionLog
from automode.session.replaying import recovered
from automode.trainer.backing import backend_of
from automode.trainer.batch_size import batch_size_of
from automode.trainer.best_state import BestState, keeps_best
from automode.trainer.combining import Combiner
from automode.trainer.diagnosing import diagnoser_of
from automode.trainer.distilling import Distiller
from automode.trainer.driver import Driver
from automode.trainer.earlier import read_earlier
from automode.trainer.evidence import Evidence
from automode.trainer.finishing import Finisher
from automode.trainer.first_look import Held, as_recorded, look_at, source_of
from automode.trainer.heldout import HeldOut
from automode.trainer.narrator import Narrator
from automode.trainer.performer import Performer
from automode.trainer.random_state import forked_rng
from automode.trainer.relabelling import Relabeller
from automode.trainer.resume_point import ResumePoint
from automode.trainer.run_parts import RunParts
from automode.trainer.safeguarding import GoodStates, why_no_rate
from automode.trainer.sample_keeper import SampleKeeper
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.sample_source import FixedPass, Ids, SampleSource
from automode.trainer.scanning import Scanner
from automode.trainer.schedule import known_drops
from automode.trainer.second_look import SecondLook
from automode.trainer.selecting import Selector
from automode.trainer.session_header import header_of
from automode.trainer.specialists import SpecialistRunner
from automode.trainer.states import States
from automode.trainer.step_choice import keep_first_weights, why_no_forks, why_no_other_batches
from automode.trainer.stored_states import Checkpoints
from automode.trainer.trunk import trainable
from automode.trainer.validation import SliceFn

REFRESH_BATCHES = 16
"""Training batches, at the most, that refresh norm statistics and feed Fisher information."""


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
        no_restart = keep_first_weights(parts, mode)
        store = SessionStore.create(parts.session_path, header=header_of(parts, mode))
        offered = plugins()
        state = initial(chosen(policy, [plugin.rule for plugin in offered]))
        driver, backend = _driver(parts, held, mode, store, state)
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
                run=_run(parts, held, backend, no_restart),
            )
        )
        return driver


def resume_driver(parts: RunParts, point: ResumePoint) -> Driver:
    """Open the session again and go on from a checkpoint; the trunk's own state is put back by whoever calls.

    Args:
        parts: The run, made by the same script.
        point: Where to go on.

    Raises:
        SessionError: The session cannot be written, or another process writes it.
        ReplayDifferenceError: This version decides otherwise than the log says, so that going on would contradict it.
    """
    with forked_rng():
        store = SessionStore.open(parts.session_path)
        let_go = store.abandon
        try:
            with Session.open(parts.session_path) as session:
                found, earlier = recovered(session, point.at_seq), read_earlier(session, point.at_seq)
                began = next(session.events("session_started")).body["mode"]
                recorded = {row.digest for row in session.checkpoints(include_superseded=True)}
            run, total = found.state.run, parts.plan.total or 0
            assert run is not None
            driver, _ = _driver(parts, as_recorded(parts, run), began, store, found.state)
            let_go = driver.let_go
            checkpoints = CheckpointStore(store.path / "checkpoints")
            checkpoints.sweep()
            # What was stored and not recorded before the kill: nobody will ever ask for it.
            checkpoints.collect(recorded)
            forget_later(store.path, point.step)
            driver.resume(
                Resumed(
                    checkpoint=point.checkpoint,
                    at_seq=point.at_seq,
                    step=point.step,
                    attempt=earlier.attempt + 1,
                    exact=point.exact,
                    why_approximate=point.why_approximate,
                    looks=earlier.looks,
                    total_steps=None if total == run.total_steps else total,
                    actor=point.actor,
                ),
                found.commands,
                kept=point.driver,
                earlier=earlier,
                verify=checkpoints.verify,
            )
        except BaseException:
            let_go()
            raise
        return driver


def _driver(
    parts: RunParts, held: Held, mode: Mode, store: SessionStore, state: State
) -> tuple[Driver, Backend | None]:
    """Make the driver, and the backend that it runs segments by."""
    policy, total = parts.policy, parts.plan.total
    parts.keep_row = lambda stream, names, values: store.add_row(stream, state.attempt, names, values)
    log = SessionLog(parts.session_path, console=parts.console.event, level="warning")
    parts.log = log.logger
    checkpoints = CheckpointStore(store.path / "checkpoints")
    performer, refresh = performer_of(parts, held, store.path, checkpoints)
    backend = backend_of(parts, mode, performer.runner, refresh, checkpoints)
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
        on_card=parts.on_card,
    )
    return driver, backend


def _mode(parts: RunParts, held: Held) -> tuple[Mode, str | None]:
    if parts.mode == "act" and held.overlap.n:
        shared = f"{held.overlap.n} validation samples are training samples too"
        return "propose", f"{shared}, so nothing could be proven"
    return parts.mode, parts.why_mode


def _run(parts: RunParts, held: Held, backend: Backend | None, no_restart: str | None) -> Run:
    trunk, plan, loader = parts.trunk, parts.plan, parts.loader
    _, ids = source_of(parts)
    held_out = parts.held_out if held.why_no_evidence is None else None
    total = plan.total or 0
    return Run(
        total_steps=total,
        batch=batch_size_of(parts),
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
        why_no_forks=why_no_forks(parts),
        why_no_restart=no_restart,
        why_no_batch_mul=why_no_other_batches(parts.request.train_loader),
        adjusts=parts.hand_written is not None,
        why_no_rate=why_no_rate(trunk),
        slices={name: int(ids_.size) for name, ids_ in parts.slices.items()},
        train_slices=tuple(_functions(parts)),
        scheduled=trunk.scheduler is not None,
        known_drops=known_drops(
            trunk.scheduler,
            parts.settings.scheduler_interval,
            plan.steps_per_epoch,
            total,
            batches_per_step=parts.settings.accumulate_grad_batches,
        )
        if total
        else (),
        averages=trunk.averages is not None,
        keeps_best=trunk.averages is not None and keeps_best(parts.policy),
        own_step=parts.own_step is not None and parts.hand_written is None,
        refresh=min(int(ids.size), REFRESH_BATCHES * max(2, round(batch_size_of(parts))))
        if norm_layers(trunk.model)
        else 0,
        router=_router_size(trunk.model),
        slots=1 if backend is None else backend.slots,
        why_no_resources="no trials can be trained" if backend is None else backend.why_no_resources,
        device=trunk.device.type,
        model_mib=trunk.mebibytes,
        bf16=True,
    )


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


def performer_of(
    parts: RunParts, held: Held, folder: Path, checkpoints: Checkpoints
) -> tuple[Performer, FixedPass]:
    """Make what carries commands out, and a pass over some training batches; ``folder`` is the session's."""
    trunk, seed, artifacts = parts.trunk, parts.seed, ArtifactStore(folder / "artifacts")
    source, train_ids = source_of(parts)
    training = FixedPass(
        source, train_ids, batch_size=max(2, round(batch_size_of(parts))), batches=REFRESH_BATCHES, seed=seed
    )
    performer = Performer(
        trunk=trunk,
        checkpoints=checkpoints,
        seed=seed,
        states=States(trunk, checkpoints, training),
        exports=folder / "exports",
        good=GoodStates(trunk, parts.policy.safeguards, foreign=parts.hand_written),
        best=BestState(trunk, enabled=keeps_best(parts.policy)),
        diagnoser=diagnoser_of(parts, source, train_ids, held.why_inexact),
    )
    held_out = parts.held_out if held.why_no_evidence is None else None
    if held_out is not None:
        _add_evidence(performer, parts, held, held_out, training)
    if source is None:
        return performer, training
    ledger = _ledger(parts) if held.exact else None
    if ledger is not None:
        _add_scanner(performer, parts, held, ledger, source, train_ids, folder)
    performer.selector = Selector(
        train_ids=train_ids,
        ledger=ledger,
        scanner=performer.scanner,
        artifacts=artifacts,
        slices=_functions(parts),
        source=source,
        seed=seed,
        gone=lambda: trunk.excluded,
        relabeller=Relabeller(trunk=trunk, states=performer.states, source=source, seed=seed),
    )
    if performer.evidence is None:
        return performer, training
    every = parts.plan.steps_per_epoch if parts.settings.scheduler_interval == "epoch" else None
    performer.runner = SpecialistRunner(
        trunk=trunk,
        source=source,
        judge=performer.evidence,
        checkpoints=checkpoints,
        batch_size=max(1, int(batch_size_of(parts))),  # not above the mean that steps are priced by
        steps_per_epoch=every,
        per_sample=held.per_sample if held.exact else None,
        cards={},
        safeguards=parts.policy.safeguards,
    )
    return _with_distiller(performer, held), training


def _with_distiller(performer: Performer, held: Held) -> Performer:
    runner, combiner, evidence = performer.runner, performer.combiner, performer.evidence
    assert runner is not None
    assert evidence is not None
    if combiner is None or held.task not in ("classification", "regression"):
        return performer
    combiner.distiller = Distiller(
        trunk=performer.trunk,
        states=performer.states,
        checkpoints=performer.checkpoints,
        evidence=evidence,
        source=runner.source,
        batch_size=runner.batch_size,
        cards=runner.cards,
        task=held.task,
    )
    return performer


def _add_scanner(
    performer: Performer,
    parts: RunParts,
    held: Held,
    ledger: Callable[[], SampleLedger],
    source: SampleSource,
    train_ids: Ids,
    folder: Path,
) -> None:
    """Add what reads the ledger and the samples, and what leaves them in the session's folder."""
    held_out = parts.held_out if held.why_no_evidence is None else None
    val_a = None if held_out is None else lambda: (batch for batch, _ in held_out.batches("A"))
    performer.scanner = Scanner(
        trunk=parts.trunk,
        ledger=ledger,
        source=source,
        train_ids=train_ids,
        val_a=val_a,
        artifacts=ArtifactStore(folder / "artifacts"),
        task=held.task,
        seed=parts.seed,
        per_sample=held.per_sample,
        second_look=SecondLook(trunk=parts.trunk, states=performer.states, source=source, val_a=val_a),
    )
    functions = _functions(parts)
    performer.samples = SampleKeeper(
        folder=folder,
        scanner=performer.scanner,
        slices=functions,
        listed=tuple(name for name in parts.slices if name not in functions),
    )


def _ledger(parts: RunParts) -> Callable[[], SampleLedger] | None:
    if not parts.probe.keeps_ledger:
        return None

    def current() -> SampleLedger:
        ledger = parts.probe.ledger
        assert ledger is not None
        return ledger

    return current


def _add_evidence(
    performer: Performer, parts: RunParts, held: Held, held_out: HeldOut, training: FixedPass
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
    performer.finisher = Finisher(performer.evidence, performer.states, parts.policy.averages.clean_below)
