"""Whether the script that takes a run up is the script that was cut: what must be the same, and what may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from automode.errors import UsageError
from automode.trainer.run_parts import RunParts

_NAMED_AT_MOST = 3
_FRESH = "start a run of its own instead (without resume=)"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between a stored run and the one at hand.

    Attributes:
        doubts: Why what follows cannot equal the run that was cut, bit for bit.
        notes: What a person is told besides.
    """

    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def identity_of(parts: RunParts) -> dict[str, Any]:
    """Say what a run is made of, as plain data to be stored with its state."""
    trunk, plan, settings, loader = parts.trunk, parts.plan, parts.settings, parts.loader
    given: Any = loader.loader
    return {
        "parameters": {
            name: [list(p.shape), str(p.dtype)]
            for name, p in trunk.model.state_dict().items()
            if _is_tensor(p)
        },
        "optimizer": type(trunk.optimizer).__name__,
        "groups": [len(group["params"]) for group in trunk.optimizer.param_groups],
        "scheduler": None if trunk.scheduler is None else type(trunk.scheduler).__name__,
        "interval": settings.scheduler_interval,
        "own_step": parts.own_step is not None,
        "accumulate": settings.accumulate_grad_batches,
        "dataset": loader.fingerprint,
        "batch_size": getattr(given, "batch_size", None),
        "steps_per_epoch": plan.steps_per_epoch,
        "max_epochs": plan.max_epochs,
        "max_steps": plan.max_steps,
        "total": plan.total,
        "held_out": None if parts.held_out is None else int(parts.held_out.ids.size),
        "policy": parts.policy.digest,
        "asked_mode": settings.mode,
        "workers": getattr(given, "num_workers", 0),
        "validate_every": plan.validate_every,
        "precision": trunk.precision,
        "clip_norm": settings.clip_norm,
        "device": trunk.device.type,
        "device_name": _device_name(trunk.device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def compare(stored: Mapping[str, Any], now: Mapping[str, Any], *, step: int, finished: bool) -> Comparison:
    """Compare the run that was stored with the one at hand.

    Args:
        stored: What :func:`identity_of` gave then.
        now: What it gives now.
        step: Optimizer steps done at the cut.
        finished: Whether the stored run had come to its end.

    Raises:
        UsageError: They are different runs, or nothing is left to train.
    """
    _same_model(stored["parameters"], now["parameters"])
    _same("optimizer", stored["optimizer"], now["optimizer"], "an optimizer")
    _same("optimizer", stored["groups"], now["groups"], "parameter groups of these sizes")
    _same("scheduler", stored["scheduler"], now["scheduler"], "a scheduler")
    _same("scheduler_interval", stored["interval"], now["interval"], "a scheduler stepped")
    _same("training_step", stored["own_step"], now["own_step"], "an own training step:")
    _same("accumulate_grad_batches", stored.get("accumulate", 1), now["accumulate"], "optimizer steps of")
    _same("train_loader", stored["dataset"], now["dataset"], "the dataset")
    _same("train_loader", stored["batch_size"], now["batch_size"], "batches of")
    _same("train_loader", stored["steps_per_epoch"], now["steps_per_epoch"], "batches an epoch:")
    _same("val_loader", stored["held_out"], now["held_out"], "held-out samples:")
    _same("automode", stored["asked_mode"], now["asked_mode"], "mode")
    _same("policy", stored["policy"], now["policy"], "the policy with digest")
    found = Comparison()
    _compare_length(stored, now, step, finished, found)
    for name, what in (
        ("workers", "num_workers"),
        ("precision", "precision"),
        ("clip_norm", "clip_norm"),
        ("validate_every", "val_every_n_epochs"),
        ("device", "device"),
        ("device_name", "the processor"),
        ("threads", "the number of threads"),
        ("torch", "torch's version"),
    ):
        if stored[name] != now[name]:
            found.doubts.append(f"{what} was {stored[name]} and is {now[name]}")
    return found


def _compare_length(
    stored: Mapping[str, Any], now: Mapping[str, Any], step: int, finished: bool, found: Comparison
) -> None:
    lengths = [(name, stored[name], now[name]) for name in ("max_epochs", "max_steps")]
    if all(then == here for _, then, here in lengths):
        if finished:
            raise UsageError(
                f"this run has come to its end (step {step}), so nothing is left to resume; give a larger max_epochs or "
                "max_steps to train on from there"
            )
        return
    then, here = (_length(identity) for identity in (stored, now))
    if any((before is None) != (after is None) for _, before, after in lengths) and None in (
        stored["total"],
        now["total"],
    ):
        raise UsageError(
            f"the run was begun with {then} and is resumed with {here}, and the loader has no length to compare them by; "
            "give the same kind of length"
        )
    longer = (
        now["total"] > stored["total"]
        if None not in (stored["total"], now["total"])
        else next(after > before for _, before, after in lengths if before is not None and after is not None)
    )
    if not longer:
        raise UsageError(
            f"the run was begun with {then} and is resumed with {here}, which is less: a run can be resumed at its own "
            f"length or longer; give {then}, or {_FRESH}"
        )
    found.notes.append(f"the run is longer than it was begun: {here} in place of {then}")


def _length(identity: Mapping[str, Any]) -> str:
    steps, epochs = identity["max_steps"], identity["max_epochs"]
    return f"max_epochs={epochs}" if steps is None else f"max_steps={steps}"


def _same(argument: str, then: Any, now: Any, what: str) -> None:
    if then != now:
        raise UsageError(
            f"{argument}: the run to resume was begun with {what} {then}, and this script gives {now}; make it the same, or "
            f"{_FRESH}"
        )


def _same_model(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [
        f"{name} (was {_shown(then.get(name))}, is {_shown(now.get(name))})"
        for name in [*then, *(name for name in now if name not in then)]
        if then.get(name) != now.get(name)
    ]
    if different:
        more = "" if len(different) <= _NAMED_AT_MOST else f" and {len(different) - _NAMED_AT_MOST} more"
        raise UsageError(
            f"model: the run to resume has other weights than this model: {', '.join(different[:_NAMED_AT_MOST])}{more}; build "
            f"the same model, or {_FRESH}"
        )


def _shown(entry: Any) -> str:
    return "missing" if entry is None else f"{entry[1]} of shape {tuple(entry[0])}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
