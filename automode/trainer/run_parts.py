"""A run before its first step: everything made, checked and in its place."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from automode.errors import UsageError
from automode.planner.events import Mode
from automode.planner.policy import Policy
from automode.session.paths import new_session_folder
from automode.trainer.card_callbacks import CardCallback
from automode.trainer.data_cursor import DataCursor
from automode.trainer.evaluation import Evaluator, Ids
from automode.trainer.fit_request import FitRequest, length_of
from automode.trainer.heldout import HeldOut
from automode.trainer.holding_out import hold_out
from automode.trainer.ids import RecordedLoader
from automode.trainer.per_sample import per_sample_twin
from automode.trainer.plan import Plan
from automode.trainer.probe import Probe
from automode.trainer.progress import Console
from automode.trainer.random_state import forked_rng
from automode.trainer.sample_ledger import SampleLedger
from automode.trainer.settings import Settings, device_of
from automode.trainer.steps import TrainingStep, pair_step
from automode.trainer.trunk import Trunk
from automode.trainer.user_warning import warn_user
from automode.trainer.validation import Validation, check_batches, resolve_slices


@dataclass(slots=True, kw_only=True)
class RunParts:
    """What the loop and the driver are made from.

    Attributes:
        settings: The Trainer's.
        request: The arguments of ``fit``.
        own_step: The user's training step, or None.
        policy: What automode may do.
        mode: The mode that the run begins in.
        why_mode: Why that is not the mode asked for, or None.
        seed: The session's seed.
        plan: How long to train.
        trunk: What is trained.
        loader: The training batches, with their sample ids.
        cursor: The place in them.
        probe: Collects what a step shows; its ledger holds per-sample losses, except in mode ``off``.
        held_out: The validation set, or what is held out of the training data, in two halves; None where there is neither.
        evaluator: Scores networks on it; None likewise.
        slices: Sample ids of each slice of it.
        validation: Evaluates on the whole of it, or None.
        test: Evaluates on the test set, or None.
        console: What people see.
        session_path: The session's folder, fresh and empty.
        on_card: The user's own functions that hear of every card.
        hand_written: Why the loop around the training step is not ours; None where it is.
        batch: Mean samples a step, where the training loader does not tell.
        log: Logger of the session, whose lines below a warning reach its file only; None while no session is open.
        closing: Called before the session's log is closed; None: nobody wants to know.
        keep_row: Records a row of one of the session's streams beside the trunk's; None while no session is open.
    """

    settings: Settings
    request: FitRequest
    own_step: TrainingStep | None
    policy: Policy
    mode: Mode
    why_mode: str | None
    seed: int
    plan: Plan
    trunk: Trunk
    loader: RecordedLoader
    cursor: DataCursor
    probe: Probe
    held_out: HeldOut | None
    evaluator: Evaluator | None
    slices: Mapping[str, Ids]
    validation: Validation | None
    test: Validation | None
    console: Console
    session_path: Path
    on_card: Sequence[CardCallback] = ()
    hand_written: str | None = None
    batch: float | None = None
    log: Any = None
    closing: Callable[[], None] | None = None
    keep_row: Callable[[str, tuple[str, ...], Sequence[float]], object] | None = None


def prepare(
    settings: Settings,
    policy: Policy,
    request: FitRequest,
    own_step: TrainingStep | None,
    *,
    session: tuple[Path, int] | None = None,
) -> RunParts:
    """Check everything, then make everything; the session's folder comes last.

    Args:
        settings: The Trainer's.
        policy: What automode may do.
        request: The arguments of ``fit``.
        own_step: The user's training step, or None.
        session: Folder and seed of a session that is taken up again; None: a fresh one.

    Raises:
        UsageError: An argument cannot be taken.
        DataError: The training loader is empty.
        SessionError: The session's folder cannot be made.
    """
    plan = _plan(settings, request)
    # An acting run whose end is not known only observes, and holds nothing out.
    holds = policy.evidence.holdout_share is not None and settings.mode == "act" and plan.total is not None
    request.check(settings, own_step=own_step is not None, holds_out=holds)
    device = device_of(settings.device, list(request.model.parameters()))
    if settings.precision == "fp16" and device.type != "cuda":
        raise UsageError(
            f'precision="fp16" needs CUDA, and this run is on {device.type}; use "bf16", or "fp32"'
        )
    mode, why_mode = _mode(settings.mode, plan)
    request.warn()
    if settings.seed is not None:
        _seed(settings.seed)
    request.place(device)
    loader = RecordedLoader(request.train_loader)
    trunk = _trunk(settings, request, device, loader)
    if session is not None:
        seed = session[1]
    else:
        seed = secrets.randbits(32) if settings.seed is None else settings.seed
    with forked_rng():
        probe = _probe(trunk, loader, watched=mode != "off")
        trunk.relabelling = probe.mute
        held_out = _held_out(request, policy, mode, trunk, loader, seed)
        test_set = None if request.test_loader is None else HeldOut(request.test_loader, device, seed)
        slices = _check_held_out(settings, request, held_out, test_set)
    evaluator = None if held_out is None else _evaluator(trunk, held_out)
    return RunParts(
        settings=settings,
        request=request,
        own_step=own_step,
        policy=policy,
        mode=mode,
        why_mode=why_mode,
        seed=seed,
        plan=plan,
        trunk=trunk,
        loader=loader,
        cursor=DataCursor(loader),
        probe=probe,
        held_out=held_out,
        evaluator=evaluator,
        slices=slices,
        validation=None if evaluator is None else Validation(trunk.model, evaluator, slices),
        test=None if test_set is None else Validation(trunk.model, _evaluator(trunk, test_set), {}),
        console=Console(settings.progress, speak=settings.console, description=settings.run_name),
        session_path=session[0]
        if session is not None
        else new_session_folder(settings.session_dir, settings.project, settings.run_name),
    )


def _held_out(
    request: FitRequest, policy: Policy, mode: Mode, trunk: Trunk, loader: RecordedLoader, seed: int
) -> HeldOut | None:
    """Split the validation set, or what the policy lets be held out of the training data."""
    if request.val_loader is not None:
        return HeldOut(request.val_loader, trunk.device, seed)
    found = hold_out(policy.evidence, mode, loader, trunk.device, seed)
    if found is None:
        return None
    held_out, back = found
    trunk.hold_out(back)
    return held_out


def _plan(settings: Settings, request: FitRequest) -> Plan:
    return Plan(
        max_epochs=settings.epochs,
        max_steps=settings.max_steps,
        steps_per_epoch=length_of(request.train_loader),
        validate_every=settings.val_every_n_epochs,
    )


def _trunk(settings: Settings, request: FitRequest, device: torch.device, loader: RecordedLoader) -> Trunk:
    return Trunk(
        model=request.model,
        optimizer=request.optimizer,
        scheduler=request.scheduler,
        step_fn=pair_step(request.loss_fn, device),
        loss_fn=request.loss_fn,
        device=device,
        precision=settings.precision,
        clip_norm=settings.clip_norm,
        loader=loader,
    )


def _mode(asked: Mode, plan: Plan) -> tuple[Mode, str | None]:
    """Give the mode that this run can have, and why it is another one."""
    if asked not in ("propose", "act") or plan.total is not None:
        return asked, None
    why = "the training loader has no length, so the end of the run and its compute are not known beforehand"
    warn_user(f'automode="{asked}" becomes "observe": {why}; give max_steps to plan with')
    return "observe", why


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the user's own code draws from the global generator
    torch.manual_seed(seed)


def _probe(trunk: Trunk, loader: RecordedLoader, *, watched: bool) -> Probe:
    if not watched:
        return Probe(trunk.parameters)
    ledger = SampleLedger(loader.length, fingerprint=loader.fingerprint)
    return Probe(trunk.parameters, per_sample_twin(trunk.loss_fn), loader, ledger)


def _check_held_out(
    settings: Settings, request: FitRequest, held_out: HeldOut | None, test_set: HeldOut | None
) -> dict[str, Ids]:
    """Read what will be read later, so that a mistake shows now and not after an epoch; returns the slices."""
    if held_out is not None and settings.val_every_n_epochs:
        check_batches(held_out, "val_loader")
    if test_set is not None and settings.do_test_after:
        check_batches(test_set, "test_loader")
    return {} if held_out is None or not request.slices else resolve_slices(request.slices, held_out)


def _evaluator(trunk: Trunk, held_out: HeldOut) -> Evaluator:
    # A twin of its own: evaluation must not narrow what training knows of the loss.
    return Evaluator(
        step_fn=trunk.step_fn,
        batches=held_out.batches,
        n_a=held_out.n_a,
        per_sample=per_sample_twin(trunk.loss_fn),
        autocast=trunk.autocast,
    )
