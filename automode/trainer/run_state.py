"""A run's complete state at a step boundary: taken as one checkpoint, and put back into the user's own objects.

Weights go to safetensors, everything else is plain data and tensors. Tensors are references to live ones: a state is stored
before the next step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from automode.errors import SessionCorruptError
from automode.merges.trajectory import TrajectoryAverages
from automode.trainer.loop import Loop
from automode.trainer.run_identity import identity_of
from automode.trainer.run_parts import RunParts
from automode.trainer.trunk import trainable

FORMAT = 1
"""Version of the layout of ``rest``."""

Weights = dict[str, Tensor]
Rest = dict[str, Any]


def take(parts: RunParts, loop: Loop) -> tuple[Weights, Rest]:
    """Take the state as it is between two steps; rows must have been drained from the probe.

    Args:
        parts: The run.
        loop: Where it stands.
    """
    trunk = parts.trunk
    weights, rest = trunk.state()
    model = trunk.model
    rest |= {
        "format": FORMAT,
        "clip_norm": trunk.clip_norm,
        "cap_norm": trunk.cap_norm,
        "part_rows": trunk.part_rows,
        "outside": [parameter.detach() for parameter in _outside(parts)],
        "buffers": {name: buffer for name, buffer in model.named_buffers() if name not in weights},
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": _gradients(parts) if _accumulates(parts) else {},
        "loop": loop.state(),
        "probe": parts.probe.state(),
        "evaluator": None if parts.evaluator is None else parts.evaluator.state(),
        "identity": identity_of(parts),
        "length": _length_of(parts),
    }
    if trunk.first is not None:
        rest |= trunk.first_state()
    if isinstance(parts.request.loss_fn, nn.Module):
        rest["loss"] = parts.request.loss_fn.state_dict()
    return weights, rest


def put_trunk(parts: RunParts, weights: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put model, optimizer, scheduler, averages and loss back; the objects stay the user's.

    Raises:
        SessionCorruptError: The state is of another layout.
    """
    if rest.get("format") != FORMAT:
        raise SessionCorruptError(
            f"the checkpoint has layout {rest.get('format')!r} and this version reads {FORMAT}; resume with the version of "
            "automode that wrote it"
        )
    trunk = parts.trunk
    model = trunk.model
    put_averages(parts, rest)
    trunk.load(weights, rest, schedule=True)
    trunk.first, trunk.first_moments = rest.get("first"), rest.get("first_moments", {})
    trunk.step = int(rest["step"])
    trunk.clip_norm, trunk.cap_norm = rest["clip_norm"], rest["cap_norm"]
    trunk.part_rows = rest.get("part_rows")  # states of before know none
    with torch.no_grad():
        for parameter, value in zip(_outside(parts), rest["outside"], strict=True):
            parameter.copy_(value)
        buffers = dict(model.named_buffers())
        for name, value in rest["buffers"].items():
            buffers[name].copy_(value)
    for module, training in zip(model.modules(), rest["training"], strict=True):
        module.training = training
    for parameter, wanted in zip(model.parameters(), rest["requires_grad"], strict=True):
        parameter.requires_grad_(wanted)
    for key, parameter in _by_name(parts):
        gradient = rest["gradients"].get(key)
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
    if "loss" in rest and isinstance(parts.request.loss_fn, nn.Module):
        parts.request.loss_fn.load_state_dict(rest["loss"])
    if trunk.step:
        # A scheduler warns where it is stepped before its optimizer was; this one was, in another process.
        trunk.optimizer._opt_called = True  # type: ignore[attr-defined]  # noqa: SLF001


def put_averages(parts: RunParts, rest: Mapping[str, Any]) -> None:
    """Put the averages back, where the run keeps any."""
    stored, trunk = rest.get("averages"), parts.trunk
    if stored is None:
        return
    if trunk.averages is None:
        trunk.averages = TrajectoryAverages(trainable(trunk.model), int(stored["planned_steps"]))
    trunk.averages.load_state_dict(stored)


def put_length(parts: RunParts, rest: Mapping[str, Any]) -> None:
    """Give the run the length that a person had set, unless its script asks for another one than it did then."""
    stored, now = rest.get("length"), _length_of(parts)
    if stored is None or stored["asked"] != now["asked"]:
        return
    max_epochs, max_steps = stored["in_force"]
    parts.plan = replace(parts.plan, max_epochs=max_epochs, max_steps=max_steps)


def _length_of(parts: RunParts) -> dict[str, list[int | None]]:
    settings, plan = parts.settings, parts.plan
    return {
        "asked": [settings.epochs, settings.max_steps],
        "in_force": [plan.max_epochs, plan.max_steps],
    }


def put_watching(parts: RunParts, rest: Mapping[str, Any]) -> None:
    """Put back what the probe and the evaluator have settled.

    Raises:
        DataError: The sample ledger is of another dataset.
    """
    parts.probe.load(rest["probe"], parts.trunk.device)
    if parts.evaluator is not None and rest["evaluator"] is not None:
        parts.evaluator.load(rest["evaluator"])


def _outside(parts: RunParts) -> list[nn.Parameter]:
    """Parameters that are trained and are not the model's."""
    own = {id(parameter) for parameter in parts.trunk.model.parameters()}
    return [parameter for parameter in parts.trunk.parameters if id(parameter) not in own]


def _by_name(parts: RunParts) -> Iterator[tuple[str, nn.Parameter]]:
    yield from parts.trunk.model.named_parameters()
    yield from ((f"outside.{i}", parameter) for i, parameter in enumerate(_outside(parts)))


def _accumulates(parts: RunParts) -> bool:
    return parts.own_step is not None or parts.settings.accumulate_grad_batches > 1


def _gradients(parts: RunParts) -> dict[str, Tensor]:
    """Gradients as they stand: the training step may be in the middle of accumulating."""
    return {name: parameter.grad for name, parameter in _by_name(parts) if parameter.grad is not None}
