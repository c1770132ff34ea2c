"""Which kind of training step a run takes."""

from __future__ import annotations

from torch.utils.data import BatchSampler

from automode.planner.events import Mode
from automode.trainer.accumulating import AccumulatingStep
from automode.trainer.closures import ClosureStep, needs_closure
from automode.trainer.loop import Train
from automode.trainer.run_parts import RunParts
from automode.trainer.step_hooks import Guarded
from automode.trainer.steps import DefaultStep, OwnStep, Scaler


def step_of(parts: RunParts, guarded: Guarded) -> Train:
    """Make the training step: the user's own, one by closure where the optimizer needs it, an accumulating one, or the default.

    Args:
        parts: The run.
        guarded: Says whether the guard is on.
    """
    trunk, every = parts.trunk, parts.settings.accumulate_grad_batches
    scaler = Scaler(trunk.device.type, enabled=trunk.precision == "fp16")
    if parts.own_step is not None:
        return OwnStep(parts.own_step, trunk, scaler, guarded)
    if needs_closure(trunk.optimizer):
        return ClosureStep(trunk, guarded)
    if every == 1:
        return DefaultStep(trunk, scaler, guarded, parts.policy.safeguards.leap)
    cursor, length = parts.cursor, parts.plan.steps_per_epoch
    return AccumulatingStep(trunk, scaler, guarded, every=every, last=lambda: cursor.read + 1 == length)


def keep_first_weights(parts: RunParts, mode: Mode) -> str | None:
    """Keep the weights as they are for specialists to restart from, or say why not."""
    if mode not in ("propose", "act"):
        return f"they are kept in act and propose mode, and the run began in {mode} mode"
    if "learning_rate_probe" not in parts.policy.reasons:
        return "they are kept for learning_rate_probe, which is none of policy.reasons"
    why = why_no_forks(parts)
    if why is None:
        parts.trunk.keep_first()
    return why


def why_no_other_batches(loader: object) -> str | None:
    """Say why batches of another size would not be like the loader's own; None where it draws them sample by sample."""
    batches = getattr(loader, "batch_sampler", None)
    if batches is None or type(batches) is BatchSampler:
        return None
    return f"its batches are put together by a {type(batches).__name__}, and that would not make those of another size"


def why_no_forks(parts: RunParts) -> str | None:
    """Say why no specialist can be trained as the trunk is; None where it can."""
    trunk = parts.trunk
    if parts.hand_written is not None:
        return f"{parts.hand_written}, so that no specialist can be trained beside it"
    if parts.own_step is not None:
        return "the training step is the user's own and steps the optimizer itself, so no specialist can be trained by it"
    if trunk.precision == "fp16":
        return "specialists are not trained under gradient scaling (fp16); use bf16"
    if needs_closure(trunk.optimizer):
        return f"{type(trunk.optimizer).__name__} evaluates the loss itself, several times a step, which specialists do not do"
    if parts.settings.accumulate_grad_batches > 1:
        return (
            "specialists step after every batch, and this run accumulates gradients over several; larger batches in place of "
            "accumulate_grad_batches would allow them"
        )
    if not {id(p) for p in trunk.parameters} <= {id(p) for p in trunk.model.parameters()}:
        return "the optimizer also trains parameters that are not the model's, which no specialist would take along"
    return None
